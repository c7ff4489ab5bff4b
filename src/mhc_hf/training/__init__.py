"""Fine-tuning widened models with Trainer, PEFT and PyTorch's own engines, on one device or many."""

from .adapters import mhc_lora_config
from .param_groups import mhc_param_groups

__all__ = ["mhc_lora_config", "mhc_param_groups"]
