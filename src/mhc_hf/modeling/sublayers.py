"""The table: what makes up the F of each site, a few forms for all families, in the steps of `steps`.

A family stands in `FAMILIES` only if the tests have found its widened model equal to its base: families that are not
listed are refused, never guessed, and `REFUSED` says of some why. To add a family is to add a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .steps import ByType, Chain, Dropout, Form, Gate, Mixer, OneOf, RoutedExperts, Scale, Step, Sum

# (configuration, index of the layer) -> its form
Rule = Callable[[Any, int], Form]


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        forms: all the forms that its layers may have.
        choose: which of them a layer has; None where there is one.
        layers: where the base model keeps its layers.
        inner: class of the model within the base model that keeps them, where there is one.
        refuse: (attribute of the configuration, the values that fit, what the others mean).
    """

    forms: tuple[Form, ...]
    choose: Rule | None = None
    layers: str = "layers"
    inner: str | None = None
    refuse: tuple[tuple[str, tuple[Any, ...], str], ...] = field(default=())

    def form(self, config: Any, index: int) -> Form:
        return self.forms[0] if self.choose is None else self.choose(config, index)


def attention(module: str = "self_attn", *, without: tuple[str, ...] = (), extra: bool = True) -> Mixer:
    return Mixer(module, without=without, extra=extra)


def state_space(module: str, *, mask: str = "attention_mask", extra: bool = True) -> Mixer:
    """What keeps its state under `cache_params` and knows nothing of positions."""
    return Mixer(module, {"cache_params": "past_key_values", "attention_mask": mask}, extra=extra)


def convolution(module: str, mask: str = "attention_mask") -> Mixer:
    return Mixer(module, {"past_key_values": "past_key_values", mask: mask}, extra=False)


PLAIN = "x + attn(norm x); x + mlp(norm x)"
HYBRID = "x + mix(norm x); x + mlp(norm x)"
SANDWICHED = "x + norm(attn(norm x)); x + norm(mlp(norm x))"
SCALED = "x + s attn(norm x); x + s mlp(norm x)"


def two_sites(title: str, formula: str, attn: Chain, ffn: Chain, *, returns: int | None = None) -> Form:
    return Form(title, formula, {"attn_hc": attn, "ffn_hc": ffn}, returns)


def pre_norm(norm: str, attn: Step, mlp_norm: str, mlp: str, *, returns: int | None = None) -> Form:
    return two_sites("pre-norm", PLAIN, (norm, attn), (mlp_norm, mlp), returns=returns)


def with_dropout(attn: Chain, ffn: Chain, *, returns: int | None = None) -> Form:
    return two_sites("pre-norm, dropout", PLAIN, attn, ffn, returns=returns)


def parallel(*chain: Step, returns: int | None = None) -> Form:
    return Form("parallel", "x + attn(norm x) + mlp(norm x)", {"layer_hc": chain}, returns)


def sandwich(norm: str, after: str, mlp_norm: str, mlp_after: str) -> Form:
    return two_sites("sandwich norms", SANDWICHED, (norm, attention(), after), (mlp_norm, "mlp", mlp_after))


def hybrid(norm: str, mixer: Step, mlp_norm: str, mlp: str, *, returns: int | None = None) -> Form:
    return two_sites("hybrid", HYBRID, (norm, mixer), (mlp_norm, mlp), returns=returns)


PRE_NORM = pre_norm("input_layernorm", attention(), "post_attention_layernorm", "mlp")
NEMOTRON = pre_norm("input_layernorm", attention(extra=False), "post_attention_layernorm", "mlp")
LLAMA4 = pre_norm("input_layernorm", attention(without=("position_ids",)), "post_attention_layernorm", "feed_forward")
APERTUS = pre_norm("attention_layernorm", attention(), "feedforward_layernorm", "mlp")
VAULT_GEMMA = pre_norm("input_layernorm", attention(), "pre_feedforward_layernorm", "mlp")
JETMOE = pre_norm("input_layernorm", attention("self_attention"), "post_attention_layernorm", "mlp")
MODERN_BERT = pre_norm("attn_norm", attention("attn"), "mlp_norm", "mlp")
# a layer hands the keys that its attention has chosen to the next
GLM_MOE_DSA = pre_norm("input_layernorm", attention(), "post_attention_layernorm", "mlp", returns=2)
ENCODER = ("encoder_hidden_states", "encoder_attention_mask")
GPT2 = pre_norm("ln_1", attention("attn", without=ENCODER), "ln_2", "mlp")
GPT_NEO = pre_norm("ln_1", attention("attn", extra=False), "ln_2", "mlp", returns=1)

PHI3 = with_dropout(
    ("input_layernorm", attention(), "resid_attn_dropout"), ("post_attention_layernorm", "mlp", "resid_mlp_dropout")
)
PERSIMMON = with_dropout(("input_layernorm", attention()), ("post_attention_layernorm", "mlp", "dropout"))
OPT = with_dropout(
    ("self_attn_layer_norm", attention(without=(*ENCODER, "use_cache")), Dropout("dropout")),
    ("final_layer_norm", "fc1", "activation_fn", "fc2", Dropout("dropout")),
)
XGLM = with_dropout(
    ("self_attn_layer_norm", attention(without=(*ENCODER, "use_cache")), Dropout("dropout")),
    ("final_layer_norm", "fc1", "activation_fn", Dropout("activation_dropout"), "fc2", Dropout("dropout")),
)

COHERE = parallel("input_layernorm", Sum(attention(), "mlp"))
GPTJ = parallel("ln_1", Sum(attention("attn", extra=False), "mlp"), returns=1)
PHI = parallel("input_layernorm", Sum((attention(), "resid_dropout"), ("mlp", "resid_dropout")))
STABLELM = parallel("input_layernorm", Sum(attention(extra=False), ("mlp", "dropout")))
STABLELM_IN_TURN = with_dropout(
    ("input_layernorm", attention(extra=False)), ("post_attention_layernorm", "mlp", "dropout")
)
NEOX_ATTN: Chain = ("input_layernorm", attention("attention"), "post_attention_dropout")
NEOX_MLP: Chain = ("post_attention_layernorm", "mlp", "post_mlp_dropout")
GPT_NEOX = parallel(Sum(NEOX_ATTN, NEOX_MLP))
GPT_NEOX_IN_TURN = with_dropout(NEOX_ATTN, NEOX_MLP)
FALCON_ATTN = attention("self_attention", extra=False)
FALCON_DROPOUT = Dropout("config.hidden_dropout")
FALCON_ONE_NORM = parallel("input_layernorm", Sum(FALCON_ATTN, "mlp"), FALCON_DROPOUT, returns=1)
FALCON_TWO_NORMS = parallel(Sum(("ln_attn", FALCON_ATTN), ("ln_mlp", "mlp")), FALCON_DROPOUT, returns=1)
FALCON_IN_TURN = with_dropout(
    ("input_layernorm", FALCON_ATTN, Dropout("config.attention_dropout")),
    ("post_attention_layernorm", "mlp", FALCON_DROPOUT),
    returns=1,
)

GEMMA2 = sandwich(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
GLM4 = sandwich("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
AFMOE = sandwich("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")
OLMO2 = two_sites(
    "post-norm on the branch",
    "x + norm(attn x); x + norm(mlp x)",
    (attention(), "post_attention_layernorm"),
    ("mlp", "post_feedforward_layernorm"),
)
INKLING = two_sites(
    "pre-norm, convolutions",
    "x + conv(attn(norm x)); x + conv(mlp(norm x))",
    ("input_layernorm", attention(), convolution("attn_sconv", mask="conv_mask")),
    ("post_attention_layernorm", "mlp", convolution("mlp_sconv", mask="conv_mask")),
)


def scaled(attn: Chain, ffn: Chain, by: str) -> Form:
    return two_sites("scaled residuals", SCALED, (*attn, Scale(by)), (*ffn, Scale(by)))


GRANITE = scaled(("input_layernorm", attention()), ("post_attention_layernorm", "mlp"), "residual_multiplier")
MINICPM3 = scaled(("input_layernorm", attention()), ("post_attention_layernorm", "mlp"), "residual_scale")
HYPERCLOVAX = scaled(
    ("input_layernorm", attention(), "post_norm1"),
    ("post_attention_layernorm", "mlp", "post_norm2"),
    "residual_multiplier",
)
GRANITE_MOE = scaled(
    ("input_layernorm", attention()),
    ("post_attention_layernorm", Sum("block_sparse_moe", "shared_mlp?")),
    "residual_multiplier",
)
GRANITE_MOE_HYBRID = scaled(
    ("input_layernorm", OneOf(attention(), state_space("mamba"))),
    ("post_attention_layernorm", Sum("block_sparse_moe?", "shared_mlp")),
    "residual_multiplier",
)

QWEN3_NEXT = hybrid(
    "input_layernorm", OneOf(attention(), state_space("linear_attn")), "post_attention_layernorm", "mlp"
)
KIMI_LINEAR = hybrid(
    "input_layernorm",
    ByType("block_type", {"linear_attention": state_space("self_attn"), "full_attention": attention()}),
    "post_attention_layernorm",
    "mlp",
)
OLMO_HYBRID = hybrid("input_layernorm", state_space("linear_attn"), "post_attention_layernorm", "mlp")
JAMBA = hybrid(
    "input_layernorm", OneOf(attention(), state_space("mamba", extra=False)), "pre_ff_layernorm", "feed_forward"
)
BAMBA = hybrid(
    "input_layernorm", OneOf(attention(), state_space("mamba")), "pre_ff_layernorm", "feed_forward", returns=1
)
LFM2 = hybrid("operator_norm", OneOf(attention(), convolution("conv")), "ffn_norm", "feed_forward")
LFM3 = two_sites(
    "hybrid, sandwich norms",
    "x + norm(mix(norm x)); x + norm(mlp(norm x))",
    ("operator_norm", OneOf(attention(), convolution("conv")), "post_operator_norm"),
    ("ffn_norm", "feed_forward", "post_ffn_norm"),
)
RECURRENT_GEMMA = hybrid("temporal_pre_norm", attention("temporal_block"), "channel_pre_norm", "mlp_block")
FALCON_H1_SSM: Chain = (state_space("mamba", mask="mamba_attention_mask"), Scale("ssm_out_multiplier"))
FALCON_H1_ATTN: Chain = (
    Scale("attention_in_multiplier"),
    attention(without=("mamba_attention_mask",)),
    Scale("attn_out_multiplier"),
)
FALCON_H1 = two_sites(
    "hybrid, parallel mixers",
    "x + ssm(norm x) + attn(norm x); x + mlp(norm x)",
    ("input_layernorm", Sum(FALCON_H1_SSM, FALCON_H1_ATTN)),
    ("pre_ff_layernorm", "feed_forward"),
    returns=1,
)
NEMOTRON_H_MIXERS: dict[str, Step] = {
    "linear_attention": state_space("mixer"),
    "full_attention": attention("mixer"),
    "mlp": "mixer",
    "moe": "mixer",
}
NEMOTRON_H = Form(
    "hybrid, one branch a layer", "x + mix(norm x)", {"layer_hc": ("norm", ByType("block_type", NEMOTRON_H_MIXERS))}
)

GEMMA4_ATTN: Chain = ("input_layernorm", attention(without=("per_layer_input",)), "post_attention_layernorm")
GEMMA4_MLP: Chain = ("pre_feedforward_layernorm", "mlp")
GEMMA4_MOE: Chain = (
    RoutedExperts("router", "pre_feedforward_layernorm_2", "experts"),
    "post_feedforward_layernorm_2",
)
GEMMA4_FFN: Chain = (
    ByType(
        "enable_moe_block",
        {False: Sum(GEMMA4_MLP), True: Sum((*GEMMA4_MLP, "post_feedforward_layernorm_1"), GEMMA4_MOE)},
    ),
    "post_feedforward_layernorm",
)
GEMMA4_PER_LAYER: Chain = (
    "per_layer_input_gate",
    "act_fn",
    Gate("per_layer_input"),
    "per_layer_projection",
    "post_per_layer_input_norm",
)
GEMMA4 = Form(
    "sandwich norms, scaled streams",
    f"{SANDWICHED}; s x",
    {"attn_hc": GEMMA4_ATTN, "ffn_hc": GEMMA4_FFN},
    stream_scale="layer_scalar",
)
GEMMA4_WITH_INPUTS = Form(
    "sandwich norms, scaled streams, per-layer inputs",
    f"{SANDWICHED}; x + norm(p gate x); s x",
    {"attn_hc": GEMMA4_ATTN, "ffn_hc": GEMMA4_FFN, "per_layer_hc": GEMMA4_PER_LAYER},
    stream_scale="layer_scalar",
)
GEMMA4_UNIFIED = Form(
    GEMMA4.title,
    GEMMA4.formula,
    {"attn_hc": GEMMA4_ATTN, "ffn_hc": (*GEMMA4_MLP, "post_feedforward_layernorm")},
    stream_scale="layer_scalar",
)


def falcon_form(config: Any, index: int) -> Form:
    if config.new_decoder_architecture:
        return FALCON_ONE_NORM if config.num_ln_in_parallel_attn == 1 else FALCON_TWO_NORMS
    return FALCON_ONE_NORM if config.parallel_attn else FALCON_IN_TURN


def gpt_neox_form(config: Any, index: int) -> Form:
    return GPT_NEOX if config.use_parallel_residual else GPT_NEOX_IN_TURN


def stablelm_form(config: Any, index: int) -> Form:
    return STABLELM if config.use_parallel_residual else STABLELM_IN_TURN


def gemma4_form(config: Any, index: int) -> Form:
    return GEMMA4_WITH_INPUTS if config.hidden_size_per_layer_input else GEMMA4


def olmo_hybrid_form(config: Any, index: int) -> Form:
    return OLMO2 if config.layer_types[index] == "full_attention" else OLMO_HYBRID


def rows(form: Form, *model_types: str) -> dict[str, Family]:
    return {model_type: Family((form,)) for model_type in model_types}


DROPS_LAYERS = ("layerdrop", (0, 0.0), "it drops whole layers while it trains, and with them their streams")
ATTENDS_TO_AN_ENCODER = ("add_cross_attention", (False,), "its layers attend to an encoder too")
NORMS_THE_STREAM = ("do_layer_norm_before", (True,), "it norms the residual stream itself")

FAMILIES: dict[str, Family] = {
    **rows(
        PRE_NORM,
        *("arcee", "aria_text", "axk1", "axk2", "bitnet", "cwm", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
        *("diffllama", "dots1", "dots3_note_text", "ernie4_5", "ernie4_5_moe", "exaone_moe", "flint", "gemma", "glm"),
        *("glm4_moe", "glm4_moe_lite", "gpt_oss", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3"),
        *("internlm3", "iquestcoder", "jais2", "laguna", "llama", "mellum", "mimo_v2_flash", "minimax_m2"),
        *("minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "olmo", "olmoe"),
        *("phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "starcoder2"),
        *("youtu",),
    ),
    **rows(NEMOTRON, "nemotron"),
    **rows(LLAMA4, "llama4_text"),
    **rows(APERTUS, "apertus"),
    **rows(VAULT_GEMMA, "vaultgemma"),
    **rows(JETMOE, "jetmoe"),
    **rows(MODERN_BERT, "modernbert-decoder"),
    **rows(GLM_MOE_DSA, "glm_moe_dsa"),
    "gpt2": Family((GPT2,), layers="h", refuse=(ATTENDS_TO_AN_ENCODER,)),
    "gpt_bigcode": Family((GPT2,), layers="h", refuse=(ATTENDS_TO_AN_ENCODER,)),
    "gpt_neo": Family((GPT_NEO,), layers="h"),
    **rows(PHI3, "phi3"),
    **rows(PERSIMMON, "persimmon"),
    "opt": Family((OPT,), layers="decoder.layers", inner="OPTDecoder", refuse=(NORMS_THE_STREAM, DROPS_LAYERS)),
    "xglm": Family((XGLM,), refuse=(ATTENDS_TO_AN_ENCODER, DROPS_LAYERS)),
    "biogpt": Family((XGLM,), refuse=(DROPS_LAYERS,)),
    **rows(COHERE, "cohere", "cohere2", "cohere2_moe", "cohere_compass_text"),
    "codegen": Family((GPTJ,), layers="h"),
    "gptj": Family((GPTJ,), layers="h"),
    **rows(PHI, "phi"),
    "stablelm": Family((STABLELM, STABLELM_IN_TURN), stablelm_form),
    "gpt_neox": Family((GPT_NEOX, GPT_NEOX_IN_TURN), gpt_neox_form),
    "falcon": Family((FALCON_ONE_NORM, FALCON_TWO_NORMS, FALCON_IN_TURN), falcon_form, layers="h"),
    **rows(GEMMA2, "gemma2", "gemma3_text"),
    **rows(GLM4, "glm4", "kolibri1"),
    **rows(AFMOE, "afmoe"),
    **rows(OLMO2, "exaone4", "flex_olmo", "olmo2", "olmo3"),
    **rows(INKLING, "inkling_text"),
    **rows(GRANITE, "granite", "granite_swa"),
    **rows(MINICPM3, "minicpm3"),
    **rows(HYPERCLOVAX, "hyperclovax"),
    **rows(GRANITE_MOE, "granitemoe", "granitemoe_swa", "granitemoeshared"),
    **rows(GRANITE_MOE_HYBRID, "granitemoehybrid"),
    **rows(QWEN3_NEXT, "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
    **rows(KIMI_LINEAR, "bailing_hybrid", "kimi_linear"),
    "olmo_hybrid": Family((OLMO2, OLMO_HYBRID), olmo_hybrid_form),
    **rows(JAMBA, "jamba"),
    **rows(BAMBA, "bamba"),
    **rows(LFM2, "lfm2", "lfm2_moe"),
    **rows(LFM3, "lfm3"),
    **rows(RECURRENT_GEMMA, "recurrent_gemma"),
    **rows(FALCON_H1, "falcon_h1"),
    **rows(NEMOTRON_H, "nemotron_h"),
    "gemma4_text": Family((GEMMA4, GEMMA4_WITH_INPUTS), gemma4_form),
    **rows(GEMMA4_UNIFIED, "gemma4_unified_text"),
}

# families whose layers are not x + F(x), and what they are instead
REFUSED: dict[str, str] = {
    "beam": "its residual stream is scaled down at every addition",
    "bloom": "its attention and its MLP add the residual themselves",
    "dbrx": "its layer keeps the addition inside a block of norm, attention and norm",
    "deepseek_v4": "it has hyper-connections of its own",
    "doge": "its residual stream is scaled by learned weights",
    "gemma3n_text": "its residual stream is four streams already (AltUp)",
    "gpt_neox_japanese": "its attention leaves a bias for the addition to add",
    "hrm_text": "it runs through its layers several times, in cycles",
    "hy_v4": "it has hyper-connections of its own",
    "inkling2_text": "its layers attend to the outputs of the layers before them",
    "longcat_flash": "its shortcut spans two attentions: it reads the stream in one place and writes it in another",
    "minimax": "its residual is the norm's output, scaled, not the stream",
    "mpt": "its MLP adds the residual itself",
    "openai-gpt": "it norms the residual stream itself, after each addition",
    "phi4_multimodal": "its decoder is built together with its image and speech encoders",
    "qwen4_exp_text": "it has hyper-connections of its own",
    "rwkv": "its layers hand a state of their own kind to one another",
    "xlnet": "it norms the residual stream itself, and keeps two of them",
    "xlstm": "its layers hand a state of their own kind to one another",
    "zamba": "its attention is shared by many layers, and reads the embeddings beside the stream",
    "zamba2": "its attention is shared by many layers, and reads the embeddings beside the stream",
    "zaya": "its residual stream is scaled by learned weights",
}

SITE_NAMES = tuple(dict.fromkeys(site for family in FAMILIES.values() for form in family.forms for site in form.sites))
