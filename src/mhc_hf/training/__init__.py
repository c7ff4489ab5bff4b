"""Fine-tuning widened models with Trainer, PEFT and PyTorch's own engines, on one device or many."""

from ..inspection import measure_streams
from .adapters import mhc_lora_config
from .monitor import StreamMonitorCallback
from .param_groups import mhc_param_groups
from .pipeline import TrainingPipeline
from .resume import last_complete_checkpoint
from .sharding import shard_widened_model
from .stages import split_into_stages

__all__ = [
    "StreamMonitorCallback",
    "TrainingPipeline",
    "last_complete_checkpoint",
    "measure_streams",
    "mhc_lora_config",
    "mhc_param_groups",
    "shard_widened_model",
    "split_into_stages",
]
