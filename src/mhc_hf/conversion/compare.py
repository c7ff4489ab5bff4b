"""Base tensors in two checkpoints compared bit for bit, one tensor in memory at a time."""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch
from safetensors import safe_open

from .checkpoint import Checkpoint
from .shard import Shard, load_pickled
from .writing import cast_dtype


def changed_tensors(base: Checkpoint, converted: Checkpoint, dtype: torch.dtype | None) -> list[str]:
    """Names of base tensors that the converted checkpoint lacks, or holds with other bits.

    Args:
        dtype: what the conversion cast floating-point weights to; None where it kept them.
    """
    changed = []
    where = {name: shard for shard in converted.shards for name in shard.tensors}
    with ExitStack() as stack:
        readers: dict[str, object] = {}
        for shard in base.shards:
            for name in shard.tensors:
                other = where.get(name)
                if other is None:
                    changed.append(name)
                elif not os.path.samefile(shard.path, other.path):
                    ours, theirs = _load(shard, name, readers, stack), _load(other, name, readers, stack)
                    if not _same_bits(ours.to(cast_dtype(shard, name, dtype)), theirs):
                        changed.append(name)
    return changed


def _load(shard: Shard, name: str, readers: dict, stack: ExitStack) -> torch.Tensor:
    key = str(shard.path)
    if key not in readers:
        readers[key] = (
            load_pickled(shard.path) if shard.pickled else stack.enter_context(safe_open(shard.path, framework="pt"))
        )
    return readers[key][name] if shard.pickled else readers[key].get_tensor(name)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # as bytes: NaN equals itself there, and -0 is not 0
    one, other = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)
