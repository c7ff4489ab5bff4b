"""Classes made per family on demand, and their registration with transformers.

`MHCLlamaForCausalLM(MHCForCausalLM, LlamaForCausalLM, GenerationMixin)` and its like: the family's own forward, caches,
heads and parallel plans, with hyper-connections put in as the last step of construction. All that has to be said to
transformers about a class from outside is said here.
"""

import sys
import types
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from transformers import (
    CONFIG_MAPPING,
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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, OutputRecorder

from .configuration_mhc import MHCConfig, config_class_for, conversion_name, on_from_base
from .hidden_states import give_hidden_states_of_the_base
from .layer import MHCDecoderLayer
from .sublayers import FAMILIES, REFUSED, Family

HEADS = {
    AutoModelForSequenceClassification: GenericForSequenceClassification,
    AutoModelForTokenClassification: GenericForTokenClassification,
    AutoModelForQuestionAnswering: GenericForQuestionAnswering,
}


@dataclass(frozen=True)
class Mixins:
    """The classes of `modeling_mhc` that every family's classes derive from, by the Auto class that returns them."""

    pretrained: type[PreTrainedModel]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    heads: dict[Any, type[PreTrainedModel]]


def supported_families() -> list[str]:
    """Model types that can be widened with the installed transformers, in alphabetical order."""
    return sorted(model_type for model_type in FAMILIES if model_type in CONFIG_MAPPING_NAMES)


def family_of(base_model_type: str) -> Family:
    """The row of the table.

    Raises:
        ValueError: the family is not supported; the message says why.
    """
    if base_model_type in FAMILIES:
        return FAMILIES[base_model_type]
    if base_model_type in REFUSED:
        raise ValueError(
            f"`base_model_type={base_model_type!r}` cannot be widened: {REFUSED[base_model_type]}. "
            "Hyper-connections take the place of additions x + F(x). See docs/families.md for the families that fit."
        )
    parts: Any = CONFIG_MAPPING[base_model_type].sub_configs if base_model_type in CONFIG_MAPPING else {}
    decoder = getattr(parts.get("text_config"), "model_type", None)
    if decoder in FAMILIES:
        raise ValueError(
            f"`base_model_type={base_model_type!r}` is a composite one: it holds a {decoder} decoder beside others, "
            "and only a decoder alone can be widened. Save that first, from the `...ForCausalLM` that has it."
        )
    raise ValueError(
        f"`base_model_type={base_model_type!r}` is not supported: its decoder layer has not been checked against "
        f"hyper-connections, and a guess could give wrong answers. Supported: {', '.join(supported_families())}."
    )


def check_fits(config: MHCConfig) -> None:
    """Refuse what a family's configuration may ask for and hyper-connections cannot give.

    Raises:
        ValueError: a field of `config` has a value that does not fit.
    """
    family = family_of(str(config.base_model_type))
    for name, fitting, meaning in family.refuse:
        value = getattr(config, name, fitting[0])
        if value not in fitting:
            raise ValueError(
                f"`{name}={value!r}` of this {config.base_model_type} configuration cannot be widened: {meaning}. "
                f"Only `{name}={fitting[0]!r}` can."
            )


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Where a family's base model keeps its decoder layers."""
    config: Any = model.config
    layers: Any = model.get_submodule(family_of(config.base_model_type).layers)
    return layers


def widen_layers(model: PreTrainedModel) -> None:
    """Replace the decoder layers of a family's base model by `MHCDecoderLayer`s that adopt them, in place.

    Raises:
        ValueError: the installed transformers has changed the family's layer.
    """
    config: Any = model.config
    family = family_of(config.base_model_type)
    layers: Any = layers_of(model)
    site, last = 0, len(layers) - 1
    for index, layer in enumerate(layers):
        form = family.form(config, index)
        layers[index] = MHCDecoderLayer(layer, config, form, site, widens=index == 0, collapses=index == last)
        site += len(form.sites)
    for layer, following in pairwise(layers):
        layer.hand_on_to(following)
    if family.inner is not None:
        # the layers' owner makes the parameters of its own sub-modules, and captures outputs, by its own class
        adopt_class(model.get_submodule(family.layers.rpartition(".")[0]), globals()[f"MHC{family.inner}"])


def adopt_class(module: Any, widened_class: type) -> None:
    """Give a plain model that its family's constructor has built the widened class, in place."""
    module.__class__ = widened_class
    # outputs are captured by class, and the class was another when the model was built. The registry's keys are the
    # classes' names; only since 5.23 does it take the model and find the name itself
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(widened_class), module._can_record_outputs)


def register_family(config_class: type[MHCConfig], mixins: Mixins) -> None:
    """Make the classes of a family and register them with the Auto classes.

    Raises:
        ValueError: the family is not supported.
    """
    base_model_type: Any = config_class.base_model_type
    family = family_of(base_model_type)
    base_config = config_class.__bases__[0]
    base_model: Any = MODEL_MAPPING[base_config]
    base_causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    stem = config_class.__name__.removesuffix("Config")

    model: Any = _make_class(f"{stem}Model", (mixins.model, base_model), config_class, base_model, base_model)
    model.forward = give_hidden_states_of_the_base(base_model.forward)
    AutoModel.register(config_class, model)
    causal_lm = _make_class(
        f"{stem}ForCausalLM",
        (mixins.causal_lm, base_causal_lm, GenerationMixin),
        config_class,
        base_causal_lm,
        base_model,
    )
    AutoModelForCausalLM.register(config_class, causal_lm)

    if family.inner is not None:
        inner = getattr(sys.modules[base_model.__module__], family.inner)
        _make_class(f"MHC{family.inner}", (mixins.pretrained, inner), config_class, inner, base_model)

    pretrained = next(base for base in base_model.__mro__ if base.__name__.endswith("PreTrainedModel"))
    for auto_class, generic in HEADS.items():
        name = stem + generic.__name__.removeprefix("Generic")
        head = _make_class(name, (mixins.heads[auto_class], generic, pretrained), config_class, pretrained, base_model)
        # it keeps the decoder under the name that checkpoints of the family have for it
        head.base_model_prefix = base_model.base_model_prefix
        auto_class.register(config_class, head)

    # under the names that transformers will look for, what it has under those of the base
    for base_name, name in [
        (base_model_type, conversion_name(base_model_type)),
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
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "config_class": config_class,
        "_can_record_outputs": _recorded_outputs(base),
        "_no_split_modules": [*(base._no_split_modules or []), MHCDecoderLayer.__name__],
        # both are found by reading the source of the class's module, which here is this file
        "_can_set_attn_implementation_cached_value": base_model._can_set_attn_implementation(),
        "_can_set_experts_implementation_cached_value": base_model._can_set_experts_implementation(),
    }
    made = types.new_class(name, bases, {}, lambda body: body.update(namespace))
    globals()[name] = made
    return made


def _recorded_outputs(base: Any) -> dict[str, Any]:
    """What `base` declares that outputs are captured from, with our decoder layer in place of the family's."""
    recorded = dict(getattr(base, "_can_record_outputs", None) or {})
    if "hidden_states" in recorded:
        recorder = recorded["hidden_states"]
        recorded["hidden_states"] = (
            OutputRecorder(**(vars(recorder) | {"target_class": MHCDecoderLayer}))
            if isinstance(recorder, OutputRecorder)
            else MHCDecoderLayer
        )
    return recorded


def __getattr__(name: str) -> type:
    """Family classes by name: pickles and spawned processes look for them before anyone has asked for the family."""
    for base_model_type in supported_families():
        # by the name of the configuration's class: to look at the class itself would import every family
        stem = f"MHC{CONFIG_MAPPING_NAMES[base_model_type].removesuffix('Config')}"
        if name.startswith((f"{stem}Model", f"{stem}For", f"{stem}Decoder")):
            config_class_for(base_model_type)
            if name in globals():
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


on_from_base.append(check_fits)
