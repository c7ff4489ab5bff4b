"""The PEFT configurations of a widened model: LoRA on the base, hyper-connections trained in full, or both."""

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..modeling import (
    HyperConnection,
    MHCForCausalLM,
    MHCForQuestionAnswering,
    MHCForSequenceClassification,
    MHCForTokenClassification,
)

if TYPE_CHECKING:
    from peft import LoraConfig

TRAINABLE = ("lora+mhc", "lora", "mhc")
TASK_TYPES = {
    MHCForCausalLM: "CAUSAL_LM",
    MHCForSequenceClassification: "SEQ_CLS",
    MHCForTokenClassification: "TOKEN_CLS",
    MHCForQuestionAnswering: "QUESTION_ANS",
}


def mhc_lora_config(
    model: nn.Module, train: Literal["lora+mhc", "lora", "mhc"] = "lora+mhc", **lora_kwargs: Any
) -> "LoraConfig":
    """The `LoraConfig` for a widened model: `get_peft_model(model, mhc_lora_config(model, r=16))`.

    Hyper-connections are small, and a low-rank change of a float32 gate is no saving: they are trained in full beside
    the LoRA, as `modules_to_save`. The adapter folder then holds them whole, in float32.

    Args:
        model: a widened model.
        train: "lora+mhc"; "lora", which leaves the hyper-connections as they are; or "mhc", which leaves all else.
        lora_kwargs: passed to `LoraConfig` (r, lora_alpha, lora_dropout, ...). `target_modules` defaults to all linear
            layers but the output embedding, `task_type` to the model's; `modules_to_save` come beside the sites.
    Raises:
        ValueError: `train` is none of the three, the model has no hyper-connections or is wrapped already, or LoRA
            options are given where there is no LoRA.
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, PeftModel
        from peft.utils.constants import DUMMY_TARGET_MODULES
    except ImportError as error:
        raise ImportError("mhc_lora_config needs peft: pip install 'mhc-hf[train]'.") from error

    if train not in TRAINABLE:
        raise ValueError(f"`train` must be one of {', '.join(map(repr, TRAINABLE))}, got {train!r}.")
    if isinstance(model, PeftModel):
        raise ValueError(
            f"`model` must not be wrapped by PEFT yet, got a {type(model).__name__}. Make the configuration from the "
            "widened model; for a second adapter pass it to add_adapter(name, config)."
        )
    sites = _site_names(model)
    if not sites:
        raise ValueError(
            f"`model` must be a widened model, got a {type(model).__name__} without a HyperConnection. "
            "Widen it with MHCForCausalLM.from_base(model)."
        )
    if train == "mhc":
        taken = sorted(set(lora_kwargs) - {"task_type", "modules_to_save"})
        if taken:
            raise ValueError(f'{", ".join(taken)} set up LoRA, and `train="mhc"` has none. Take train="lora+mhc".')
        # the name that PEFT lets match nothing
        lora_kwargs["target_modules"] = DUMMY_TARGET_MODULES
    lora_kwargs.setdefault("target_modules", "all-linear")
    lora_kwargs.setdefault("task_type", next((t for kind, t in TASK_TYPES.items() if isinstance(model, kind)), None))
    if train != "lora":
        lora_kwargs["modules_to_save"] = [*sites, *(lora_kwargs.get("modules_to_save") or [])]
    return LoraConfig(**lora_kwargs)


def _site_names(model: nn.Module) -> list[str]:
    """ "attn_hc" and "ffn_hc", or whatever the family's sites are called."""
    names = (name for name, module in model.named_modules() if isinstance(module, HyperConnection))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
