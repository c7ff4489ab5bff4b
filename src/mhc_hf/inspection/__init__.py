"""Seeing the streams: numbers while a model runs, and reports of what its maps do with a text."""

from .measure import StreamMeasurement, measure_streams
from .recording import Recording, record_streams
from .sites import InspectionError

__all__ = ["InspectionError", "Recording", "StreamMeasurement", "measure_streams", "record_streams"]
