"""One launcher a kernel: allocates what the kernel writes, names its arguments, chooses its tiles.

Shapes: T tokens, n streams, C channels of one stream, m = (n+2)*n. x [T, n, C], branch tensors [T, C], numbers a token
token-last: h_pre [n, T], h_post [n, T], h_res [n, n, T], projected [m, T], inv_rms [T]. partial [splits, rows, T] is
what `maps` makes the maps of: m projections, the sum of squares, and after a pass with `gram` n*(n+1)/2 Gram numbers.
All contiguous.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..sinkhorn import count_log_iters
from . import collapse, config, ends, maps, project, read_backward, write
from .config import cdiv
from .record import run_kernel


def count_iters(n: int, num_iters: int) -> dict[str, int]:
    """The iterations as kernels take them."""
    return {"num_iters": num_iters, "log_iters": count_log_iters(n, num_iters)}


def project_streams(x: Tensor, phi: Tensor, gram: bool) -> Tensor:
    """partial of x. n rows."""
    tiles = config.choose_tiles("project", x.shape[1], x.shape[2], x.dtype)
    arguments, constants, grid = _plan_projection(x, phi, gram, tiles)
    run_kernel(project.project_fwd_kernel, grid, {"x_ptr": x, **arguments}, constants | tiles)
    return arguments["partial_ptr"]


def write_and_project(
    x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, gram: bool
) -> tuple[Tensor, Tensor]:
    """x' = H_res x + H_post F, and partial of x'. 2n+1 rows."""
    x_next = torch.empty_like(x)
    tiles = config.choose_tiles("write_project", x.shape[1], x.shape[2], x.dtype)
    arguments, constants, grid = _plan_projection(x, phi, gram, tiles)
    constants["REORDER"] = config.can_reorder(tiles, x.dtype)
    written = {"x_ptr": x, "y_ptr": branch_out, "h_post_ptr": h_post, "h_res_ptr": h_res, "out_ptr": x_next}
    run_kernel(write.write_project_kernel, grid, written | arguments, constants | tiles)
    return x_next, arguments["partial_ptr"]


def widen_and_project(hidden: Tensor, n: int, phi: Tensor, gram: bool) -> tuple[Tensor, Tensor]:
    """n streams equal to hidden [T, C], and partial of them. n+1 rows."""
    num_tokens, num_channels = hidden.shape
    x = hidden.new_empty(num_tokens, n, num_channels)
    tiles = config.choose_tiles("widen_project", n, num_channels, x.dtype)
    arguments, constants, grid = _plan_projection(x, phi, gram, tiles)
    run_kernel(ends.widen_project_kernel, grid, {"hidden_ptr": hidden, "out_ptr": x, **arguments}, constants | tiles)
    return x, arguments["partial_ptr"]


def write_and_collapse(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The mean [T, C] of x' = H_res x + H_post F, which is not written itself. n+2 rows."""
    num_tokens, n, num_channels = x.shape
    mean = x.new_empty(num_tokens, num_channels)
    tiles = config.choose_tiles("write_collapse", n, num_channels, x.dtype)
    written = {"x_ptr": x, "y_ptr": branch_out, "h_post_ptr": h_post, "h_res_ptr": h_res, "mean_ptr": mean}
    grid = (cdiv(num_tokens, tiles["BT"]), cdiv(num_channels, tiles["BC"]))
    arguments = {**written, "T": num_tokens, "C": num_channels}
    run_kernel(ends.write_collapse_kernel, grid, arguments, {"N": n} | tiles)
    return mean


def shape_partial(x: Tensor, gram: bool) -> tuple[int, int, int]:
    """The shape of what `write_and_project` returns as partial."""
    num_tokens, n, num_channels = x.shape
    tiles = config.choose_tiles("write_project", n, num_channels, x.dtype)
    splits, _ = config.split_channels(num_channels, tiles["BC"], cdiv(num_tokens, tiles["BT"]))
    return splits, _count_partial_rows(n, gram), num_tokens


def compute_maps(
    partial: Tensor,
    x: Tensor,
    bias: Tensor,
    alpha: Tensor,
    num_iters: int,
    norm_eps: float,
    *,
    collapses: bool,
    saves: bool = True,
    gain: Tensor | None = None,
    gain_eps: float = 0.0,
) -> tuple[Tensor, ...]:
    """Maps from projections; the first is branch_in with `collapses` (n+1 rows), h_pre without.

    With `gain` branch_in is normed. After the maps, with `saves`, comes what backward needs: projected, inv_rms, and
    with `gain` branch_inv_rms [T] and read_dots [n, T].
    """
    (num_tokens, n, num_channels), (num_splits, rows, _) = x.shape, partial.shape
    h_post, h_res = partial.new_empty(n, num_tokens), partial.new_empty(n, n, num_tokens)
    first = x.new_empty(num_tokens, num_channels) if collapses else partial.new_empty(n, num_tokens)
    saved: tuple[Tensor, ...] = ()
    if saves:
        saved = (partial.new_empty((n + 2) * n, num_tokens), partial.new_empty(num_tokens))
        if gain is not None:
            saved += (partial.new_empty(num_tokens), partial.new_empty(n, num_tokens))
    projected, inv_rms, branch_inv_rms, read_dots = (*saved, None, None, None, None)[:4]
    tiles = config.choose_tiles("maps_fwd", n, num_channels, x.dtype)
    num_blocks, parts, tiles_part = cdiv(num_tokens, tiles["BT"]), 1, 0
    if collapses:
        parts, tiles_part = config.split_work(num_channels, tiles["BC"], num_blocks, num_channels)
    arguments = {
        "partial_ptr": partial,
        "totals_ptr": partial if num_splits == 1 else partial.new_empty(rows, num_tokens),
        "bias_ptr": bias,
        "alpha_ptr": alpha,
        "x_ptr": x if collapses else None,
        "projected_ptr": projected,
        "inv_rms_ptr": inv_rms,
        "h_pre_ptr": None if collapses else first,
        "h_post_ptr": h_post,
        "h_res_ptr": h_res,
        "branch_in_ptr": first if collapses else None,
        "gain_ptr": gain,
        "branch_inv_rms_ptr": branch_inv_rms,
        "read_dots_ptr": read_dots,
        "T": num_tokens,
        "C": num_channels,
        **count_iters(n, num_iters),
        "num_splits": num_splits,
        "rows": rows,
        "tiles_part": tiles_part,
        "norm_eps": norm_eps,
        "gain_eps": gain_eps,
    }
    constants = {"N": n, "COLLAPSE": collapses, "NORM": gain is not None, "SAVES": saves}
    # one more for H_res, where channels are shared
    grid = (num_blocks, parts if parts == 1 else parts + 1)
    run_kernel(maps.maps_fwd_kernel, grid, arguments, constants | tiles)
    return first, h_post, h_res, *saved


def collapse_streams(x: Tensor, weights: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Sum of weights_i x_i (n+1 rows), and with y also <x_i, y> (n+2)."""
    num_tokens, n, num_channels = x.shape
    out = x.new_empty(num_tokens, num_channels)
    dots = None if y is None else torch.empty_like(weights)
    tiles = config.choose_tiles("collapse", n, num_channels, x.dtype)
    arguments = {
        "x_ptr": x,
        "weights_ptr": weights,
        "y_ptr": y,
        "out_ptr": out,
        "dots_ptr": dots,
        "T": num_tokens,
        "C": num_channels,
    }
    constants = {"N": n, "DOTS": y is not None, "PTX": config.has_ptx()} | config.count_together(tiles, x.dtype)
    run_kernel(collapse.collapse_kernel, (cdiv(num_tokens, tiles["BT"]),), arguments, constants | tiles)
    return out, dots


def write_streams(
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
    tiles = config.choose_tiles("write", n, num_channels, out.dtype)
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


def dot_streams(
    x: Tensor, d_branch_in: Tensor | None, d_x_next: Tensor | None, gain: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """<x_i, d_branch_in> [n, T], or <x_i, gain * d_branch_in>, and <d_x_next_i, x_j> [n, n, T], of what is given."""
    num_tokens, n, num_channels = x.shape
    pre_dots = None if d_branch_in is None else x.new_empty(n, num_tokens, dtype=torch.float32)
    res_dots = None if d_x_next is None else x.new_empty(n, n, num_tokens, dtype=torch.float32)
    if pre_dots is None and res_dots is None:
        return None, None
    tiles = config.choose_tiles("dots_bwd", n, num_channels, x.dtype)
    arguments = {
        "x_ptr": x,
        "g_ptr": d_x_next,
        "du_ptr": d_branch_in,
        "gain_ptr": gain,
        "pre_dots_ptr": pre_dots,
        "res_dots_ptr": res_dots,
        "T": num_tokens,
        "C": num_channels,
    }
    constants = {"N": n, "BRANCH": pre_dots is not None, "MIX": res_dots is not None, "NORM": gain is not None}
    constants |= {"PTX": config.has_ptx(), **config.count_together(tiles, x.dtype)}
    run_kernel(read_backward.dots_bwd_kernel, (cdiv(num_tokens, tiles["BT"]),), arguments, constants | tiles)
    return pre_dots, res_dots


def backpropagate_maps(
    projected: Tensor,
    inv_rms: Tensor,
    bias: Tensor,
    alpha: Tensor,
    num_iters: int,
    num_channels: int,
    *,
    pre_dots: Tensor | None,
    d_h_pre: Tensor | None,
    d_h_post: Tensor | None,
    res_dots: Tensor | None,
    d_h_res: Tensor | None,
    branch_inv_rms: Tensor | None = None,
    read_dots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_logits [m, T]; token-first d_projected [T, m] and weights [T, n*n + n + 1], or + 3 with a norm. No rows."""
    (num_tokens,), normed = inv_rms.shape, branch_inv_rms is not None
    n = isqrt(len(bias) + 1) - 1  # (n+2)*n numbers
    d_logits, d_projected = torch.empty_like(projected), projected.new_empty(num_tokens, len(bias))
    weights = projected.new_empty(num_tokens, n * n + n + (3 if normed else 1))
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
        "branch_inv_rms_ptr": branch_inv_rms,
        "read_dots_ptr": read_dots,
        "sums_ptr": projected.new_empty(2 * num_iters, n, num_tokens),
        "d_logits_ptr": d_logits,
        "d_projected_ptr": d_projected,
        "weights_ptr": weights,
        "T": num_tokens,
        "C": num_channels,
        **count_iters(n, num_iters),
    }
    constants = {
        "N": n,
        "HAS_PRE_DOTS": pre_dots is not None,
        "HAS_H_PRE": d_h_pre is not None,
        "HAS_H_POST": d_h_post is not None,
        "HAS_RES_DOTS": res_dots is not None,
        "HAS_H_RES": d_h_res is not None,
        "NORM": normed,
    }
    tiles = config.choose_tiles("maps_bwd", n, 1)
    run_kernel(maps.maps_bwd_kernel, (cdiv(num_tokens, tiles["BT"]),), arguments, constants | tiles)
    return d_logits, d_projected, weights


def backpropagate_streams(
    x: Tensor,
    phi: Tensor,
    d_branch_in: Tensor | None,
    d_x_next: Tensor | None,
    d_projected: Tensor,
    weights: Tensor,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """d_x, d_phi and with a norm d_gain [C] float32. 3n+1 rows.

    Parameters get sums over blocks of tokens that are added in their order: the same run gives the same bits.
    """
    num_tokens, n, num_channels = x.shape
    tiles = config.choose_tiles("streams_bwd", n, num_channels, x.dtype)
    num_blocks = cdiv(num_channels, tiles["BC"])
    groups, tiles_group = config.split_work(num_tokens, tiles["BT"], num_blocks, num_tokens)
    groups = groups if num_tokens else 0
    d_x, d_phi = torch.empty_like(x), phi.new_empty(groups, *phi.shape)
    d_gain = None if gain is None else phi.new_empty(groups, num_channels)
    arguments = {
        "x_ptr": x,
        "g_ptr": d_x_next,
        "du_ptr": d_branch_in,
        "phi_ptr": phi,
        "d_projected_ptr": d_projected,
        "weights_ptr": weights,
        "gain_ptr": gain,
        "d_x_ptr": d_x,
        "d_phi_ptr": d_phi,
        "d_gain_ptr": d_gain,
        "T": num_tokens,
        "C": num_channels,
        "tiles_group": tiles_group,
    }
    constants: dict[str, Any] = {"N": n, "NP": config.next_power_of_2(n), "MP": config.pad_rows(n)}
    constants |= {"STAGES": tiles["num_stages"], "PTX": config.has_ptx()}
    constants |= {"BRANCH": d_branch_in is not None, "MIX": d_x_next is not None, "NORM": gain is not None}
    constants |= config.choose_precision(x.dtype, config.get_target(), n)
    run_kernel(read_backward.streams_bwd_kernel, (num_blocks, groups), arguments, constants | tiles)
    return d_x, d_phi.sum(0), None if d_gain is None else d_gain.sum(0)


def _plan_projection(
    x: Tensor, phi: Tensor, gram: bool, tiles: dict[str, int]
) -> tuple[dict[str, Any], dict[str, Any], tuple[int, int]]:
    """Arguments, constants and grid that the two kernels which project have in common."""
    num_tokens, n, num_channels = x.shape
    num_blocks = cdiv(num_tokens, tiles["BT"])
    splits, tiles_split = config.split_channels(num_channels, tiles["BC"], num_blocks)
    arguments = {
        "phi_ptr": phi,
        "partial_ptr": phi.new_empty(splits, _count_partial_rows(n, gram), num_tokens),
        "T": num_tokens,
        "C": num_channels,
        "tiles_split": tiles_split,
    }
    precision = config.choose_precision(x.dtype, config.get_target())["PRECISION"]
    constants = {"N": n, "MP": config.pad_rows(n), "GRAM": gram, "PRECISION": precision, "PTX": config.has_ptx()}
    constants |= config.count_together(tiles, x.dtype)
    return arguments, constants, (num_blocks, splits)


def _count_partial_rows(n: int, gram: bool) -> int:
    return (n + 2) * n + 1 + (n * (n + 1) // 2 if gram else 0)
