"""The projection of a site: phi @ x_vec and the sum of squares of x_vec, from one pass over the streams.

Shapes: T tokens, K = N*C numbers a token, M = (N+2)*N rows of phi, MP the power of two above M, SPLITS parts of K that
are summed later in fixed order. x [T, K] any dtype, phi [M, K] float32, partial [SPLITS, M + 1, T] float32 whose last
row is the sum of squares. n does not appear: to a projection, streams are one vector.
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

from .language import dot_streams, locate_tokens


@triton.jit(do_not_specialize=["T", "tiles_split"])
def project_fwd_kernel(
    x_ptr,
    phi_ptr,
    partial_ptr,
    T,
    K,
    tiles_split,
    M: tl.constexpr,
    MP: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (T / BT, SPLITS); a split covers tiles_split tiles of BK numbers."""
    t, exists, T = locate_tokens(T, BT)
    split = tl.program_id(1)
    m = tl.arange(0, MP)
    projected = tl.zeros((BT, MP), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    # whole tiles, or the compiler could not prove a load aligned and would make it number by number
    for tile in range(split * tiles_split, min(tl.cdiv(K, BK), (split + 1) * tiles_split)):
        k = tile * BK + tl.arange(0, BK)
        x = tl.load(x_ptr + t[:, None] * K + k[None, :], mask=exists[:, None] & (k < K)[None, :], other=0.0)
        phi = tl.load(phi_ptr + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        projected = dot_streams(x, phi, projected, PRECISION)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
    row = split.to(tl.int64) * (M + 1)
    tl.store(partial_ptr + (row + m)[None, :] * T + t[:, None], projected, mask=exists[:, None] & (m < M)[None, :])
    tl.store(partial_ptr + (row + M) * T + t, squares, mask=exists)
