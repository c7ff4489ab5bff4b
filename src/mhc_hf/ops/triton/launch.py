"""The launchers: the same functions as `ops/eager.py` has, computed by kernels.

Shapes: T tokens, n streams, C channels of one stream, m = (n+2)*n. x [T, n, C], branch tensors [T, C], numbers a token
token-last: h_pre [n, T], h_post [n, T], h_res [n, n, T], projected [m, T], inv_rms [T]. All contiguous.
"""

from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from ..sinkhorn import count_log_iters
from . import collapse, config, maps, project, read_backward, sinkhorn, write
from .record import run_kernel


def project_doubly_stochastic(logits: Tensor, num_iters: int) -> Tensor:
    """`ops/sinkhorn.py` says what."""
    n, _, num_tokens = logits.shape
    h_res = torch.empty_like(logits)
    tiles = config.choose_tiles("sinkhorn", n, 1)
    grid = (cdiv(num_tokens, tiles["BT"]),)
    arguments = {"logits_ptr": logits, "h_res_ptr": h_res, "T": num_tokens, **_count_iters(n, num_iters)}
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
        **_count_iters(n, num_iters),
    }
    grid = (cdiv(num_tokens, tiles["BT"]),)
    run_kernel(sinkhorn.sinkhorn_bwd_kernel, grid, arguments, {"N": n} | tiles)
    return d_logits


def coefficients(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float
) -> tuple[Tensor, ...]:
    """The three maps of a site: h_pre, h_post, h_res, and for backward projected, inv_rms. Two kernels, n rows."""
    partial = _project(x, phi)
    return _compute_maps(partial, x, bias, alpha, num_iters, norm_eps, collapses=False)


def read(x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float) -> tuple[Tensor, ...]:
    """branch_in, h_post, h_res, and for backward projected, inv_rms. Two kernels, 2n+1 rows."""
    partial = _project(x, phi)
    return _compute_maps(partial, x, bias, alpha, num_iters, norm_eps, collapses=True)


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
    """`post_res`, then the next site's `read` of it: x_next and what `read` returns. Two kernels, 3n+2 rows."""
    num_tokens, n, num_channels = x.shape
    x_next = torch.empty_like(x)
    tiles = config.choose_tiles("write_project", n, num_channels, x.dtype)
    num_blocks = cdiv(num_tokens, tiles["BT"])
    splits, tiles_split = config.split_channels(num_channels, tiles["BC"], num_blocks)
    partial = phi.new_empty(splits, len(phi) + 1, num_tokens)
    arguments = {
        "x_ptr": x,
        "y_ptr": branch_out,
        "h_post_ptr": h_post,
        "h_res_ptr": h_res,
        "out_ptr": x_next,
        "phi_ptr": phi,
        "partial_ptr": partial,
        "T": num_tokens,
        "C": num_channels,
        "tiles_split": tiles_split,
    }
    precision = config.choose_precision(x.dtype, config.get_target())["PRECISION"]
    constants = {"N": n, "MP": config.pad_rows(n), "PRECISION": precision}
    run_kernel(write.write_project_kernel, (num_blocks, splits), arguments, constants | tiles)
    return x_next, *_compute_maps(partial, x_next, bias, alpha, num_iters, norm_eps, collapses=True)


def pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """H_pre x. One kernel, n+1 rows."""
    return _collapse(x, h_pre, None)[0]


def post_res(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x' = H_res x + H_post F. One kernel, 2n+1 rows."""
    return _write(x, branch_out, h_post, h_res, torch.empty_like(x))


def backpropagate_pre(x: Tensor, h_pre: Tensor, d_branch_in: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and h_pre. Two kernels, 2n+2 rows."""
    d_h_pre, _ = _dot(x, d_branch_in, None)
    d_x = _write(None, d_branch_in, h_pre, None, torch.empty_like(x))
    assert d_h_pre is not None
    return d_x, d_h_pre


def backpropagate_write(branch_out: Tensor, h_post: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of branch_out and h_post. One kernel, n+2 rows."""
    d_branch_out, d_h_post = _collapse(d_x_next, h_post, branch_out)
    assert d_h_post is not None
    return d_branch_out, d_h_post


def backpropagate_mix(x: Tensor, h_res: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and h_res where no `read` owns x. Two kernels, 4n rows."""
    _, d_h_res = _dot(x, None, d_x_next)
    d_x = _write(d_x_next, None, None, h_res, torch.empty_like(x), transposed=True)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, phi, bias, alpha. Three kernels, 5n+2 rows with the branch and the mix.

    Parameters get sums over blocks of tokens that are added in their order: the same run gives the same bits.
    """
    num_tokens, n, num_channels = x.shape
    pre_dots, res_dots = _dot(x, d_branch_in, d_x_next)
    tiles = config.choose_tiles("maps_bwd", n, num_channels)
    num_blocks = cdiv(num_tokens, tiles["BT"])
    d_logits, d_projected = torch.empty_like(projected), phi.new_empty(num_tokens, len(phi))
    weights = phi.new_empty(num_tokens, n * n + n + 1)
    arguments = {
        "projected_ptr": projected,
        "inv_rms_ptr": inv_rms,
        "bias_ptr": bias,
        "alpha_ptr": alpha,
        "d_pre_dots_ptr": pre_dots,
        "d_h_pre_ptr": d_h_pre,
        "d_h_post_ptr": d_h_post,
        "d_res_dots_ptr": res_dots,
        "d_h_res_ptr": d_h_res,
        "sums_ptr": phi.new_empty(2 * num_iters, n, num_tokens),
        "d_logits_ptr": d_logits,
        "d_projected_ptr": d_projected,
        "weights_ptr": weights,
        "T": num_tokens,
        "C": num_channels,
        **_count_iters(n, num_iters),
    }
    constants = {
        "N": n,
        "HAS_PRE_DOTS": pre_dots is not None,
        "HAS_H_PRE": d_h_pre is not None,
        "HAS_H_POST": d_h_post is not None,
        "HAS_RES_DOTS": res_dots is not None,
        "HAS_H_RES": d_h_res is not None,
    }
    run_kernel(maps.maps_bwd_kernel, (num_blocks,), arguments, constants | tiles)
    d_gates = (d_logits * projected).mv(inv_rms)
    d_alpha = torch.stack([part.sum() for part in d_gates.split([n, n, n * n])])

    d_x, d_phi = _backpropagate_streams(x, phi, d_branch_in, d_x_next, d_projected, weights)
    return d_x, d_phi, d_logits.sum(1), d_alpha


def _project(x: Tensor, phi: Tensor) -> Tensor:
    """[splits, m + 1, T]: parts of phi @ x_vec, and of the sum of squares. One kernel, n rows."""
    num_tokens, n, num_channels = x.shape
    width = n * num_channels
    tiles = config.choose_tiles("project", n, width)
    num_blocks = cdiv(num_tokens, tiles["BT"])
    splits, tiles_split = config.split_channels(width, tiles["BK"], num_blocks)
    partial = phi.new_empty(splits, len(phi) + 1, num_tokens)
    arguments = {
        "x_ptr": x,
        "phi_ptr": phi,
        "partial_ptr": partial,
        "T": num_tokens,
        "K": width,
        "tiles_split": tiles_split,
    }
    precision = config.choose_precision(x.dtype, config.get_target())["PRECISION"]
    constants = {"M": len(phi), "MP": config.pad_rows(n), "PRECISION": precision}
    run_kernel(project.project_fwd_kernel, (num_blocks, splits), arguments, constants | tiles)
    return partial


def _compute_maps(
    partial: Tensor, x: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float, *, collapses: bool
) -> tuple[Tensor, ...]:
    """Maps from projections; the first is branch_in with `collapses`, h_pre without."""
    num_tokens, n, num_channels = x.shape
    h_post, h_res = partial.new_empty(n, num_tokens), partial.new_empty(n, n, num_tokens)
    projected, inv_rms = partial.new_empty(len(bias), num_tokens), partial.new_empty(num_tokens)
    first = x.new_empty(num_tokens, num_channels) if collapses else partial.new_empty(n, num_tokens)
    arguments = {
        "partial_ptr": partial,
        "bias_ptr": bias,
        "alpha_ptr": alpha,
        "x_ptr": x if collapses else None,
        "projected_ptr": projected,
        "inv_rms_ptr": inv_rms,
        "h_pre_ptr": None if collapses else first,
        "h_post_ptr": h_post,
        "h_res_ptr": h_res,
        "branch_in_ptr": first if collapses else None,
        "T": num_tokens,
        "C": num_channels,
        **_count_iters(n, num_iters),
        "num_splits": len(partial),
        "norm_eps": norm_eps,
    }
    tiles = config.choose_tiles("maps_fwd", n, num_channels)
    constants = {"N": n, "COLLAPSE": collapses}
    run_kernel(maps.maps_fwd_kernel, (cdiv(num_tokens, tiles["BT"]),), arguments, constants | tiles)
    return first, h_post, h_res, projected, inv_rms


def _collapse(x: Tensor, weights: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """sum of weights_i x_i, and with y also <x_i, y>."""
    num_tokens, n, num_channels = x.shape
    out = x.new_empty(num_tokens, num_channels)
    dots = None if y is None else torch.empty_like(weights)
    tiles = config.choose_tiles("collapse", n, num_channels)
    arguments = {
        "x_ptr": x,
        "weights_ptr": weights,
        "y_ptr": y,
        "out_ptr": out,
        "dots_ptr": dots,
        "T": num_tokens,
        "C": num_channels,
    }
    constants = {"N": n, "DOTS": y is not None}
    run_kernel(collapse.collapse_kernel, (cdiv(num_tokens, tiles["BT"]),), arguments, constants | tiles)
    return out, dots


def _write(
    x: Tensor | None,
    y: Tensor | None,
    h_post: Tensor | None,
    h_res: Tensor | None,
    out: Tensor,
    *,
    transposed: bool = False,
) -> Tensor:
    """H_res x (or H_res^T x) where x is given, plus H_post y where y is, into `out`."""
    num_tokens, n, num_channels = out.shape
    tiles = config.choose_tiles("write", n, num_channels)
    arguments = {
        "x_ptr": x,
        "y_ptr": y,
        "h_post_ptr": h_post,
        "h_res_ptr": h_res,
        "out_ptr": out,
        "T": num_tokens,
        "C": num_channels,
    }
    constants = {"N": n, "MIX": x is not None, "TRANSPOSED": transposed, "BRANCH": y is not None}
    grid = (cdiv(num_tokens, tiles["BT"]), cdiv(num_channels, tiles["BC"]))
    run_kernel(write.write_kernel, grid, arguments, constants | tiles)
    return out


def _dot(x: Tensor, d_branch_in: Tensor | None, d_x_next: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """<x_i, d_branch_in> [n, T] and <d_x_next_i, x_j> [n, n, T], of those that are given."""
    num_tokens, n, num_channels = x.shape
    pre_dots = None if d_branch_in is None else x.new_empty(n, num_tokens, dtype=torch.float32)
    res_dots = None if d_x_next is None else x.new_empty(n, n, num_tokens, dtype=torch.float32)
    if pre_dots is None and res_dots is None:
        return None, None
    tiles = config.choose_tiles("dots_bwd", n, num_channels)
    arguments = {
        "x_ptr": x,
        "g_ptr": d_x_next,
        "du_ptr": d_branch_in,
        "pre_dots_ptr": pre_dots,
        "res_dots_ptr": res_dots,
        "T": num_tokens,
        "C": num_channels,
    }
    constants = {"N": n, "BRANCH": pre_dots is not None, "MIX": res_dots is not None}
    run_kernel(read_backward.dots_bwd_kernel, (cdiv(num_tokens, tiles["BT"]),), arguments, constants | tiles)
    return pre_dots, res_dots


def _backpropagate_streams(
    x: Tensor,
    phi: Tensor,
    d_branch_in: Tensor | None,
    d_x_next: Tensor | None,
    d_projected: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """d_x and d_phi. One kernel, 3n+1 rows."""
    num_tokens, n, num_channels = x.shape
    tiles = config.choose_tiles("streams_bwd", n, num_channels)
    num_blocks = cdiv(num_channels, tiles["BC"])
    groups, tiles_group = config.split_work(num_tokens, tiles["BT"], num_blocks, num_tokens)
    d_x, d_phi = torch.empty_like(x), phi.new_empty(groups if num_tokens else 0, *phi.shape)
    arguments = {
        "x_ptr": x,
        "g_ptr": d_x_next,
        "du_ptr": d_branch_in,
        "phi_ptr": phi,
        "d_projected_ptr": d_projected,
        "weights_ptr": weights,
        "d_x_ptr": d_x,
        "d_phi_ptr": d_phi,
        "T": num_tokens,
        "C": num_channels,
        "tiles_group": tiles_group,
    }
    constants: dict[str, Any] = {"N": n, "MP": config.pad_rows(n)}
    constants |= {"BRANCH": d_branch_in is not None, "MIX": d_x_next is not None}
    constants |= config.choose_precision(x.dtype, config.get_target())
    run_kernel(read_backward.streams_bwd_kernel, (num_blocks, len(d_phi)), arguments, constants | tiles)
    return d_x, d_phi.sum(0)


def _count_iters(n: int, num_iters: int) -> dict[str, int]:
    return {"num_iters": num_iters, "log_iters": count_log_iters(n, num_iters)}
