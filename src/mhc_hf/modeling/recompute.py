"""What is kept for backward and what is made again (arXiv 2512.24880, Eq. 20).

A site's backward needs the streams that it read, n times the size of a hidden state. They need not be kept: the streams
of a whole block of sites follow from the first ones and from what the branches answered, x' = H_res x + H_post y. So of
each block the first streams are kept, and of each site the branch output and the maps (n*n + n numbers a token). What
the branches keep for themselves is untouched, and nothing heavy is computed twice.

Shapes: B batch, S sequence, n streams, C channels of one stream.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

from ..ops.functional import SiteRead, site_write


class _Latest(threading.local):
    """The streams that a site of this thread has written last, and their block; both live as long as others want."""

    streams: TensorWeakRef | None = None
    version: int = 0
    block: ref[StreamBlock] | None = None

    def matches(self, streams: Tensor) -> bool:
        """Whether `streams` are those, be it by another name: a sharding hook hands on an alias.

        While the tensor lives, nothing else can lie at its address; its version tells what was written in place.
        """
        latest = None if self.streams is None else self.streams()
        return (
            latest is not None
            and latest.data_ptr() == streams.data_ptr()
            and latest.shape == streams.shape
            and self.version == streams._version
        )


_latest = _Latest()


class StreamBlock:
    """Consecutive sites whose streams are made again from the first ones.

    Args:
        first: [B, S, n, C], what the block's first site reads.
    """

    def __init__(self, first: Tensor):
        self._streams: dict[int, Tensor] = {0: first.detach()}
        self._steps: list[tuple[Tensor, SiteRead]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def record(self, branch_out: Tensor, site: SiteRead) -> None:
        """Note what leads from the streams before a site to those after it."""
        maps = SiteRead(site.branch_in.new_empty(0), site.h_post.detach(), site.h_res.detach(), None)
        self._steps.append((branch_out.detach(), maps))

    @torch.no_grad()
    def streams_before(self, index: int) -> Tensor:
        """[B, S, n, C], the streams that site `index` of the block read, the same bits as in forward.

        Backward asks from the last site to the first: the first question makes all of them, each later one drops those
        that are no longer needed.
        """
        for position in range(index):
            if position + 1 not in self._streams:
                self._streams[position + 1] = site_write(self._streams[position], *self._steps[position])
        for position in [position for position in self._streams if position > index]:
            del self._streams[position]
        return self._streams[index]

    @contextmanager
    def keeping_out(self, x: Tensor) -> Iterator[None]:
        """While it lasts, autograd saves a reference into this block in place of `x`, the next site's streams."""
        index = len(self)
        address, numel = x.data_ptr(), x.numel()

        def pack(tensor: Tensor) -> Any:
            if tensor.data_ptr() == address and tensor.numel() == numel:
                return self, index, tensor.shape
            return tensor

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            block, position, shape = packed
            return block.streams_before(position).view(shape)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def find_block(streams: Tensor, x: Tensor, sites_per_block: int) -> StreamBlock:
    """The block that the site which made `streams` belongs to, or a new one where there is none or it is full.

    Where something in between hands on other memory (a pipeline stage, a scale), a block ends.
    """
    block = _latest.block() if _latest.block is not None and _latest.matches(streams) else None
    return block if block is not None and len(block) < sites_per_block else StreamBlock(x)


def hand_on(block: StreamBlock, streams: Tensor) -> Tensor:
    """Let the next site find the block."""
    _latest.streams, _latest.version, _latest.block = TensorWeakRef(streams), streams._version, ref(block)
    return streams


def write_anew(x: Tensor, branch_out: Tensor, site: SiteRead) -> Tensor:
    """`site_write` for torch.compile: its graph is told to make the result again in backward, not to keep it."""
    streams: Tensor = checkpoint(site_write, x, branch_out, site, use_reentrant=False)
    return streams


def default_block_layers(hc_mult: int, num_layers: int) -> int:
    """Layers a block that keep the fewest streams at any time, sqrt(n L / (n + 2)) (Eq. 20), at least 1."""
    return max(1, round(math.sqrt(hc_mult * num_layers / (hc_mult + 2))))
