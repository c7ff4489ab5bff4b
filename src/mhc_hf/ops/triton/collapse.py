"""Streams weighed and summed, and their dots with a branch, from one pass over the streams.

Shapes: T tokens, N streams, C channels. x [T, N, C], y [T, C], weights [N, T], out [T, C], dots [N, T] float32.
Forward it is H_pre x; in the backward of a write, with x the gradient of the new streams and y the branch's output, it
is d_branch_out and d_h_post.
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

from .language import add_products, load_rows, locate_tokens, narrow, store_rows, unzip, widen


@triton.jit(do_not_specialize=["T"])
def collapse_kernel(
    x_ptr,
    weights_ptr,
    y_ptr,
    out_ptr,
    dots_ptr,
    T,
    C,
    N: tl.constexpr,
    DOTS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PTX: tl.constexpr,
    V: tl.constexpr,
):
    """out = sum of weights_i x_i; with DOTS also dots_i = <x_i, y>. Grid: (T / BT,)."""
    t, exists, T = locate_tokens(T, BT)
    weights = load_rows(weights_ptr, 0, t, exists, T, N)
    sums = ()
    for _ in tl.static_range(N if DOTS else 0):
        sums += (tl.zeros((BT, BC // V), tl.float32),)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = exists[:, None] & (c < C)[None, :]
        if DOTS:
            y = unzip(tl.load(y_ptr + t[:, None] * C + c[None, :], mask=inside, other=0.0), V, BT, BC, PTX)
        total = tl.zeros((BT, BC), tl.float32)
        next_sums = ()
        for i in tl.static_range(N):
            x = widen(tl.load(x_ptr + (t * N + i)[:, None] * C + c[None, :], mask=inside, other=0.0), PTX)
            total += weights[i][:, None] * x
            if DOTS:
                next_sums += (add_products(sums[i], unzip(x, V, BT, BC, PTX), y, V),)
        sums = next_sums
        tl.store(out_ptr + t[:, None] * C + c[None, :], narrow(total, out_ptr.dtype.element_ty), mask=inside)
    if DOTS:
        dots = ()
        for i in tl.static_range(N):
            dots += (tl.sum(sums[i], 1),)
        store_rows(dots_ptr, 0, dots, t, exists, T, N)
