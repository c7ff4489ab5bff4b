"""Projections handed from the last site of a layer to the first one of the next, where kernels run without a graph.

The family's own loop passes one tensor from layer to layer, and the projections ride on it as an attribute. Where that
is lost (another tensor takes its place, an offloading hook, a pipeline stage) or out of date (somebody has written into
the tensor, or the next layer is another one), the next site projects by itself: one launch and n rows more, the same
result.

Shapes: B batch, S sequence, n streams, C channels of one stream.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.functional import Projections, SiteRead, can_project_ahead, site_write, site_write_project
from .branch_norm import is_hooked, is_local

_ATTRIBUTE = "_mhc_projections"


class _Handed(NamedTuple):
    projections: Projections
    # of the tensor that it rides on: hooks that steer a model add to its hidden states in place
    version: int


def write_ahead(x: Tensor, branch_out: Tensor, site: SiteRead, next_site: nn.Module) -> Tensor:
    """`site_write`, flat, and where it can be done in the same pass the projections of `next_site`. [B, S, n*C]"""
    phi: Any = next_site.phi
    # an inference tensor has no version, by which the reader would see that somebody has written into it
    if not can_project_ahead(x) or torch.is_inference_mode_enabled() or not _is_there(next_site, phi, x):
        return site_write(x, branch_out, site).flatten(-2)
    x_next, projections = site_write_project(x, branch_out, site, phi)
    streams = x_next.flatten(-2)
    setattr(streams, _ATTRIBUTE, _Handed(projections, streams._version))
    return streams


def _is_there(next_site: nn.Module, phi: Tensor, x: Tensor) -> bool:
    """Whether the next site's phi can be used before its turn: who shards or offloads it may bring it only then."""
    n, num_channels = x.shape[-2:]
    is_whole = phi.shape == ((n + 2) * n, n * num_channels)
    return is_whole and is_local(phi, x) and not is_hooked(next_site) and phi.untyped_storage().nbytes() > 0


def take_projections(streams: Tensor, x: Tensor, phi: Tensor) -> Projections | None:
    """What was handed on with `streams`, if it is for `phi` and still true. `x` [B, S, n, C] are the streams, split."""
    if not can_project_ahead(x):
        return None
    handed: _Handed | None = getattr(streams, _ATTRIBUTE, None)
    if handed is None or handed.projections.phi is not phi or handed.version != streams._version:
        return None
    return handed.projections
