"""The PyTorch path for a few tokens, as a decoder meets them step by step: as few operations as there can be.

Here an operation costs its dispatch, not its arithmetic, so products with n x n matrices are batched products.
Shapes and results are those of `eager`.
"""

import torch
from torch import Tensor

from .copies import are_copies, sum_weights
from .sinkhorn import project_doubly_stochastic

MOST_TOKENS = 8


def coefficients(
    x: Tensor, phi: Tensor, bias: Tensor, gates: Tensor, num_iters: int, norm_eps: float
) -> tuple[Tensor, ...]:
    """h_pre, h_post, h_res, projected, inv_rms; `gates` [m] is alpha, one a row of phi."""
    n = x.shape[1]
    x_vec = x.to(phi.dtype).flatten(1)  # [T, n*C]
    projected = torch.mm(phi, x_vec.T)  # [m, T]
    norm = torch.linalg.vector_norm(x_vec, dim=-1)  # [T]
    inv_rms = norm.square_().mul_(1 / x_vec.shape[1]).add_(norm_eps).rsqrt_()
    logits = torch.addcmul(bias[:, None], gates[:, None], projected * inv_rms)
    maps = torch.sigmoid(logits[: 2 * n])
    h_res = project_doubly_stochastic(logits[2 * n :].view(n, n, -1), num_iters)
    return maps[:n], maps[n:] * 2, h_res, projected, inv_rms


def collapse(x: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights_i x_i. [T, n, C], [n, T] -> [T, C] in the dtype of `x`"""
    if are_copies(x):
        return (sum_weights(weights, 0)[:, None] * x[:, 0]).to(x.dtype)
    return torch.bmm(weights.T[:, None], x.to(weights.dtype))[:, 0].to(x.dtype)


def post_res(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x' = H_res x + H_post F (Eq. 3). [T, n, C]"""
    written = h_post.T[:, :, None] * branch_out[:, None]
    if are_copies(x):
        # of broadcast factors the product may lie stream-major, and a compiler was promised otherwise
        return torch.addcmul(written, sum_weights(h_res, 1).T[:, :, None], x[:, :1]).to(x.dtype).contiguous()
    return torch.baddbmm(written, h_res.permute(2, 0, 1), x.to(h_res.dtype)).to(x.dtype)
