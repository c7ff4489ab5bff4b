"""Seeing the streams: numbers while a model runs, and reports of what its maps do with a text."""

from .measure import StreamMeasurement, measure_streams
from .problems import find_problems
from .recording import Recording, record_streams
from .report import InspectionReport, inspect_streams
from .sites import InspectionError

__all__ = [
    "InspectionError",
    "InspectionReport",
    "Recording",
    "StreamMeasurement",
    "find_problems",
    "inspect_streams",
    "measure_streams",
    "record_streams",
]
