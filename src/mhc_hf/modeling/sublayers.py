"""The table: which norm and which branch make up the F of each site, a few forms for all families.

A form lists the sites of one decoder layer in order. Names are the attributes of the family's own layer, which
`MHCDecoderLayer` adopts. A family stands in `FAMILIES` only if the tests have found its widened model equal to its
base: families that are not listed are refused, never guessed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SubLayer:
    """One site and its branch, F(u) = branch(norm(u)).

    Attributes:
        site: name of the hyper-connection.
        norm: the norm that the branch begins with.
        branch: attention or MLP.
        takes_context: the branch is called with the layer's keyword arguments (masks, cache, rotary embeddings).
    """

    site: str
    norm: str
    branch: str
    takes_context: bool = False


Form = tuple[SubLayer, ...]

# x = x + attn(norm(x)); x = x + mlp(norm(x)), under LLaMA's names
PRE_NORM: Form = (
    SubLayer("attn_hc", "input_layernorm", "self_attn", takes_context=True),
    SubLayer("ffn_hc", "post_attention_layernorm", "mlp"),
)

FAMILIES: dict[str, Form] = {
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
}

SITE_NAMES = tuple(dict.fromkeys(sub_layer.site for form in FAMILIES.values() for sub_layer in form))
