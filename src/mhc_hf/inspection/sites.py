"""The hyper-connections of a model: which modules they are, what they are called, and their maps at given streams.

Ours and those of transformers' own DeepSeek-V4 and GLM-5.3 models. Theirs hold `fn`, `base` and `scale` for our phi,
bias and alpha, take streams as [B, S, n, C], and apply their matrix transposed (docs/math.md).

Shapes: B batch, S sequence, n streams, C channels of one stream.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import HyperConnection

# by name: older transformers lack these, and a class that merely looks alike may mix in the other direction
TRANSFORMERS_CLASSES = ("DeepseekV4HyperConnection", "Glm5NextTextHyperConnection")
PARAMETERS = ("phi", "bias", "alpha")
_THEIR_PARAMETERS = ("fn", "base", "scale")


class InspectionError(ValueError):
    """A model, a text or a folder cannot be inspected; the message says why and what to do."""


def find_sites(model: nn.Module) -> dict[str, nn.Module]:
    """Every hyper-connection by its full name in `model`, those that PEFT has put aside included."""
    return {name: module for name, module in model.named_modules() if _is_site(module)}


def require_sites(model: nn.Module) -> dict[str, nn.Module]:
    """`find_sites`, of which there must be some.

    Raises:
        InspectionError: the model has none.
    """
    sites = find_sites(model)
    if not sites:
        raise InspectionError(
            f"`model` must have hyper-connections, got a {type(model).__name__} without any. "
            "Widen it with MHCForCausalLM.from_base(model) or `mhc-hf convert`."
        )
    return sites


def shorten_name(name: str) -> str:
    """A site's name without what wraps the model: "layers.3.attn_hc" under Trainer, PEFT, DDP and compile alike."""
    # PEFT: `attn_hc.modules_to_save.default` runs, `attn_hc.original_module` is put aside
    parts = name.partition(".modules_to_save")[0].removesuffix(".original_module").split(".")
    parts = [part for part in parts if not part.startswith("_")]
    return ".".join(parts[parts.index("layers") :] if "layers" in parts else parts)


def count_streams(site: Any) -> int:
    """n"""
    return site.hc_mult


def split_streams(site: Any, hidden_states: Tensor) -> Tensor:
    """What a site gets, as [B, S, n, C]."""
    if isinstance(site, HyperConnection):
        return hidden_states.unflatten(-1, (site.hc_mult, -1))
    return hidden_states


def get_parameters(site: Any) -> dict[str, nn.Parameter]:
    """The parameters under our names: phi, bias, alpha."""
    names = PARAMETERS if isinstance(site, HyperConnection) else _THEIR_PARAMETERS
    return {ours: getattr(site, name) for ours, name in zip(PARAMETERS, names, strict=True)}


@torch.no_grad()
def compute_maps(site: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre [B, S, n], H_post [B, S, n] and H_res [B, S, n, n] of a site, in our convention: into row, from column."""
    if isinstance(site, HyperConnection):
        return site.maps(hidden_states)
    # not `site(...)`: that would run the hooks that brought us here
    h_post, combination, _ = site.forward(hidden_states)
    n = site.hc_mult
    normed = site.input_norm(hidden_states.flatten(2).float())
    logits = nn.functional.linear(normed, site.fn[:n].float()) * site.scale[0] + site.base[:n]
    # streams are mixed by combination^T
    return torch.sigmoid(logits) + site.hc_eps, h_post, combination.mT


def _is_site(module: nn.Module) -> bool:
    return isinstance(module, HyperConnection) or type(module).__name__ in TRANSFORMERS_CLASSES
