"""Checkpoints: widening a pretrained one, and verifying the result."""

from .convert import convert_checkpoint
from .errors import (
    ConversionError,
    DamagedCheckpoint,
    HubUnreachable,
    NotEnoughSpace,
    UnusableOutput,
    UnusableSource,
)
from .report import ConversionReport

__all__ = [
    "ConversionError",
    "ConversionReport",
    "DamagedCheckpoint",
    "HubUnreachable",
    "NotEnoughSpace",
    "UnusableOutput",
    "UnusableSource",
    "convert_checkpoint",
]
