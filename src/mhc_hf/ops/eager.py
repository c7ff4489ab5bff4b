"""The PyTorch path of the ops: CPUs, float64 and wherever Triton is not. Forward and hand-written backward.

Shapes: T tokens, n streams, C channels of one stream, m = (n+2)*n rows of phi in the order pre, post, res.
Streams are x [T, n, C], contiguous; the branch reads and writes [T, C]. Numbers a token lie token-last, so that
operations on them run over contiguous memory: h_pre [n, T], h_post [n, T], h_res [n, n, T] (into, from, token),
projected [m, T].
Everything is computed in the dtype of `phi` or of the maps (float32, or float64); streams of a smaller dtype are
widened one block of tokens at a time, never as a whole.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .sinkhorn import backpropagate_projection, project_doubly_stochastic

# numbers in a widened block: 4 MiB in float32, large enough that dispatch is nothing, small enough for a cache
_BLOCK_NUMBERS = 2**20


def coefficients(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The three maps of a site (Eq. 7 and 8): h_pre, h_post, h_res, and for backward projected, inv_rms [T]."""
    n = x.shape[1]
    projected, inv_rms = project(x, phi, norm_eps)
    logits = compute_logits(projected, inv_rms, bias, alpha, n)
    h_pre = torch.sigmoid(logits[:n])
    h_post = torch.sigmoid(logits[n : 2 * n]).mul_(2)
    h_res = project_doubly_stochastic(logits[2 * n :].unflatten(0, (n, n)), num_iters)
    return h_pre, h_post, h_res, projected, inv_rms


def read(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All that a site does before its branch: branch_in [T, C], h_post, h_res, and for backward projected, inv_rms."""
    h_pre, h_post, h_res, projected, inv_rms = coefficients(x, phi, bias, alpha, num_iters, norm_eps)
    return pre(x, h_pre), h_post, h_res, projected, inv_rms


def project(x: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """phi @ x_vec, not yet normalised, [m, T], and 1 / rms(x_vec), [T]."""
    num_tokens, n, num_channels = x.shape
    width = n * num_channels
    projected = phi.new_empty(num_tokens, phi.shape[0])
    norms = phi.new_empty(num_tokens)
    for block, x_block in _widen(x, phi.dtype):
        x_vec = x_block.view(-1, width)
        torch.mm(x_vec, phi.T, out=projected[block])
        torch.linalg.vector_norm(x_vec, dim=-1, out=norms[block])
    inv_rms = norms.square_().mul_(1 / width).add_(norm_eps).rsqrt_()
    return projected.T.contiguous(), inv_rms


def compute_logits(projected: Tensor, inv_rms: Tensor, bias: Tensor, alpha: Tensor, n: int) -> Tensor:
    """alpha * projected / rms + bias, [m, T]."""
    return torch.addcmul(bias[:, None], _repeat_gates(alpha, n)[:, None], projected * inv_rms)


def pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """H_pre x. [T, C]"""
    branch_in = x.new_empty(x.shape[0], x.shape[2])
    for block, x_block in _widen(x, h_pre.dtype):
        total = h_pre[0, block, None] * x_block[:, 0]
        for i in range(1, x.shape[1]):
            total.addcmul_(h_pre[i, block, None], x_block[:, i])
        branch_in[block] = total
    return branch_in


def post_res(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x' = H_res x + H_post F (Eq. 3). [T, n, C]"""
    x_next = torch.empty_like(x)
    for block, x_block in _widen(x, h_post.dtype):
        total = h_post[:, block].T[:, :, None] * branch_out[block, None]
        for j in range(x.shape[1]):
            total.addcmul_(h_res[:, j, block].T[:, :, None], x_block[:, j, None])
        x_next[block] = total
    return x_next


def backpropagate_pre(x: Tensor, h_pre: Tensor, d_branch_in: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and h_pre."""
    d_x = (h_pre.T[:, :, None] * d_branch_in[:, None]).to(x.dtype)
    return d_x, _dot_streams(x, d_branch_in, h_pre.dtype)


def backpropagate_write(branch_out: Tensor, h_post: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the backward of `post_res` that its branch waits for: gradients of branch_out and h_post."""
    return pre(d_x_next, h_post), _dot_streams(d_x_next, branch_out, h_post.dtype)


def backpropagate_mix(x: Tensor, h_res: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """The rest of the backward of `post_res`: gradients of x and h_res."""
    d_x = torch.empty_like(x)
    for block, d_block in _widen(d_x_next, h_res.dtype):
        d_x[block] = _add_mixed(torch.zeros_like(d_block), h_res[..., block], d_block)
    return d_x, _dot_all_streams(x, d_x_next, h_res.dtype)


def backpropagate_read(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    projected: Tensor,
    inv_rms: Tensor,
    num_iters: int,
    d_branch_in: Tensor | None,
    d_h_pre: Tensor | None,
    d_h_post: Tensor | None,
    d_h_res: Tensor | None,
    d_x_next: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, phi, bias, alpha from those of whatever was computed from x.

    `d_x_next` [T, n, C] is the gradient of the streams after the site. Given, it says that the site wrote H_res x, and
    both gradients of that product are made here: no part of d_x is ever written and read again.
    """
    n, num_channels = x.shape[1:]
    z = projected * inv_rms
    gates = _repeat_gates(alpha, n)[:, None]
    logits = torch.addcmul(bias[:, None], gates, z)
    h_pre = torch.sigmoid(logits[:n])
    h_res = None

    d_logits = torch.zeros_like(logits)
    if d_branch_in is not None:
        from_branch = _dot_streams(x, d_branch_in, phi.dtype)
        d_h_pre = from_branch if d_h_pre is None else from_branch.add_(d_h_pre)
    if d_h_pre is not None:
        d_logits[:n] = d_h_pre * h_pre * (1 - h_pre)
    if d_h_post is not None:
        half = torch.sigmoid(logits[n : 2 * n])
        d_logits[n : 2 * n] = 2 * d_h_post * half * (1 - half)
    if d_x_next is not None:
        from_mix = _dot_all_streams(x, d_x_next, phi.dtype)
        d_h_res = from_mix if d_h_res is None else from_mix.add_(d_h_res)
    if d_h_res is not None:
        logits_res = logits[2 * n :].unflatten(0, (n, n))
        h_res = project_doubly_stochastic(logits_res, num_iters)
        d_logits[2 * n :] = backpropagate_projection(d_h_res, logits_res, num_iters).flatten(0, 1)

    d_bias = d_logits.sum(1)
    d_alpha = torch.stack([part.sum() for part in (d_logits * z).split([n, n, n * n])])
    d_z = d_logits.mul_(gates)
    # d(1/rms)/dx is along x itself
    along_x = (d_z * z).sum(0).mul_(inv_rms.square()).mul_(-1 / (n * num_channels))
    d_projected = d_z.mul_(inv_rms)

    d_x = torch.empty_like(x)
    d_phi = torch.zeros_like(phi)
    for block, x_block in _widen(x, phi.dtype):
        x_vec = x_block.view(-1, n * num_channels)
        d_phi.addmm_(d_projected[:, block], x_vec)
        total = torch.mm(d_projected[:, block].T, phi).view_as(x_block)
        total.addcmul_(along_x[block, None, None], x_block)
        if d_branch_in is not None:
            total.addcmul_(h_pre[:, block].T[:, :, None], d_branch_in[block, None].to(phi.dtype))
        if d_x_next is not None and h_res is not None:
            total = _add_mixed(total, h_res[..., block], d_x_next[block].to(phi.dtype))
        d_x[block] = total
    return d_x, d_phi, d_bias, d_alpha


def _add_mixed(total: Tensor, h_res: Tensor, d_x_next: Tensor) -> Tensor:
    """total + H_res^T d_x_next, in place. [T, n, C]"""
    for i in range(h_res.shape[0]):
        total.addcmul_(h_res[i].T[:, :, None], d_x_next[:, i, None])
    return total


def _dot_streams(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """<x_i, y> over channels. [T, n, C], [T, C] -> [n, T]"""
    dots = x.new_empty(x.shape[1], x.shape[0], dtype=dtype)
    for block, x_block in _widen(x, dtype):
        dots[:, block] = (x_block * y[block, None].to(dtype)).sum(-1).T
    return dots


def _dot_all_streams(x: Tensor, d_x_next: Tensor, dtype: torch.dtype) -> Tensor:
    """<d_x_next_i, x_j> over channels. [n, n, T]"""
    num_tokens, n, _ = x.shape
    dots = x.new_empty(n, n, num_tokens, dtype=dtype)
    for block, x_block in _widen(x, dtype):
        d_block = d_x_next[block].to(dtype)
        scratch = torch.empty_like(x_block)
        for i in range(n):
            dots[i, :, block] = torch.mul(x_block, d_block[:, i, None], out=scratch).sum(-1).T
    return dots


def _repeat_gates(alpha: Tensor, n: int) -> Tensor:
    """alpha [3] -> [m], one gate a row of phi."""
    gate_pre, gate_post, gate_res = alpha.unbind()
    return torch.cat([gate_pre.expand(n), gate_post.expand(n), gate_res.expand(n * n)])


def _widen(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """x in `dtype`, one block of tokens at a time; x itself where it has that dtype already."""
    num_tokens, n, num_channels = x.shape
    step = max(1, num_tokens if x.dtype == dtype else _BLOCK_NUMBERS // (n * num_channels))
    for start in range(0, num_tokens, step):
        block = slice(start, min(start + step, num_tokens))
        yield block, x[block].to(dtype)
