"""Classes made per family on demand, and their registration with transformers.

`MHCLlamaForCausalLM(MHCForCausalLM, LlamaForCausalLM, GenerationMixin)` and its like: the family's own forward, caches,
heads and parallel plans, with hyper-connections put in as the last step of construction. All that has to be said to
transformers about a class from outside is said here.
"""

import types
from dataclasses import dataclass
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_mhc import MHCConfig, config_class_for, family_class_name
from .layer import MHCDecoderLayer
from .sublayers import FAMILIES, SITE_NAMES, Form

HEADS = {
    AutoModelForSequenceClassification: GenericForSequenceClassification,
    AutoModelForTokenClassification: GenericForTokenClassification,
    AutoModelForQuestionAnswering: GenericForQuestionAnswering,
}


@dataclass(frozen=True)
class Mixins:
    """The classes of `modeling_mhc` that every family's classes derive from, by the Auto class that returns them."""

    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    heads: dict[Any, type[PreTrainedModel]]


def supported_families() -> list[str]:
    """Model types that can be widened, in alphabetical order."""
    return sorted(FAMILIES)


def form_of(base_model_type: str) -> Form:
    """What the branches of a family's decoder layer are made of.

    Raises:
        ValueError: the family is not supported.
    """
    if base_model_type not in FAMILIES:
        raise ValueError(
            f"`base_model_type={base_model_type!r}` is not supported: its decoder layer has not been checked against "
            f"hyper-connections, and a guess could give wrong answers. Supported: {', '.join(supported_families())}."
        )
    return FAMILIES[base_model_type]


def widen_layers(model: PreTrainedModel) -> None:
    """Replace the decoder layers of a family's base model by `MHCDecoderLayer`s that adopt them, in place."""
    config: Any = model.config
    layers: Any = model.layers
    form = form_of(config.base_model_type)
    for index, layer in enumerate(layers):
        layers[index] = MHCDecoderLayer(
            layer, config, form, index * len(form), widens=index == 0, collapses=index == len(layers) - 1
        )


def register_family(config_class: type[MHCConfig], mixins: Mixins) -> None:
    """Make the classes of a family and register them with the Auto classes.

    Raises:
        ValueError: the family is not supported.
    """
    base_model_type: Any = config_class.base_model_type
    form_of(base_model_type)
    base_config = config_class.__bases__[0]
    base_model: Any = MODEL_MAPPING[base_config]
    base_causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    stem = config_class.__name__.removesuffix("Config")

    model = _make_class(f"{stem}Model", (mixins.model, base_model), config_class, base_model, base_model)
    AutoModel.register(config_class, model)
    causal_lm = _make_class(
        f"{stem}ForCausalLM",
        (mixins.causal_lm, base_causal_lm, GenerationMixin),
        config_class,
        base_causal_lm,
        base_model,
    )
    AutoModelForCausalLM.register(config_class, causal_lm)

    pretrained = next(base for base in base_model.__mro__ if base.__name__.endswith("PreTrainedModel"))
    for auto_class, generic in HEADS.items():
        name = stem + generic.__name__.removeprefix("Generic")
        head = _make_class(name, (mixins.heads[auto_class], generic, pretrained), config_class, pretrained, base_model)
        auto_class.register(config_class, head)

    # transformers skips the weight conversions of classes from outside unless they are registered by name
    for base_name, name in [
        (base_model_type, model.__name__),
        (base_model_type, causal_lm.__name__),
        (base_model.__name__, model.__name__),
        (base_causal_lm.__name__, causal_lm.__name__),
    ]:
        conversions = get_checkpoint_conversion_mapping(base_name)
        if conversions is not None:
            register_checkpoint_conversion_mapping(name, conversions, overwrite=True)


def _make_class(
    name: str, bases: tuple[type, ...], config_class: type[MHCConfig], base: Any, base_model: Any
) -> type[PreTrainedModel]:
    """A family's class. `base` is the class whose declarations it inherits, `base_model` the family's plain model."""
    recorded = dict(getattr(base, "_can_record_outputs", None) or {})
    if "hidden_states" in recorded:
        recorder = recorded["hidden_states"]
        recorded["hidden_states"] = (
            OutputRecorder(**(vars(recorder) | {"target_class": MHCDecoderLayer}))
            if isinstance(recorder, OutputRecorder)
            else MHCDecoderLayer
        )
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "config_class": config_class,
        "_can_record_outputs": recorded,
        "_no_split_modules": [*(base._no_split_modules or []), MHCDecoderLayer.__name__],
        "_keep_in_fp32_modules_strict": [*(base._keep_in_fp32_modules_strict or []), *SITE_NAMES],
        # both are found by reading the source of the class's module, which here is this file
        "_can_set_attn_implementation_cached_value": base_model._can_set_attn_implementation(),
        "_can_set_experts_implementation_cached_value": base_model._can_set_experts_implementation(),
    }
    made = types.new_class(name, bases, {}, lambda body: body.update(namespace))
    globals()[name] = made
    return made


def __getattr__(name: str) -> type:
    """Family classes by name: pickles and spawned processes look for them before anyone has asked for the family."""
    for base_model_type in FAMILIES:
        stem = family_class_name(base_model_type).removesuffix("Config")
        if name.startswith((f"{stem}Model", f"{stem}For")):
            config_class_for(base_model_type)
            if name in globals():
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
