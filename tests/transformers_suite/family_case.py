"""The tests that transformers has of one family, on the family's own classes or on the widened ones.

Collected by pytest in a process of its own, in which `tests` is the package of transformers and not ours:
`test_transformers_suite.py` says how. MHC_SUITE_FAMILY names the family, MHC_SUITE_MODELS says "native" or "widened".
"""

import importlib
import os
import re
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from mhc_hf.modeling import families
from mhc_hf.modeling.configuration_mhc import config_class_for, conversion_name
from mhc_hf.modeling.starts import STARTS
from tests import test_fsdp_mixin, test_modeling_common, test_tensor_parallel_mixin, test_training_mixin

FAMILY = os.environ["MHC_SUITE_FAMILY"]
WIDENED = os.environ["MHC_SUITE_MODELS"] == "widened"

# their own runs do these for a few families only, by name
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

config_class = CONFIG_MAPPING[FAMILY]
package = config_class.__module__.split(".")[-2]
stem = config_class.__name__.removesuffix("Config")
theirs = importlib.import_module(f"tests.models.{package}.test_modeling_{package}")
Tester = getattr(theirs, f"{stem}ModelTester")
Case = getattr(theirs, f"{stem}ModelTest")


def widened_of(value):
    """The widened class in place of one of the family's, in a container too; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(widened_of, value))
    if isinstance(value, dict):
        return {name: widened_of(inner) for name, inner in value.items()}
    if value is config_class:
        return config_class_for(FAMILY)
    if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.config_class is config_class:
        kind = value.__name__.partition("For")[2]
        return getattr(families, f"MHC{stem}For{kind}" if kind else f"MHC{stem}Model")
    return value


if hasattr(Tester, "_verify_and_infer_model_attributes"):
    Tester._verify_and_infer_model_attributes()
tester_classes = {"causal_lm_class": MODEL_FOR_CAUSAL_LM_MAPPING[config_class]}
tester_classes |= {name: getattr(Tester, name) for name in dir(Tester) if name.endswith("_class")}
case_attributes: dict[str, Any] = {
    name: getattr(Case, name) for name in ("all_model_classes", "pipeline_model_mapping")
}

if WIDENED:
    # what to expect of a class, a loss or none and which labels, they look up by its name
    for task in ("", "CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        words = re.sub("(?<=[a-z])(?=[A-Z])", "_", f"For{task}_").upper() if task else ""
        mapping = f"MODEL_{words}MAPPING_NAMES"
        known = getattr(test_modeling_common, mapping)
        name = f"MHC{stem}For{task}" if task else f"MHC{stem}Model"
        setattr(test_modeling_common, mapping, known | {conversion_name(FAMILY): name})
    for name, value in list(vars(theirs).items()):
        setattr(theirs, name, widened_of(value))
    tester_classes = widened_of(tester_classes)
    case_attributes = widened_of(case_attributes)


class FamilyTester(Tester):
    def get_config(self):
        config = super().get_config()
        if WIDENED:
            # what a conversion starts with
            config.hc_start, config.hc_alpha_init = "orthogonal", STARTS["orthogonal"].alpha
        return config


for name, value in tester_classes.items():
    setattr(FamilyTester, name, value)
# older cases name their tester in `setUp`, newer ones in an attribute
setattr(theirs, Tester.__name__, FamilyTester)
case_attributes |= {"model_tester": None, "model_tester_class": FamilyTester, "__module__": __name__}
# it goes by the year in a file's first line
case_attributes["test_can_init_all_missing_weights_before_2023"] = True
mixins = [
    mixin
    for mixin in (
        test_training_mixin.TrainingTesterMixin,
        test_fsdp_mixin.FSDPTesterMixin,
        test_tensor_parallel_mixin.TensorParallelTesterMixin,
    )
    if not issubclass(Case, mixin)
]
TestFamily = type("TestFamily", (Case, *mixins), case_attributes)
# pytest is to collect this one only
del Case
