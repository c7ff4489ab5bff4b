"""The projection of a site: phi @ x_vec, the sum of squares and the Gram numbers, from one pass over the streams.

Shapes: T tokens, N streams, C channels, M = (N+2)*N rows of phi, MP the power of two above M, SPLITS parts of C that
are summed later in fixed order. x [T, N, C] any dtype, phi [M, N*C] float32, partial [SPLITS, ROWS, T] float32: M
projections, the sum of squares, and with GRAM the N*(N+1)/2 numbers <x_i, x_j>, j <= i, at i*(i+1)/2 + j.
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

from .language import add_products, dot_streams, locate_tokens, place_channels, place_operand, place_tokens, unzip


@triton.jit
def start_squares(BT: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, N: tl.constexpr, GRAM: tl.constexpr):
    """Zeros for `add_squares`: the Gram numbers, or the sum of squares alone, in parts of a row."""
    sums = ()
    for _ in tl.static_range(N * (N + 1) // 2 if GRAM else 1):
        sums += (tl.zeros((BT, BC // V), tl.float32),)
    return sums


@triton.jit
def add_squares(
    sums,
    x,
    V: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    N: tl.constexpr,
    GRAM: tl.constexpr,
    PTX: tl.constexpr,
):
    """`sums` and the products of a tile of all streams, x a tuple of N [BT, BC]."""
    parts = ()
    for i in tl.static_range(N):
        parts += (unzip(x[i], V, BT, BC, PTX),)
    result = ()
    if GRAM:
        for i in tl.static_range(N):
            for j in tl.static_range(i + 1):
                result += (add_products(sums[i * (i + 1) // 2 + j], parts[i], parts[j], V),)
    else:
        total = sums[0]
        for i in tl.static_range(N):
            total += add_products(tl.zeros_like(total), parts[i], parts[i], V)
        result += (total,)
    return result


@triton.jit
def project_stream(
    x,
    phi_ptr,
    i: tl.constexpr,
    first,
    m,
    C,
    projected,
    N: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
):
    """projected [BT, MP] plus phi's share of a tile of stream i, x [BT, BC], channels from `first` on."""
    M: tl.constexpr = (N + 2) * N
    c = first + place_channels(BC, REORDER)
    phi = tl.load(
        phi_ptr + m[None, :] * (N * C) + (i * C + c)[:, None], mask=(m < M)[None, :] & (c < C)[:, None], other=0.0
    )
    return dot_streams(place_operand(x, BT, BC, REORDER), phi, projected, PRECISION)


@triton.jit
def store_partial(
    partial_ptr,
    projected,
    sums,
    t,
    T,
    m,
    N: tl.constexpr,
    BT: tl.constexpr,
    GRAM: tl.constexpr,
    REORDER: tl.constexpr,
):
    """This split's rows of partial."""
    M: tl.constexpr = (N + 2) * N
    ROWS: tl.constexpr = M + 1 + (N * (N + 1) // 2 if GRAM else 0)
    row = tl.program_id(1).to(tl.int64) * ROWS
    placed = place_tokens(t, tl.program_id(0).to(tl.int64) * BT, BT, REORDER)
    kept = (placed < T)[:, None] & (m < M)[None, :]
    tl.store(partial_ptr + (row + m)[None, :] * T + placed[:, None], projected, mask=kept)
    products = ()
    for k in tl.static_range(N * (N + 1) // 2 if GRAM else 1):
        products += (tl.sum(sums[k], 1),)
    squares = products[0]
    if GRAM:
        for i in tl.static_range(1, N):
            squares += products[i * (i + 1) // 2 + i]
        for k in tl.static_range(N * (N + 1) // 2):
            tl.store(partial_ptr + (row + M + 1 + k) * T + t, products[k], mask=t < T)
    tl.store(partial_ptr + (row + M) * T + t, squares, mask=t < T)


@triton.jit(do_not_specialize=["T", "tiles_split"])
def project_fwd_kernel(
    x_ptr,
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
    """Grid: (T / BT, SPLITS); a split covers tiles_split tiles of BC channels of every stream."""
    t, exists, T = locate_tokens(T, BT)
    split = tl.program_id(1)
    m = tl.arange(0, MP)
    projected = tl.zeros((BT, MP), tl.float32)
    sums = start_squares(BT, BC, V, N, GRAM)
    # whole tiles, or the compiler could not prove a load aligned and would make it number by number
    for tile in range(split * tiles_split, min(tl.cdiv(C, BC), (split + 1) * tiles_split)):
        c = tile * BC + tl.arange(0, BC)
        inside = exists[:, None] & (c < C)[None, :]
        x = ()
        for i in tl.static_range(N):
            x += (tl.load(x_ptr + (t * N + i)[:, None] * C + c[None, :], mask=inside, other=0.0),)
        for i in tl.static_range(N):
            projected = project_stream(x[i], phi_ptr, i, tile * BC, m, C, projected, N, BT, BC, PRECISION, False)
        sums = add_squares(sums, x, V, BT, BC, N, GRAM, PTX)
    store_partial(partial_ptr, projected, sums, t, T, m, N, BT, GRAM, False)
