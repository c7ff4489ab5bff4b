"""Projections: what makes H_res of its logits. Sinkhorn-Knopp is mHC; the others are what it is compared with.

Another manifold is another entry of `PROJECTIONS`: how to get there, and how to come back for the starts.

Shapes: n streams; `...` stands for any leading shape.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import mhc_coefficients, sinkhorn_knopp
from ..ops.reference import rms_normalize


@dataclass(frozen=True)
class Projection:
    """From logits to H_res, and back.

    Attributes:
        project: (logits [..., n, n], num_iters) -> H_res [..., n, n].
        invert: H_res [n, n] -> logits that `project` makes it of; the starts need it.
        bound: what the dynamic part passes through before its gating factor.
    """

    project: Callable[[Tensor, int], Tensor]
    invert: Callable[[Tensor], Tensor]
    bound: Callable[[Tensor], Tensor] = torch.Tensor.clone


def compute_maps(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, *, projection: str, num_iters: int, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre, H_post and H_res as `mhc_coefficients` gives them, under any projection.

    H_pre and H_post are mHC's under all of them, so that a comparison changes one thing.
    """
    if projection == "sinkhorn":
        return mhc_coefficients(x, phi, bias, alpha, num_iters=num_iters, norm_eps=norm_eps)
    n = x.shape[-2]
    chosen = PROJECTIONS[projection]
    normed = rms_normalize(x.flatten(-2), norm_eps)
    # the maps are float32 under autocast too
    with torch.autocast(x.device.type, enabled=False):
        pre, post, res = (normed @ phi.to(normed.dtype).T).split([n, n, n * n], -1)
    bias_pre, bias_post, bias_res = bias.to(normed.dtype).split([n, n, n * n])
    gate_pre, gate_post, gate_res = alpha.to(normed.dtype).unbind()
    h_pre = torch.sigmoid(gate_pre * pre + bias_pre)
    h_post = 2 * torch.sigmoid(gate_post * post + bias_post)
    logits = (gate_res * chosen.bound(res) + bias_res).unflatten(-1, (n, n))
    return h_pre, h_post, chosen.project(logits, num_iters)


def _log(h_res: Tensor) -> Tensor:
    log_res = h_res.log()
    return log_res - log_res.min()


def _keep(logits: Tensor, num_iters: int) -> Tensor:
    return logits


def _be_identity(logits: Tensor, num_iters: int) -> Tensor:
    # times zero: the parameters must have a gradient, be it none
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return identity + 0 * logits


PROJECTIONS = {
    # onto the doubly stochastic matrices (Eq. 9)
    "sinkhorn": Projection(sinkhorn_knopp, _log),
    # the original Hyper-Connections: H_res as it comes (Eq. 3 and 5)
    "none": Projection(_keep, torch.clone, torch.tanh),
    # streams are never mixed
    "identity": Projection(_be_identity, torch.zeros_like),
}
