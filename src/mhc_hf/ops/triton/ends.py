"""The two ends of a model in inference: hidden states widened and projected, the last streams written as their mean.

Shapes: T tokens, N streams, C channels, M = (N+2)*N, MP the power of two above M. hidden, y, mean [T, C], x, out
[T, N, C], h_post [N, T], h_res [N, N, T], phi [M, N*C], partial [SPLITS, ROWS, T] as in `project`.
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

from .language import add_products, dot_streams, load_rows, locate_tokens, narrow, unzip
from .project import store_partial
from .write import mix_stream


@triton.jit(do_not_specialize=["T", "tiles_split"])
def widen_project_kernel(
    hidden_ptr,
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
):
    """out = N copies of hidden, and what `project_fwd_kernel` finds of them. Grid: (T / BT, SPLITS), as there."""
    M: tl.constexpr = (N + 2) * N
    t, exists, T = locate_tokens(T, BT)
    split = tl.program_id(1)
    m = tl.arange(0, MP)
    projected = tl.zeros((BT, MP), tl.float32)
    squares = tl.zeros((BT, BC // V), tl.float32)
    for tile in range(split * tiles_split, min(tl.cdiv(C, BC), (split + 1) * tiles_split)):
        c = tile * BC + tl.arange(0, BC)
        inside = exists[:, None] & (c < C)[None, :]
        hidden = tl.load(hidden_ptr + t[:, None] * C + c[None, :], mask=inside, other=0.0)
        # the streams are equal: one product with the sum of their rows of phi
        phi = tl.zeros((BC, MP), tl.float32)
        for i in tl.static_range(N):
            tl.store(out_ptr + (t * N + i)[:, None] * C + c[None, :], hidden, mask=inside)
            rows = phi_ptr + m[None, :] * (N * C) + (i * C + c)[:, None]
            phi += tl.load(rows, mask=(m < M)[None, :] & (c < C)[:, None], other=0.0)
        projected = dot_streams(hidden, phi, projected, PRECISION)
        parts = unzip(hidden, V, BT, BC, PTX)
        squares = add_products(squares, parts, parts, V)
    # all their Gram numbers are one; without those their sum of squares is N of it
    sums = ()
    for _ in tl.static_range(N * (N + 1) // 2 if GRAM else 1):
        sums += (squares if GRAM else N * squares,)
    store_partial(partial_ptr, projected, sums, t, T, m, N, BT, GRAM, False)


@triton.jit(do_not_specialize=["T"])
def write_collapse_kernel(
    x_ptr,
    y_ptr,
    h_post_ptr,
    h_res_ptr,
    mean_ptr,
    T,
    C,
    N: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """The mean of the streams that `write_kernel` would write, H_res x + H_post y. Grid: (T / BT, C / BC)."""
    t, exists, T = locate_tokens(T, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = exists[:, None] & (c < C)[None, :]
    h_post = load_rows(h_post_ptr, 0, t, exists, T, N)
    h_res = load_rows(h_res_ptr, 0, t, exists, T, N * N)
    y = tl.load(y_ptr + t[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    x = ()
    for j in tl.static_range(N):
        tile = tl.load(x_ptr + (t * N + j)[:, None] * C + c[None, :], mask=inside, other=0.0)
        x += (tile.to(tl.float32),)
    first = tl.zeros((BT, BC), tl.float32)
    apart = tl.zeros((BT, BC), tl.float32)
    for i in tl.static_range(N):
        # rounded as if it had been written
        written = narrow(mix_stream(i, x, y, h_post, h_res, N), mean_ptr.dtype.element_ty).to(tl.float32)
        if i == 0:
            first = written
        else:
            apart += written - first
    # from the first stream on: the mean of copies is then the copy, to the bit, for every N
    mean = narrow(first + apart * (1.0 / N), mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + t[:, None] * C + c[None, :], mean, mask=inside)
