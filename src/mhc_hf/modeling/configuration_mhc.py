"""MHCConfig: the base model's configuration, flat, and the few fields that hyper-connections add.

In JSON it is the base's fields with `model_type: "mhc"`, `base_model_type` and `hc_*`. In Python every family has a
class of its own, `MHCLlamaConfig(LlamaConfig, MHCConfig)` and so on, made when it is first asked for.
"""

import functools
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .projections import PROJECTIONS
from .starts import STARTS

# called with each new family's config class, before anyone sees it: `families` registers the model classes here
on_new_family: list[Callable[[type["MHCConfig"]], None]] = []
# called with each configuration that `from_base` makes: `families` refuses here what does not fit
on_from_base: list[Callable[["MHCConfig"], None]] = []
# called with each configuration before it is saved, and its folder: `sharing` puts code there that `auto_map` names
before_save: list[Callable[["MHCConfig", Path], None]] = []


class MHCConfig(PreTrainedConfig):
    """Configuration of a decoder with manifold-constrained hyper-connections (arXiv 2512.24880).

    `MHCConfig(base_model_type="llama", ...)` and `MHCConfig.from_base(config)` give an instance of the family's class.

    Args:
        base_model_type: `model_type` of the base model, e.g. "llama".
        hc_mult: n, the number of residual streams (expansion rate), >= 2.
        hc_sinkhorn_iters: t_max of Eq. 9, >= 1.
        hc_start: what the mHC parameters begin with where no checkpoint holds them: "paper" (training from scratch),
            "orthogonal" or "copies" (conversions; both preserve the base model's function).
        hc_alpha_init: gating factor of the dynamic maps at the start; None takes the start's own: 0.01 for "paper",
            1 for a conversion.
        hc_projection: what makes H_res of its logits: "sinkhorn" (mHC); for comparisons "none" (the original
            Hyper-Connections, unconstrained) and "identity" (streams are never mixed), on the PyTorch path.
        hc_norm_eps: added to the mean square before its root is taken.
        hc_recompute: in training keep one set of streams a block of layers and make the others again in backward.
        hc_recompute_layers: layers a block, >= 1; None takes sqrt(n L / (n + 2)) (Eq. 20).
    Raises:
        ValueError: a field is out of range, or the base family is not supported.
    """

    model_type = "mhc"

    base_model_type: str | None = None
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_start: str = "paper"
    hc_alpha_init: float | None = None
    hc_norm_eps: float = 1e-6
    hc_recompute: bool = False
    hc_recompute_layers: int | None = None
    hc_projection: str = "sinkhorn"

    def __new__(cls, *args: Any, **kwargs: Any) -> "MHCConfig":
        if cls is MHCConfig and kwargs.get("base_model_type") is not None:
            cls = config_class_for(kwargs["base_model_type"])
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        _check_int("hc_mult", self.hc_mult, 2, "For a plain residual model load the base checkpoint")
        _check_int("hc_sinkhorn_iters", self.hc_sinkhorn_iters, 1, "The paper takes 20")
        if self.hc_recompute_layers is not None:
            _check_int("hc_recompute_layers", self.hc_recompute_layers, 1, "None takes the paper's own")
        if self.hc_start not in STARTS:
            raise ValueError(f"`hc_start` must be one of {', '.join(map(repr, STARTS))}, got {self.hc_start!r}.")
        if self.hc_projection not in PROJECTIONS:
            raise ValueError(
                f"`hc_projection` must be one of {', '.join(map(repr, PROJECTIONS))}, got {self.hc_projection!r}. "
                '"sinkhorn" is mHC.'
            )
        if self.hc_recompute and self.hc_projection != "sinkhorn":
            raise ValueError(
                f'`hc_recompute` needs `hc_projection="sinkhorn"`, got {self.hc_projection!r}. '
                "Turn on gradient checkpointing instead."
            )
        start = STARTS[self.hc_start]
        if self.hc_mult < start.min_mult:
            raise ValueError(
                f"`hc_start={self.hc_start!r}` needs `hc_mult` >= {start.min_mult}, got {self.hc_mult}. "
                f'Take hc_start="copies", or more streams.'
            )
        if self.hc_alpha_init is None:
            self.hc_alpha_init = start.alpha
        if not self.hc_alpha_init:
            raise ValueError(
                f"`hc_alpha_init` must not be 0, got {self.hc_alpha_init!r}: with phi = 0 neither would ever learn. "
                f"The start {self.hc_start!r} takes {start.alpha}."
            )
        super().__post_init__(**kwargs)
        # JSON takes the class's, "mhc". The instance names its family: under this, transformers looks up how weights
        # on disk become parameters, once for a model and the decoder in it
        vars(self)["model_type"] = conversion_name(self.base_model_type)

    @classmethod
    def is_custom_code(cls) -> bool:
        # of custom code transformers supposes that its layer types have old names, and 5.17 renames LFM2's
        return False

    @classmethod
    def from_base(cls, config: PreTrainedConfig, **hc: Any) -> "MHCConfig":
        """The configuration of `config`'s model widened into `hc_mult` streams.

        Args:
            config: configuration of a supported decoder, e.g. a `LlamaConfig`. It is not changed.
            hc: any of the `hc_*` fields.
        Raises:
            ValueError: the family is not supported, holds more than a decoder or is already widened, a field of
                `config` does not fit, or an `hc_*` value is out of range.
        """
        if isinstance(config, MHCConfig):
            raise ValueError(
                f"`config` is already widened (base_model_type={config.base_model_type!r}, hc_mult={config.hc_mult}). "
                "Pass the base model's configuration."
            )
        unknown = sorted(set(hc) - {name for name in MHCConfig.__annotations__ if name.startswith("hc_")})
        if unknown:
            raise ValueError(
                f"`from_base` takes hc_* fields only, got {', '.join(unknown)}. Set others on `config` first."
            )
        decoder = config.get_text_config()
        if decoder is not config:
            raise ValueError(
                f"`config` is a composite one: {type(config).__name__} holds a {type(decoder).__name__} "
                "beside those of other modalities. Widen its decoder alone: pass `config.get_text_config()`, or the "
                "`...ForCausalLM` that has it."
            )
        values = config.to_dict()
        # `auto_map` names code of the base's own, which is not for this model
        for name in ("model_type", "transformers_version", "auto_map"):
            values.pop(name, None)
        family = config_class_for(config.model_type)
        values["architectures"] = [family.__name__.removesuffix("Config") + "ForCausalLM"]
        widened = family(**values, **hc)
        widened._attn_implementation = config._attn_implementation
        widened._experts_implementation = getattr(config, "_experts_implementation", None)
        widened.name_or_path = config.name_or_path
        for check in on_from_base:
            check(widened)
        return widened

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        for save_with_it in before_save:
            save_with_it(self, Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls is not MHCConfig:
            return super().from_dict(config_dict, **kwargs)
        base_model_type = config_dict.get("base_model_type")
        if base_model_type is None:
            raise ValueError(
                '`base_model_type` is missing from a configuration of `model_type: "mhc"`. '
                'It names the base family, e.g. "llama".'
            )
        return config_class_for(base_model_type).from_dict(config_dict, **kwargs)


@functools.cache
def config_class_for(base_model_type: str) -> type[MHCConfig]:
    """The config class of a family, made on demand.

    Raises:
        ValueError: transformers has no such model type, or it is not supported (the message says which are).
    """
    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`base_model_type` must be a model type that this version of transformers knows, got {base_model_type!r}."
        )
    base = CONFIG_MAPPING[base_model_type]
    name = family_class_name(base_model_type)
    # the base class first: its defaults win over those that MHCConfig inherits from PreTrainedConfig
    family = type(
        name,
        (base, MHCConfig),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__annotations__": {"base_model_type": str},
            "base_model_type": base_model_type,
            "model_type": MHCConfig.model_type,
        },
    )
    for registered in on_new_family:
        registered(family)
    return family


def conversion_name(base_model_type: str | None) -> str:
    """What a family's conversions of weights are registered as: "mixtral" -> "mhc_mixtral"."""
    return MHCConfig.model_type if base_model_type is None else f"{MHCConfig.model_type}_{base_model_type}"


def family_class_name(base_model_type: str) -> str:
    """ "llama" -> "MHCLlamaConfig"."""
    return f"MHC{CONFIG_MAPPING[base_model_type].__name__}"


def __getattr__(name: str) -> type[MHCConfig]:
    """Family classes by name: pickles and spawned processes look for them before anyone has asked for the family."""
    base_name = name.removeprefix("MHC")
    if base_name != name:
        for model_type, config_name in CONFIG_MAPPING_NAMES.items():
            # not an alias, such as gpt-sw3 for gpt2
            if config_name == base_name and CONFIG_MAPPING[model_type].model_type == model_type:
                return config_class_for(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check_int(name: str, value: Any, minimum: int, cure: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value!r}. {cure}.")
