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
from .verdict import VerificationReport
from .verify import verify_conversion

__all__ = [
    "ConversionError",
    "ConversionReport",
    "DamagedCheckpoint",
    "HubUnreachable",
    "NotEnoughSpace",
    "UnusableOutput",
    "UnusableSource",
    "VerificationReport",
    "convert_checkpoint",
    "verify_conversion",
]
