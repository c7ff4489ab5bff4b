"""The Hugging Face classes of a widened decoder."""

from transformers import AutoConfig

from .configuration_mhc import MHCConfig
from .hyper_connection import HyperConnection
from .modeling_mhc import (
    MHCForCausalLM,
    MHCForQuestionAnswering,
    MHCForSequenceClassification,
    MHCForTokenClassification,
    MHCModel,
)

__all__ = [
    "HyperConnection",
    "MHCConfig",
    "MHCForCausalLM",
    "MHCForQuestionAnswering",
    "MHCForSequenceClassification",
    "MHCForTokenClassification",
    "MHCModel",
]

AutoConfig.register(MHCConfig.model_type, MHCConfig, exist_ok=True)
