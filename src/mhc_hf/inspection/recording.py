"""Listening to a model's hyper-connections while it runs: what each site's maps and streams were.

Shapes: B batch, S sequence, T tokens looked at, n streams, C channels of one stream.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import statistics
from .sites import compute_maps, get_parameters, require_sites, shorten_name, split_streams

# numbers of a block of streams in float64: 32 MiB, so that looking never takes the memory that training needs
_BLOCK_NUMBERS = 2**22


@dataclass
class SiteReading:
    """What one site did in one forward pass. Tensors are float64 and stay on the model's device.

    Attributes:
        name: e.g. "layers.3.attn_hc".
        site: the module.
        h_pre, h_post: [T, n].
        h_res: [T, n, n], into row from column.
        alpha: [3].
        spread: scalar, |x - mean over streams| / |x| over all tokens of the streams that the site gets.
        cosines: [n, n], between streams, mean over tokens.
        effective_streams: scalar, mean over tokens.
        stream_rms: [n].
        streams_finite, maps_finite: scalars of bool.
    """

    name: str
    site: nn.Module
    h_pre: Tensor
    h_post: Tensor
    h_res: Tensor
    alpha: Tensor
    spread: Tensor
    cosines: Tensor
    effective_streams: Tensor
    stream_rms: Tensor
    streams_finite: Tensor
    maps_finite: Tensor


@dataclass
class Recording:
    """The readings of one forward pass, in the order the sites ran.

    Attributes:
        by_name: a `SiteReading` for each site that ran.
    """

    by_name: dict[str, SiteReading] = field(default_factory=dict)

    @property
    def readings(self) -> list[SiteReading]:
        return list(self.by_name.values())


@contextmanager
def record_streams(model: nn.Module, max_sequences: int | None = None) -> Iterator[Recording]:
    """Record the first forward pass that `model` makes inside the `with` block.

    Runs of a site after its first, such as those that gradient checkpointing makes again in backward or the other
    micro-batches of a step, are let pass. The model's own modules compute the maps, inside its own forward, where
    FSDP2 has gathered their parameters. Nothing is left on the model afterwards.

    Args:
        model: a model with hyper-connections, bare or wrapped (PEFT, DDP, FSDP2). Where it is called with a 2-D
            `attention_mask`, masked tokens are left out.
        max_sequences: look at so many sequences of the batch at most; None for all.
    Yields:
        A `Recording`, filled while the model runs.
    Raises:
        InspectionError: the model has no hyper-connections.
    """
    recording = Recording()
    masks: list[Tensor | None] = []
    with ExitStack() as hooks:
        for name, site in require_sites(model).items():
            hook = partial(_record_site, recording, masks, max_sequences, shorten_name(name))
            hooks.callback(site.register_forward_pre_hook(hook).remove)
        hooks.callback(model.register_forward_pre_hook(partial(_note_mask, masks), with_kwargs=True).remove)
        yield recording


def _note_mask(masks: list[Tensor | None], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    masks[:] = [mask if isinstance(mask, Tensor) and mask.dim() == 2 else None]


@torch.no_grad()
def _record_site(
    recording: Recording,
    masks: list[Tensor | None],
    max_sequences: int | None,
    name: str,
    site: nn.Module,
    args: tuple[Any, ...],
) -> None:
    if name in recording.by_name:
        return
    hidden_states = args[0].detach()[:max_sequences]
    mask = masks[0][:max_sequences].bool() if masks and masks[0] is not None else None
    if mask is not None and mask.shape != hidden_states.shape[:2]:
        # cached decoding: the mask is as long as the cache
        mask = None
    # one reading a site: what is computed in float32 by the model is compared and multiplied in float64
    dtype = torch.float32 if hidden_states.device.type == "mps" else torch.float64

    def select(h: Tensor) -> Tensor:
        return (h.flatten(0, 1) if mask is None else h[mask.to(h.device)]).to(dtype)

    h_pre, h_post, h_res = (select(h) for h in compute_maps(site, hidden_states))
    x = split_streams(site, hidden_states)
    x = x.flatten(0, 1) if mask is None else x[mask.to(x.device)]
    recording.by_name[name] = SiteReading(
        name=name,
        site=site,
        h_pre=h_pre,
        h_post=h_post,
        h_res=h_res,
        alpha=get_parameters(site)["alpha"].detach().to(dtype, copy=True),
        maps_finite=torch.stack([h.isfinite().all() for h in (h_pre, h_post, h_res)]).all(),
        **_describe_streams(x, dtype),
    )


def _describe_streams(x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """x [T, n, C], a block of tokens at a time."""
    num_tokens, n, num_channels = x.shape
    step = max(1, _BLOCK_NUMBERS // (n * num_channels))
    deviation, effective = x.new_zeros(2, dtype=dtype)
    cosines, squares = x.new_zeros(n, n, dtype=dtype), x.new_zeros(n, dtype=dtype)
    for start in range(0, num_tokens, step):
        block = x[start : start + step].to(dtype)
        gram = statistics.gram(block)
        deviation += statistics.squared_deviations(block).sum()
        squares += gram.diagonal(dim1=-2, dim2=-1).sum(0)
        cosines += statistics.cosines(gram).sum(0)
        effective += statistics.effective_streams(gram).sum()
    norm = squares.sum()
    return {
        "spread": torch.where(norm == 0, 0, (deviation / norm).sqrt()),
        "cosines": cosines / num_tokens,
        "effective_streams": effective / num_tokens,
        "stream_rms": (squares / (num_tokens * num_channels)).sqrt(),
        "streams_finite": norm.isfinite(),
    }
