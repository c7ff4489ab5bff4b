"""The PyTorch path of the ops: CPUs, float64 and wherever Triton is not. Forward and hand-written backward.

Shapes: T tokens, n streams, C channels of one stream, m = (n+2)*n rows of phi in the order pre, post, res.
Streams are x [T, n, C], contiguous; the branch reads and writes [T, C]. Numbers a token lie token-last, so that
operations on them run over contiguous memory: h_pre [n, T], h_post [n, T], h_res [n, n, T] (into, from, token),
projected [m, T].

Everything is computed in the dtype of `phi` or of the maps (float32, or float64), a block of tokens at a time: streams
of a smaller dtype are widened in blocks, never as a whole, and what one step wrote the next finds in a cache.
Mixing n streams is n broadcast multiply-adds over the block, not a batch of products with n x n matrices.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import few
from .copies import are_copies, sum_weights
from .sinkhorn import backpropagate_projection, project_doubly_stochastic

# numbers in a block: 2 MiB in float32, so that a block's buffers stay in a cache and are never given back to the system
_BLOCK_NUMBERS = 2**19


def coefficients(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float
) -> tuple[Tensor, ...]:
    """The three maps of a site (Eq. 7 and 8): h_pre, h_post, h_res, and for backward projected, inv_rms [T]."""
    if len(x) <= few.MOST_TOKENS:
        return few.coefficients(x, phi, bias, _repeat_gates(alpha, x.shape[1]), num_iters, norm_eps)
    projected, inv_rms = _project(x, phi, norm_eps)
    return *_compute_maps(projected, inv_rms, bias, alpha, x.shape[1], num_iters), projected, inv_rms


def read(x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float) -> tuple[Tensor, ...]:
    """All that a site does before its branch: branch_in [T, C], h_post, h_res, and for backward projected, inv_rms."""
    h_pre, h_post, h_res, projected, inv_rms = coefficients(x, phi, bias, alpha, num_iters, norm_eps)
    return pre(x, h_pre), h_post, h_res, projected, inv_rms


def write_read(
    x: Tensor,
    branch_out: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    num_iters: int,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    """`post_res`, then the next site's `read` of it: x_next and what `read` returns."""
    x_next = post_res(x, branch_out, h_post, h_res)
    return x_next, *read(x_next, phi, bias, alpha, num_iters, norm_eps)


def pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """H_pre x. [T, C]"""
    if len(x) <= few.MOST_TOKENS:
        return few.collapse(x, h_pre)
    branch_in = x.new_empty(x.shape[0], x.shape[2])
    for block, x_block in _split_tokens(x, h_pre.dtype):
        _collapse(x_block, h_pre[:, block], branch_in[block])
    return branch_in


def post_res(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x' = H_res x + H_post F (Eq. 3). [T, n, C]"""
    if len(x) <= few.MOST_TOKENS:
        return few.post_res(x, branch_out, h_post, h_res)
    x_next = torch.empty_like(x)
    for block, x_block in _split_tokens(x, h_post.dtype):
        total = _get_buffer(x_next[block], h_post.dtype)
        torch.mul(_per_stream(h_post[:, block]), branch_out[block, None], out=total)
        _add_mixed(total, h_res[..., block], x_block)
        _store(total, x_next[block])
    return x_next


def backpropagate_pre(x: Tensor, h_pre: Tensor, d_branch_in: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and h_pre."""
    d_x, d_h_pre = torch.empty_like(x), torch.empty_like(h_pre)
    for block, x_block in _split_tokens(x, h_pre.dtype):
        d_block = d_branch_in[block].to(h_pre.dtype)
        d_x[block] = _per_stream(h_pre[:, block]) * d_block[:, None]
        d_h_pre[:, block] = _dot_channels(x_block, d_block)
    return d_x, d_h_pre


def backpropagate_write(branch_out: Tensor, h_post: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the backward of `post_res` that its branch waits for: gradients of branch_out and h_post."""
    d_branch_out, d_h_post = torch.empty_like(branch_out), torch.empty_like(h_post)
    for block, d_block in _split_tokens(d_x_next, h_post.dtype):
        _collapse(d_block, h_post[:, block], d_branch_out[block])
        d_h_post[:, block] = _dot_channels(d_block, branch_out[block].to(h_post.dtype))
    return d_branch_out, d_h_post


def backpropagate_mix(x: Tensor, h_res: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """The rest of the backward of `post_res`: gradients of x and h_res."""
    d_x, d_h_res = torch.empty_like(x), torch.empty_like(h_res)
    for block, x_block in _split_tokens(x, h_res.dtype):
        d_block = d_x_next[block].to(h_res.dtype)
        total = _get_buffer(d_x[block], h_res.dtype).zero_()
        _add_mixed(total, h_res[..., block].transpose(0, 1), d_block)
        _store(total, d_x[block])
        d_h_res[..., block] = _dot_all_streams(d_block, x_block)
    return d_x, d_h_res


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

    # first walk over the streams: what the maps are told
    d_pre = torch.zeros_like(h_pre) if d_h_pre is None else d_h_pre.clone()
    d_res = phi.new_zeros(n, n, x.shape[0]) if d_h_res is None else d_h_res.clone()
    for block, x_block in _split_tokens(x, phi.dtype):
        if d_branch_in is not None:
            d_pre[:, block] += _dot_channels(x_block, d_branch_in[block].to(phi.dtype))
        if d_x_next is not None:
            d_res[..., block] += _dot_all_streams(d_x_next[block].to(phi.dtype), x_block)

    d_logits = torch.zeros_like(logits)
    d_logits[:n] = d_pre * h_pre * (1 - h_pre)
    if d_h_post is not None:
        sigmoid = torch.sigmoid(logits[n : 2 * n])
        d_logits[n : 2 * n] = 2 * d_h_post * sigmoid * (1 - sigmoid)
    d_logits_res, h_res = backpropagate_projection(d_res, logits[2 * n :].view(n, n, -1), num_iters)
    d_logits[2 * n :] = d_logits_res.flatten(0, 1)
    d_bias = d_logits.sum(1)
    d_alpha = torch.stack([part.sum() for part in (d_logits * z).split([n, n, n * n])])
    d_z = d_logits.mul_(gates)
    # the gradient of 1/rms lies along x itself
    along_x = (d_z * z).sum(0).mul_(inv_rms.square()).mul_(-1 / (n * num_channels))
    d_projected = d_z.mul_(inv_rms)

    # second walk: what the streams are told
    d_x, d_phi = torch.empty_like(x), torch.zeros_like(phi)
    for block, x_block in _split_tokens(x, phi.dtype):
        d_phi.addmm_(d_projected[:, block], x_block.view(-1, n * num_channels))
        total = _get_buffer(d_x[block], phi.dtype)
        torch.mm(d_projected[:, block].T, phi, out=total.view(-1, n * num_channels))
        total.addcmul_(along_x[block, None, None], x_block)
        if d_branch_in is not None:
            total.addcmul_(_per_stream(h_pre[:, block]), d_branch_in[block, None].to(phi.dtype))
        if d_x_next is not None:
            _add_mixed(total, h_res[..., block].transpose(0, 1), d_x_next[block].to(phi.dtype))
        _store(total, d_x[block])
    return d_x, d_phi, d_bias, d_alpha


def _project(x: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """phi @ x_vec, not yet normalised, [m, T], and 1 / rms(x_vec), [T]."""
    num_tokens, n, num_channels = x.shape
    width = n * num_channels
    projected, norms = phi.new_empty(num_tokens, len(phi)), phi.new_empty(num_tokens)
    for block, x_block in _split_tokens(x, phi.dtype):
        x_vec = x_block.view(-1, width)
        torch.mm(x_vec, phi.T, out=projected[block])
        torch.linalg.vector_norm(x_vec, dim=-1, out=norms[block])
    return projected.T.contiguous(), norms.square_().mul_(1 / width).add_(norm_eps).rsqrt_()


def _compute_maps(
    projected: Tensor, inv_rms: Tensor, bias: Tensor, alpha: Tensor, n: int, num_iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """h_pre, h_post, h_res from the projections."""
    logits = torch.addcmul(bias[:, None], _repeat_gates(alpha, n)[:, None], projected * inv_rms)
    h_pre = torch.sigmoid(logits[:n])
    h_post = torch.sigmoid(logits[n : 2 * n]).mul_(2)
    return h_pre, h_post, project_doubly_stochastic(logits[2 * n :].view(n, n, -1), num_iters)


def _collapse(x: Tensor, weights: Tensor, out: Tensor) -> None:
    """out = sum of weights_i x_i. [T, n, C], [n, T] -> [T, C]"""
    total = _get_buffer(out, weights.dtype)
    if are_copies(x):
        torch.mul(sum_weights(weights, 0)[:, None], x[:, 0], out=total)
    else:
        torch.mul(weights[0, :, None], x[:, 0], out=total)
        for i in range(1, x.shape[1]):
            total.addcmul_(weights[i, :, None], x[:, i])
    _store(total, out)


def _add_mixed(total: Tensor, matrix: Tensor, x: Tensor) -> None:
    """total += matrix x. [T, n, C], [n, n, T] (into, from, token)"""
    if are_copies(x):
        total.addcmul_(_per_stream(sum_weights(matrix, 1)), x[:, :1])
    else:
        for j in range(x.shape[1]):
            total.addcmul_(_per_stream(matrix[:, j]), x[:, j, None])


def _dot_channels(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y> over channels. [T, n, C], [T, C] -> [n, T]"""
    return torch.bmm(y[:, None], x.mT)[:, 0].T


def _dot_all_streams(d_x_next: Tensor, x: Tensor) -> Tensor:
    """<d_x_next_i, x_j> over channels. [n, n, T]"""
    # dots are batched products: they read each stream once and write nothing large, multiply and sum does neither
    return torch.bmm(d_x_next, x.mT).permute(1, 2, 0)


def _per_stream(weights: Tensor) -> Tensor:
    """[n, T] -> [T, n, 1], to weigh the streams of x."""
    return weights.T[:, :, None]


def _repeat_gates(alpha: Tensor, n: int) -> Tensor:
    """alpha [3] -> [m], one gate a row of phi."""
    gate_pre, gate_post, gate_res = alpha.unbind()
    return torch.cat([gate_pre.expand(n), gate_post.expand(n), gate_res.expand(n * n)])


def _split_tokens(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of tokens and x there, in `dtype`; always at least one block, be it empty."""
    num_tokens, n, num_channels = x.shape
    step = max(1, _BLOCK_NUMBERS // (n * num_channels))
    for start in range(0, max(1, num_tokens), step):
        block = slice(start, min(start + step, num_tokens))
        yield block, x[block].to(dtype)


def _get_buffer(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to compute what `out` will hold: `out` itself unless it is narrower than `dtype`."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def _store(total: Tensor, out: Tensor) -> None:
    """Round a buffer of `_get_buffer` into `out`, once."""
    if total.dtype != out.dtype:
        out.copy_(total)
