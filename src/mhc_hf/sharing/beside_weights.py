"""What only the code beside weights does: transformers finds its classes by name, and saves it with the model again."""

from typing import Any

from ..modeling.configuration_mhc import MHCConfig, on_new_family
from ..modeling.configuration_mhc import __getattr__ as find_config_class
from ..modeling.families import __getattr__ as find_model_class


def __getattr__(name: str) -> Any:
    """Classes of families by name, as `auto_map` in config.json and pickles have them."""
    return find_config_class(name) if name.endswith("Config") else find_model_class(name)


def _let_code_be_saved(config_class: type[MHCConfig]) -> None:
    # a configuration that is registered so takes the file it is from along, wherever it or its model is saved
    config_class.register_for_auto_class()


on_new_family.append(_let_code_be_saved)
