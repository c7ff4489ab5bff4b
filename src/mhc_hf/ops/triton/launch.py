"""The same functions as `ops/eager.py` has, computed by kernels, and the forms that only kernels have.

Shapes: T tokens, n streams, C channels of one stream, m = (n+2)*n. x [T, n, C], branch tensors [T, C], numbers a token
token-last: h_pre [n, T], h_post [n, T], h_res [n, n, T], projected [m, T], inv_rms [T]. All contiguous.

`gain` [C] is the weight of the RMSNorm that the branch begins with, in the dtype of `x`: given, branch_in is normed,
and branch_inv_rms [T] and read_dots [n, T] are returned besides, for backward.
"""

from typing import Any

import torch
from torch import Tensor

from . import config, passes, sinkhorn
from .config import cdiv
from .record import run_kernel


def project_doubly_stochastic(logits: Tensor, num_iters: int) -> Tensor:
    """`ops/sinkhorn.py` says what."""
    n, _, num_tokens = logits.shape
    h_res = torch.empty_like(logits)
    tiles = config.choose_tiles("sinkhorn", n, 1)
    grid = (cdiv(num_tokens, tiles["BT"]),)
    arguments = {"logits_ptr": logits, "h_res_ptr": h_res, "T": num_tokens, **passes.count_iters(n, num_iters)}
    run_kernel(sinkhorn.sinkhorn_fwd_kernel, grid, arguments, {"N": n} | tiles)
    return h_res


def backpropagate_projection(grad: Tensor, logits: Tensor, num_iters: int) -> Tensor:
    """`ops/sinkhorn.py` says what; the result itself is not returned again."""
    n, _, num_tokens = logits.shape
    d_logits = torch.empty_like(logits)
    tiles = config.choose_tiles("sinkhorn", n, 1)
    arguments = {
        "grad_ptr": grad,
        "logits_ptr": logits,
        "d_logits_ptr": d_logits,
        "sums_ptr": logits.new_empty(2 * num_iters, n, num_tokens),
        "T": num_tokens,
        **passes.count_iters(n, num_iters),
    }
    grid = (cdiv(num_tokens, tiles["BT"]),)
    run_kernel(sinkhorn.sinkhorn_bwd_kernel, grid, arguments, {"N": n} | tiles)
    return d_logits


def coefficients(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float
) -> tuple[Tensor, ...]:
    """The three maps of a site: h_pre, h_post, h_res, and for backward projected, inv_rms. Two kernels, n rows."""
    partial = passes.project_streams(x, phi, gram=False)
    return passes.compute_maps(partial, x, bias, alpha, num_iters, norm_eps, collapses=False)


def read(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    num_iters: int,
    norm_eps: float,
    gain: Tensor | None = None,
    gain_eps: float = 0.0,
) -> tuple[Tensor, ...]:
    """branch_in, h_post, h_res, and for backward projected, inv_rms. Two kernels, 2n+1 rows."""
    partial = passes.project_streams(x, phi, gram=gain is not None)
    return read_projected(partial, x, bias, alpha, num_iters, norm_eps, gain, gain_eps)


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
    gain: Tensor | None = None,
    gain_eps: float = 0.0,
    *,
    saves: bool = True,
) -> tuple[Tensor, ...]:
    """`post_res`, then the next site's `read` of it: x_next and what `read` returns. Two kernels, 3n+2 rows.

    Without `saves` nothing is returned, or written, that only backward needs.
    """
    x_next, partial = write_project(x, branch_out, h_post, h_res, phi, gram=gain is not None)
    return x_next, *read_projected(partial, x_next, bias, alpha, num_iters, norm_eps, gain, gain_eps, saves=saves)


def write_project(
    x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, gram: bool
) -> tuple[Tensor, Tensor]:
    """`post_res`, and of what it wrote the projections for `read_projected`. One kernel, 2n+1 rows.

    `gram`: whether the reader norms what it reads; one that does not can read those with it too.
    """
    return passes.write_and_project(x, branch_out, h_post, h_res, phi, gram)


def shape_partial(x: Tensor) -> tuple[int, int, int]:
    """The shape of the projections that `write_project` returns, with Gram numbers."""
    return passes.shape_partial(x, True)


def read_projected(
    partial: Tensor,
    x: Tensor,
    bias: Tensor,
    alpha: Tensor,
    num_iters: int,
    norm_eps: float,
    gain: Tensor | None = None,
    gain_eps: float = 0.0,
    *,
    saves: bool = True,
) -> tuple[Tensor, ...]:
    """`read` of streams whose projections are there; `saves` as in `write_read`. One kernel, n+1 rows."""
    norm: Any = {"gain": gain, "gain_eps": gain_eps}
    return passes.compute_maps(partial, x, bias, alpha, num_iters, norm_eps, collapses=True, saves=saves, **norm)


def widen_project(hidden: Tensor, n: int, phi: Tensor, gram: bool) -> tuple[Tensor, Tensor]:
    """n equal streams [T, n, C], and their projections for `read_projected`. One kernel, n+1 rows."""
    return passes.widen_and_project(hidden, n, phi, gram)


def write_collapse(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The mean over the streams of `post_res`, [T, C]. One kernel, n+2 rows."""
    return passes.write_and_collapse(x, branch_out, h_post, h_res)


def pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """H_pre x. One kernel, n+1 rows."""
    return passes.collapse_streams(x, h_pre, None)[0]


def post_res(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x' = H_res x + H_post F. One kernel, 2n+1 rows."""
    return passes.write_streams(x, branch_out, h_post, h_res, torch.empty_like(x))


def backpropagate_pre(x: Tensor, h_pre: Tensor, d_branch_in: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and h_pre. Two kernels, 2n+2 rows."""
    d_h_pre, _ = passes.dot_streams(x, d_branch_in, None)
    d_x = passes.write_streams(None, d_branch_in, h_pre, None, torch.empty_like(x))
    assert d_h_pre is not None
    return d_x, d_h_pre


def backpropagate_write(branch_out: Tensor, h_post: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of branch_out and h_post. One kernel, n+2 rows."""
    d_branch_out, d_h_post = passes.collapse_streams(d_x_next, h_post, branch_out)
    assert d_h_post is not None
    return d_branch_out, d_h_post


def backpropagate_mix(x: Tensor, h_res: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and h_res where no `read` owns x. Two kernels, 4n rows."""
    _, d_h_res = passes.dot_streams(x, None, d_x_next)
    d_x = passes.write_streams(d_x_next, None, None, h_res, torch.empty_like(x), transposed=True)
    assert d_h_res is not None
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
    gain: Tensor | None = None,
    branch_inv_rms: Tensor | None = None,
    read_dots: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, phi, bias, alpha, and with `gain` its own too. Three kernels, 5n+2 rows with branch and mix."""
    _, n, num_channels = x.shape
    # without a gradient the norm has no part in this
    norm = None if d_branch_in is None else gain
    pre_dots, res_dots = passes.dot_streams(x, d_branch_in, d_x_next, norm)
    d_logits, d_projected, weights = passes.backpropagate_maps(
        projected,
        inv_rms,
        bias,
        alpha,
        num_iters,
        num_channels,
        pre_dots=pre_dots,
        d_h_pre=d_h_pre,
        d_h_post=d_h_post,
        res_dots=res_dots,
        d_h_res=d_h_res,
        branch_inv_rms=None if norm is None else branch_inv_rms,
        read_dots=None if norm is None else read_dots,
    )
    d_gates = (d_logits * projected).mv(inv_rms)
    d_alpha = torch.stack([part.sum() for part in d_gates.split([n, n, n * n])])
    d_x, d_phi, d_gain = passes.backpropagate_streams(x, phi, d_branch_in, d_x_next, d_projected, weights, norm)
    grads = d_x, d_phi, d_logits.sum(1), d_alpha
    if gain is None:
        return grads
    return *grads, torch.zeros_like(gain) if d_gain is None else d_gain.to(gain.dtype)
