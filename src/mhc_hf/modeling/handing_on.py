"""Projections handed to the first site of a layer by who writes its streams, where kernels run.

That is the last site of the layer before, whose tensor the family's own loop passes on, or in inference the widening of
the hidden states in the layer itself. The projections are values without a gradient (`ops/ahead.py`), and ride on the
streams as an attribute. Where that is lost (another tensor takes its place, an offloading hook, a pipeline stage) or
out of date (somebody has written into the tensor, or the next layer is another one), the site projects by itself: one
launch and n rows more, the same result. A layer that is checkpointed finds them on its input when it is made again.

Shapes: B batch, S sequence, n streams, C channels of one stream.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.functional import (
    Projections,
    SiteRead,
    hands_on,
    joins_ahead,
    site_write,
    site_write_project,
    widen_project,
)
from .branch_norm import is_hooked, is_local

_ATTRIBUTE = "_mhc_projections"


class _Handed(NamedTuple):
    projections: Projections
    # of the tensor that it rides on: hooks that steer a model add to its hidden states in place. And of phi
    versions: tuple[int, int]


def widen_streams(hidden_states: Tensor, hc_mult: int, first_site: nn.Module) -> Tensor:
    """n equal streams, and where it can be done in the same pass the projections of the site that reads them.

    [B, S, C] -> [B, S, n*C]
    """
    phi = _phi_ahead(first_site, hidden_states, hc_mult) if joins_ahead(hidden_states, hc_mult) else None
    if phi is None:
        return hidden_states.repeat(1, 1, hc_mult)
    return _hand_on(*widen_project(hidden_states, hc_mult, phi))


def write_ahead(x: Tensor, branch_out: Tensor, site: SiteRead, next_site: nn.Module) -> Tensor:
    """`site_write`, flat, and where it can be done in the same pass the projections of `next_site`. [B, S, n*C]"""
    # a site that was read without a graph has no link for one
    is_cut = site.link is None and torch.is_grad_enabled() and branch_out.requires_grad
    phi = None if is_cut or not hands_on(x, x.shape[-2]) else _phi_ahead(next_site, x, x.shape[-2])
    if phi is None:
        return site_write(x, branch_out, site).flatten(-2)
    return _hand_on(*site_write_project(x, branch_out, site, phi))


def _phi_ahead(next_site: nn.Module, x: Tensor, n: int) -> Tensor | None:
    """The phi of the site that reads next, where it can be used before its turn. `x` [..., C], n streams of it."""
    # an inference tensor has no version, by which the reader would see that somebody has written into it
    if torch.is_inference_mode_enabled() or is_hooked(next_site):
        return None
    # who shards or offloads it may bring it only at its turn
    phi: Any = next_site.phi
    is_there = phi.shape == ((n + 2) * n, n * x.shape[-1]) and is_local(phi, x) and phi.untyped_storage().nbytes() > 0
    return phi if is_there else None


def _hand_on(x: Tensor, projections: Projections) -> Tensor:
    """The streams, flat, with the projections on them. [B, S, n, C] -> [B, S, n*C]"""
    streams = x.flatten(-2)
    setattr(streams, _ATTRIBUTE, _Handed(projections, (streams._version, projections.phi._version)))
    return streams


def take_projections(streams: Tensor, x: Tensor, phi: Tensor) -> Projections | None:
    """What was handed on with `streams`, if it is for `phi` and still true. `x` [B, S, n, C] are the streams, split."""
    if not hands_on(x, x.shape[-2]):
        return None
    handed: _Handed | None = getattr(streams, _ATTRIBUTE, None)
    if handed is None or handed.projections.phi is not phi or handed.versions != (streams._version, phi._version):
        return None
    return handed.projections
