"""MHCModel, MHCForCausalLM and the task heads: what the Auto classes return, whatever the family.

These are the common bases of the families' classes (`families.py`). Called or loaded themselves they give the family's
class: `MHCForCausalLM(config)` and `MHCForCausalLM.from_pretrained(folder)` return, say, an `MHCLlamaForCausalLM`.
"""

import copy
from contextvars import ContextVar
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from .configuration_mhc import MHCConfig, on_new_family
from .families import Mixins, adopt_class, check_fits, layers_of, register_family, widen_layers
from .hyper_connection import HyperConnection
from .layer import MHCDecoderLayer
from .starts import default_start
from .sublayers import SITE_NAMES

# set while a base checkpoint is loaded into a widened model: its mHC parameters are then missing by design
_loads_a_base: ContextVar[bool] = ContextVar("loads_a_base", default=False)


class MHCPreTrainedModel(PreTrainedModel):
    """What all widened models share: construction by family, and the start of the mHC parameters."""

    _auto_class_of_kind: Any = None

    def __new__(cls, config: MHCConfig | None = None, *args: Any, **kwargs: Any) -> Any:
        # a configuration that does not fit is refused before the family builds a layer of it; copies come without one
        if isinstance(config, MHCConfig):
            check_fits(config)
        return super().__new__(cls._family_class(config) if cls._is_common_base() else cls)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, for a widened checkpoint of any supported family.

        Raises:
            ValueError: the checkpoint is not widened, or `distributed_config` asks for transformers' pipeline.
        """
        _check_distributed(kwargs.get("distributed_config"))
        if not cls._is_common_base():
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config = kwargs.get("config") or _load_config(pretrained_model_name_or_path, kwargs)
        cls._family_class(config)
        return cls._auto_class_of_kind.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HyperConnection):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def post_init(self) -> None:
        sites = {
            name.rpartition(".")[2] for name, module in self.named_modules() if isinstance(module, HyperConnection)
        }
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *sites}
        super().post_init()
        if _loads_a_base.get():
            by_design = {rf"\.{site}\." for site in SITE_NAMES}
            self._keys_to_ignore_on_load_missing = set(self._keys_to_ignore_on_load_missing or ()) | by_design

    @classmethod
    def is_custom_code(cls) -> bool:
        # of custom code transformers supposes that it overwrites loaded weights, and leaves out initialisations that
        # a family needs, such as Falcon-H1's multipliers, which no checkpoint holds
        return False

    @classmethod
    def _is_common_base(cls) -> bool:
        # they alone say which Auto class returns them
        return "_auto_class_of_kind" in vars(cls)

    @classmethod
    def _family_class(cls, config: Any) -> type[PreTrainedModel]:
        if not isinstance(config, MHCConfig) or config.base_model_type is None:
            raise ValueError(
                f"`config` of {cls.__name__} must be a widened configuration with a `base_model_type`, got "
                f"{type(config).__name__}. Make one with MHCConfig.from_base(config), or widen a pretrained model with "
                "MHCForCausalLM.from_base(model_or_path)."
            )
        return cls._auto_class_of_kind._model_mapping[type(config)]


class MHCModel(MHCPreTrainedModel):
    """The decoder without a head. It returns what its base returns, hidden states [B, S, C] included."""

    _auto_class_of_kind = AutoModel

    def post_init(self) -> None:
        # the family's constructor calls this last, when its layers stand
        if not any(isinstance(layer, MHCDecoderLayer) for layer in layers_of(self)):
            widen_layers(self)
        super().post_init()


class MHCForCausalLM(MHCPreTrainedModel):
    """The decoder with its language modelling head; generates, caches, compiles, shards and saves as its base does."""

    _auto_class_of_kind = AutoModelForCausalLM

    def post_init(self) -> None:
        # the family's constructor has built its own plain model: give it our class, then let it widen itself
        widened_class: Any = AutoModel._model_mapping[type(self.config)]
        _, plain_class = widened_class.__bases__
        # by class: the prefix of some families names what holds the decoder in their multimodal models
        base: Any = next(module for module in self.children() if isinstance(module, plain_class))
        if not isinstance(base, MHCModel):
            adopt_class(base, widened_class)
            base.post_init()
        super().post_init()

    @classmethod
    def from_base(
        cls,
        model_or_path: PreTrainedModel | str | PathLike,
        hc_mult: int = 4,
        start: str | None = None,
        *,
        hc: dict[str, Any] | None = None,
        **from_pretrained_kwargs: Any,
    ) -> Any:
        """Widen a pretrained decoder in memory into `hc_mult` residual streams, without changing its function.

        Args:
            model_or_path: a `...ForCausalLM` of a supported family, whose parameter tensors the result shares (pass
                `copy.deepcopy(model)` to keep it apart); or a folder or Hub id to load it from.
            hc_mult: n, the number of residual streams, >= 2.
            start: "orthogonal" (n >= 3) or "copies"; None takes the first that n allows. See docs/math.md.
            hc: further `hc_*` fields of `MHCConfig`.
            from_pretrained_kwargs: passed to `from_pretrained` (dtype, device_map, revision, token, ...); with a path
                only.
        Returns:
            The widened model, in the mode (train or eval) of the base; one that was loaded is in eval mode.
        Raises:
            ValueError: the family is not supported or already widened, or an argument is out of range.
        """
        hc = {"hc_mult": hc_mult, "hc_start": start or _checked_default_start(hc_mult)} | (hc or {})
        if hc["hc_start"] == "paper":
            raise ValueError(
                '`start="paper"` is for training from scratch and would change the function of a pretrained model. '
                'Take "orthogonal" or "copies".'
            )
        if isinstance(model_or_path, PreTrainedModel):
            if from_pretrained_kwargs:
                raise ValueError(
                    f"{', '.join(sorted(from_pretrained_kwargs))} can be given with a path only, and "
                    f"`model_or_path` is a {type(model_or_path).__name__}. Set them on the model before you widen it."
                )
            return _widen_in_memory(model_or_path, MHCConfig.from_base(model_or_path.config, **hc))
        config = MHCConfig.from_base(_load_config(model_or_path, from_pretrained_kwargs), **hc)
        token = _loads_a_base.set(True)
        try:
            return cls._family_class(config).from_pretrained(model_or_path, config=config, **from_pretrained_kwargs)
        finally:
            _loads_a_base.reset(token)


class MHCForSequenceClassification(MHCPreTrainedModel):
    """The decoder with a classification head on its last token."""

    _auto_class_of_kind = AutoModelForSequenceClassification


class MHCForTokenClassification(MHCPreTrainedModel):
    """The decoder with a classification head on every token."""

    _auto_class_of_kind = AutoModelForTokenClassification


class MHCForQuestionAnswering(MHCPreTrainedModel):
    """The decoder with a head for the start and the end of an answer."""

    _auto_class_of_kind = AutoModelForQuestionAnswering
    # not the head's own, which look for the name that most families have
    get_input_embeddings = PreTrainedModel.get_input_embeddings
    set_input_embeddings = PreTrainedModel.set_input_embeddings


def _widen_in_memory(model: PreTrainedModel, config: MHCConfig) -> PreTrainedModel:
    """A widened model on the tensors of `model`; only the mHC parameters are new."""
    family = MHCForCausalLM._family_class(config)
    _, base_class, _ = family.__bases__
    if not isinstance(model, base_class):
        raise ValueError(
            f"`model_or_path` must be a {base_class.__name__} (or a path to one), got a {type(model).__name__}."
        )
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        raise ValueError(
            f"`model_or_path` is quantised ({quantizer.quantization_config.quant_method}), and its modules are not "
            "those that a widened model is made of. Widen it as it loads: MHCForCausalLM.from_base(path, "
            "quantization_config=...)."
        )
    with torch.device("meta"):
        widened = family(config)
    missing, unexpected = widened.load_state_dict(model.state_dict(), assign=True, strict=False)
    strange = [*unexpected, *(name for name in missing if not any(f".{site}." in name for site in SITE_NAMES))]
    if strange:
        raise ValueError(
            f"`model_or_path` is not a {base_class.__name__} as it was made: they differ in {strange[0]} and "
            f"{len(strange) - 1} others. Merge or unload adapters, and undo other changes of its modules, first."
        )
    # buffers that are not saved, such as rotary frequencies, are not in the state dict
    for name, buffer in model.named_buffers():
        owner_name, _, buffer_name = name.rpartition(".")
        widened.get_submodule(owner_name)._buffers[buffer_name] = buffer
    for name, module in widened.named_modules():
        if isinstance(module, HyperConnection):
            base_layer = model.get_submodule(name.rpartition(".")[0])
            module.to_empty(device=next(base_layer.parameters()).device)
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        widened.get_parameter(name).requires_grad_(parameter.requires_grad)
    widened.tie_weights()
    widened.generation_config = copy.deepcopy(model.generation_config)
    widened.name_or_path = model.name_or_path
    return widened.train(model.training)


def _load_config(path: Any, from_pretrained_kwargs: dict[str, Any]) -> Any:
    """The configuration that `from_pretrained` with these arguments would find."""
    where = {name: from_pretrained_kwargs[name] for name in _HUB_ARGUMENTS if name in from_pretrained_kwargs}
    return AutoConfig.from_pretrained(path, **where)


def _check_distributed(distributed_config: Any) -> None:
    is_dict = isinstance(distributed_config, dict)
    pp_size = distributed_config.get("pp_size") if is_dict else getattr(distributed_config, "pp_size", None)
    if pp_size is not None and pp_size > 1:
        raise ValueError(
            f"`distributed_config` must not have a `pp_size` above 1 for a widened model, got {pp_size}: transformers' "
            "pipeline passes hidden states [B, S, C] between ranks, and these are n streams [B, S, n*C]. Load it "
            "without, and give it to mhc_hf.training.TrainingPipeline."
        )


def _checked_default_start(hc_mult: Any) -> str:
    # a bad `hc_mult` is named by the configuration, not by a comparison here
    return default_start(hc_mult) if isinstance(hc_mult, int) else "copies"


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

on_new_family.append(
    partial(
        register_family,
        mixins=Mixins(
            MHCPreTrainedModel,
            MHCModel,
            MHCForCausalLM,
            {
                AutoModelForSequenceClassification: MHCForSequenceClassification,
                AutoModelForTokenClassification: MHCForTokenClassification,
                AutoModelForQuestionAnswering: MHCForQuestionAnswering,
            },
        ),
    )
)
