"""Weights written as safetensors, one tensor in memory at a time.

safetensors' own writer wants every tensor of a file at once, 5 GB for a usual shard, and writes out the zeros of `phi`;
here the header comes from the shapes alone, and a tensor of zeros becomes a hole. The file is byte for byte what
`safetensors.torch.save_file` makes of the same tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from .shard import DTYPE_BITS, DTYPE_NAMES, Shard, TensorEntry, damaged, load_pickled

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# what `dtype` casts; narrower floats are a quantizer's, and only it knows what they mean
_CAST = ("F64", "F32", "F16", "BF16")


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], load: Callable[[str], torch.Tensor]
) -> Shard:
    """Write a new file at `path` and flush it to the disk.

    Args:
        tensors: dtype and shape by name.
        load: gives the values of one tensor, on the CPU; called once a name, in the order of the file.
    """
    entries, position = {}, 0
    # widest first, so that every tensor is aligned to its own element size
    for name in sorted(tensors, key=lambda name: (-DTYPE_BITS[DTYPE_NAMES[tensors[name][0]]], name)):
        dtype, shape = tensors[name]
        entry = TensorEntry(DTYPE_NAMES[dtype], tuple(shape), position, position)
        position += entry.nbytes
        entries[name] = TensorEntry(entry.dtype, entry.shape, entry.start, position)
    with path.open("xb") as file:
        file.write(_encode_header(entries))
        start = file.tell()
        for name, entry in entries.items():
            tensor = load(name)
            if DTYPE_NAMES[tensor.dtype] != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise RuntimeError(
                    f"{name} changed while it was written: {tensor.dtype} {tuple(tensor.shape)}, {entry}"
                )
            # one element seen at full size, as a phi of zeros is, is looked at once
            seen = tensor.flatten()[:1] if not any(tensor.stride()) else tensor
            if _bytes_of(seen).any():
                file.seek(start + entry.start)
                file.write(_bytes_of(tensor).numpy().data)
        file.truncate(start + position)
    return Shard(path.name, path, start + position, entries)


def rewrite_shard(
    shard: Shard, path: Path, dtype: torch.dtype | None, advance: Callable[[int], object] = lambda count: None
) -> Shard:
    """Write the tensors of `shard` to `path` under their own names, floating ones in `dtype` if one is given.

    `advance` hears of every tensor's bytes.
    """

    def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tensor = tensor.to(dtype)
        advance(tensor.nbytes)
        return tensor

    plan = {name: (cast_dtype(shard, name, dtype), entry.shape) for name, entry in shard.tensors.items()}
    if shard.pickled:
        state = load_pickled(shard.path)
        return write_safetensors(path, plan, lambda name: cast(state[name], plan[name][0]))
    with safe_open(shard.path, framework="pt") as file:
        return write_safetensors(path, plan, lambda name: cast(file.get_tensor(name), plan[name][0]))


def must_rewrite(shard: Shard, dtype: torch.dtype | None) -> bool:
    """Whether the file cannot go over as it is: it is pickled, or `dtype` changes a tensor of it."""
    if shard.pickled or dtype is None:
        return shard.pickled
    return any(entry.dtype in _CAST and entry.dtype != DTYPE_NAMES[dtype] for entry in shard.tensors.values())


def tensor_bytes(shard: Shard, dtype: torch.dtype | None) -> int:
    """Bytes of the tensors of `shard` after the conversion, rewritten or not."""
    if not must_rewrite(shard, dtype):
        return sum(entry.nbytes for entry in shard.tensors.values())
    return sum(
        entry.numel * DTYPE_BITS[DTYPE_NAMES[cast_dtype(shard, name, dtype)]] // 8
        for name, entry in shard.tensors.items()
    )


def cast_dtype(shard: Shard, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor of `shard` gets when the conversion casts to `dtype`; its own if that is None."""
    stored = shard.tensors[name].dtype
    if dtype is not None and stored in _CAST:
        return dtype
    if stored not in _TORCH_DTYPES:
        raise damaged(shard.path, f"{name!r} is {stored}, which torch has no type for, so the file cannot be rewritten")
    return _TORCH_DTYPES[stored]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # strides spelled out: a dimension of length 1 may carry any, and then cannot be seen as bytes
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _encode_header(entries: Mapping[str, TensorEntry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, entry in entries.items():
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.stop]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned to eight bytes
    return struct.pack("<Q", len(text)) + text
