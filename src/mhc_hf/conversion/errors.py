"""What can be wrong with a conversion. Every one of these is raised before anything is left on disk."""

from __future__ import annotations


class ConversionError(ValueError):
    """Root of the converter's errors; the message names what is wrong and how to mend it."""


class UnusableSource(ConversionError):
    """The source is not a checkpoint that can be widened."""


class HubUnreachable(ConversionError):
    """A Hub id was given, and the Hub did not hand over the files."""


class DamagedCheckpoint(ConversionError):
    """Weights are missing, cut short, or not where the index says."""


class UnusableOutput(ConversionError):
    """The output folder may not be written."""


class NotEnoughSpace(ConversionError):
    """The disk cannot hold what the conversion would write."""
