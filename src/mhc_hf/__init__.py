"""mhc_hf: Manifold-Constrained Hyper-Connections (arXiv 2512.24880) for Hugging Face transformers.

Importing it registers the widened models with the Auto classes.
"""

from typing import TYPE_CHECKING, Any

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
from .sharing import write_modeling_code

if TYPE_CHECKING:
    from .training import StreamMonitorCallback, mhc_param_groups

__version__ = "0.1.0"

__all__ = [
    "HyperConnection",
    "MHCConfig",
    "MHCForCausalLM",
    "MHCForQuestionAnswering",
    "MHCForSequenceClassification",
    "MHCForTokenClassification",
    "MHCModel",
    "StreamMonitorCallback",
    "convert_checkpoint",
    "mhc_param_groups",
    "verify_conversion",
    "write_modeling_code",
]


def __getattr__(name: str) -> Any:
    # training needs accelerate and peft, which those who only load a model may not have
    if name in ("StreamMonitorCallback", "mhc_param_groups"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
