"""Whether the streams of a model can separate: what makes a site unable to, read off its parameters.

Shapes: n streams, C channels of one stream. Rows of phi and bias are in the order pre [n], post [n], res [n*n].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling import HyperConnection
from ..ops.reference import sinkhorn_knopp

# p (1 - p) of a map's liveliest entry: a softmax whose diagonal leads by 8 is down to 1e-3, and hardly moves
_LIVELY = 2e-3
# reads that differ by less are the same to bf16
_DISTINCT = 2**-8


def asleep(site: HyperConnection) -> str | None:
    """Why the streams at this site cannot separate by training; None where they can."""
    n = site.hc_mult
    phi, bias, alpha = (value.detach().double().cpu() for value in (site.phi, site.bias, site.alpha))
    for name, phi_rows, factor in zip(("pre", "post", "res"), phi.split([n, n, n * n]), alpha, strict=True):
        if factor == 0 and not phi_rows.any():
            return f"alpha and phi of H_{name} are both 0: neither ever gets a gradient"
    pre, post, res = bias.split([n, n, n * n])
    h_pre = pre.sigmoid()
    if not phi[:n].any() and h_pre.max() - h_pre.min() < _DISTINCT:
        return "every stream is read alike: equal streams get equal gradients, and stay equal for ever"
    maps = {"pre": h_pre, "post": post.sigmoid(), "res": sinkhorn_knopp(res.view(n, n))}
    for name, values in maps.items():
        if _slope(values) < _LIVELY:
            return f"H_{name} is saturated (slope {_slope(values):.1e}): its bias hardly gets a gradient"
    return None


def _slope(values: Tensor) -> float:
    return float(torch.max(values * (1 - values)))
