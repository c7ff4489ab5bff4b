"""mhc_hf: Manifold-Constrained Hyper-Connections (arXiv 2512.24880) for Hugging Face transformers.

Importing it registers the widened models with the Auto classes.
"""

from .conversion import convert_checkpoint, verify_conversion
from .modeling import (
    HyperConnection,
    MHCConfig,
    MHCForCausalLM,
    MHCForQuestionAnswering,
    MHCForSequenceClassification,
    MHCForTokenClassification,
    MHCModel,
)

__version__ = "0.1.0"

__all__ = [
    "HyperConnection",
    "MHCConfig",
    "MHCForCausalLM",
    "MHCForQuestionAnswering",
    "MHCForSequenceClassification",
    "MHCForTokenClassification",
    "MHCModel",
    "convert_checkpoint",
    "verify_conversion",
]
