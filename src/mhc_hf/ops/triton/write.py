"""Streams mixed and written: x' = H_res x + H_post y, alone and with the next site's projection in the same pass.

Shapes: T tokens, N streams, C channels, M = (N+2)*N, MP the power of two above M. x, out [T, N, C], y [T, C],
h_post [N, T], h_res [N, N, T], phi [M, N*C], partial [SPLITS, ROWS, T] as in `project`.
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

from .language import load_rows, locate_tokens, narrow, widen
from .project import add_squares, project_stream, start_squares, store_partial


@triton.jit
def mix_stream(i: tl.constexpr, x, y, h_post, h_res, N: tl.constexpr):
    """Stream i of H_res x + H_post y, float32; x a tuple of N [BT, BC], y [BT, BC]."""
    total = h_post[i][:, None] * y
    for j in tl.static_range(N):
        total += h_res[i * N + j][:, None] * x[j]
    return total


@triton.jit(do_not_specialize=["T"])
def write_kernel(
    x_ptr,
    y_ptr,
    h_post_ptr,
    h_res_ptr,
    out_ptr,
    T,
    C,
    N: tl.constexpr,
    MIX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BRANCH: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """out = H_res x (with MIX; H_res^T x where TRANSPOSED) + H_post y (with BRANCH). Grid: (T / BT, C / BC)."""
    t, exists, T = locate_tokens(T, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = exists[:, None] & (c < C)[None, :]
    x = ()
    if MIX:
        h_res = load_rows(h_res_ptr, 0, t, exists, T, N * N)
        for j in tl.static_range(N):
            tile = tl.load(x_ptr + (t * N + j)[:, None] * C + c[None, :], mask=inside, other=0.0)
            x += (tile.to(tl.float32),)
    if BRANCH:
        h_post = load_rows(h_post_ptr, 0, t, exists, T, N)
        y = tl.load(y_ptr + t[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(N):
        total = tl.zeros((BT, BC), tl.float32)
        if BRANCH:
            total += h_post[i][:, None] * y
        if MIX:
            for j in tl.static_range(N):
                total += h_res[j * N + i if TRANSPOSED else i * N + j][:, None] * x[j]
        out = narrow(total, out_ptr.dtype.element_ty)
        tl.store(out_ptr + (t * N + i)[:, None] * C + c[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["T", "tiles_split"])
def write_project_kernel(
    x_ptr,
    y_ptr,
    h_post_ptr,
    h_res_ptr,
    out_ptr,
    phi_ptr,
    partial_ptr,
    T,
    C,
    tiles_split,
    N: tl.constexpr,
    MP: tl.constexpr,
    GRAM: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    V: tl.constexpr,
    REORDER: tl.constexpr,
):
    """`write_kernel`, and `project_fwd_kernel` of what it wrote. Grid: (T / BT, SPLITS) of tiles_split tiles each."""
    t, exists, T = locate_tokens(T, BT)
    split = tl.program_id(1)
    m = tl.arange(0, MP)
    loaded = load_rows(h_post_ptr, 0, t, exists, T, N)
    h_post = ()
    for i in tl.static_range(N):
        # changes nothing. From a product's operand back to what is loaded there must not only be arithmetic, or the
        # compiler mixes streams in the layout of the operands, a second time or with every number several times
        h_post += (tl.where(exists, loaded[i], 0.0),)
    h_res = load_rows(h_res_ptr, 0, t, exists, T, N * N)
    projected = tl.zeros((BT, MP), tl.float32)
    sums = start_squares(BT, BC, V, N, GRAM)
    for tile in range(split * tiles_split, min(tl.cdiv(C, BC), (split + 1) * tiles_split)):
        c = tile * BC + tl.arange(0, BC)
        inside = exists[:, None] & (c < C)[None, :]
        y = widen(tl.load(y_ptr + t[:, None] * C + c[None, :], mask=inside, other=0.0), PTX)
        x = ()
        for j in tl.static_range(N):
            x += (widen(tl.load(x_ptr + (t * N + j)[:, None] * C + c[None, :], mask=inside, other=0.0), PTX),)
        written = ()
        for i in tl.static_range(N):
            # what the next site reads is what memory holds, rounded
            out = narrow(mix_stream(i, x, y, h_post, h_res, N), out_ptr.dtype.element_ty)
            tl.store(out_ptr + (t * N + i)[:, None] * C + c[None, :], out, mask=inside)
            written += (out,)
        for i in tl.static_range(N):
            projected = project_stream(
                written[i], phi_ptr, i, tile * BC, m, C, projected, N, BT, BC, PRECISION, REORDER
            )
        sums = add_squares(sums, written, V, BT, BC, N, GRAM, PTX)
    store_partial(partial_ptr, projected, sums, t, T, m, N, BT, GRAM, REORDER)
