"""One file of weights: what it holds, read and checked without loading it.

A safetensors file is 8 bytes (length of the header, little endian), a JSON header, and the tensors' bytes end to end;
so a file that was cut short, or written over, shows from its header and its size. A pickled file is mapped, not read.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from .errors import DamagedCheckpoint

# bits of one element, by the names that safetensors writes
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_HEADER_LIMIT = 100_000_000  # safetensors' own


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it; `start` and `stop` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Shard:
    """A file of weights; `name` is what the index calls it."""

    name: str
    path: Path
    size: int
    tensors: dict[str, TensorEntry]
    pickled: bool = False


def read_shard(folder: Path, name: str) -> Shard:
    """Read the header of a safetensors file and check that the file holds what the header promises.

    Raises:
        DamagedCheckpoint: the file is missing, cut short, longer than it should be, or its header makes no sense.
    """
    path = folder / name
    if not path.is_file():
        raise DamagedCheckpoint(f"{name} is missing from {folder}. Download or save the checkpoint again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length < 2 or length > min(_HEADER_LIMIT, size - 8):
            raise damaged(path, f"its {size} bytes are no whole safetensors file")
        header = file.read(length)
    try:
        raw = json.loads(header)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise damaged(path, "its header is not a JSON object")
    raw.pop("__metadata__", None)
    tensors = {key: _read_entry(path, key, entry) for key, entry in raw.items()}
    end = _require_end_to_end(path, tensors)
    if size != 8 + length + end:
        raise damaged(path, f"it has {size} bytes where its header promises {8 + length + end}")
    return Shard(name, path, size, tensors)


def read_pickled_shard(folder: Path, name: str) -> Shard:
    """Like `read_shard`, for a `pytorch_model.bin`."""
    tensors = {}
    for key, tensor in load_pickled(folder / name).items():
        dtype = DTYPE_NAMES.get(tensor.dtype)
        if dtype is None or tensor.layout != torch.strided:
            raise damaged(folder / name, f"{key!r} is {tensor.dtype}, {tensor.layout}, which safetensors cannot hold")
        tensors[key] = TensorEntry(dtype, tuple(tensor.shape), 0, 0)
    return Shard(name, folder / name, (folder / name).stat().st_size, tensors, pickled=True)


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file, mapped where its format allows; nothing in it is executed.

    Raises:
        DamagedCheckpoint: it is cut short, holds more than tensors by name, or would run code.
    """
    try:
        # files older than torch 1.6 are no zip archives and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise damaged(path, f"torch.load(weights_only=True) says: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise damaged(path, "it is not a dict of tensors by name")
    return dict(state)


def damaged(path: Path, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path} is damaged: {what}. Download or save it again.")


def _read_entry(path: Path, name: str, raw: Any) -> TensorEntry:
    try:
        shape, (start, stop) = tuple(raw["shape"]), raw["data_offsets"]
        entry = TensorEntry(raw["dtype"], shape, start, stop)
        fits = (stop - start) * 8 == entry.numel * DTYPE_BITS[entry.dtype]
        sane = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its entry for {name!r} cannot be read ({error!r})") from error
    if not (fits and sane):
        raise damaged(path, f"{name!r} as {entry.dtype} {list(shape)} does not fit its bytes {start} to {stop}")
    return entry


def _require_end_to_end(path: Path, tensors: dict[str, TensorEntry]) -> int:
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise damaged(
                path, f"{name!r} starts at byte {entry.start}, not at {position} where the one before it ends"
            )
        position = entry.stop
    return position
