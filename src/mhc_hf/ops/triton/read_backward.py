"""The backward of everything that was computed from x: first the dots over channels, then d_x and d_phi.

Shapes: T tokens, N streams, C channels, M = (N+2)*N, MP the power of two above M. x, G (gradient of the streams after
the site), d_x [T, N, C], du (gradient of the branch's input) [T, C]; token-last float32: pre_dots [N, T],
res_dots [N, N, T] (into, from). Token-first float32, from `maps`: d_projected [T, M], weights [T, WIDTH] (h_res, h_pre,
what goes along x itself, and with NORM what makes du of the gradient of the normed input). gain [C], the norm's weight.
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

from .language import add_products, dot_streams, locate_tokens, narrow, store_rows, unzip, widen

# channels that streams standing side by side have in turn: as many as rows of a product are one warp's, so that streams
# cannot be told apart before the product has left its layout, in which numbers a token are held several times
SIDE = tl.constexpr(16)


@triton.jit(do_not_specialize=["T"])
def dots_bwd_kernel(
    x_ptr,
    g_ptr,
    du_ptr,
    gain_ptr,
    pre_dots_ptr,
    res_dots_ptr,
    T,
    C,
    N: tl.constexpr,
    BRANCH: tl.constexpr,
    MIX: tl.constexpr,
    NORM: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PTX: tl.constexpr,
    V: tl.constexpr,
):
    """pre_dots_i = <x_i, du> (with BRANCH; with NORM <x_i, gain * du>), res_dots_ij = <G_i, x_j> (with MIX).
    Grid: (T / BT,).
    """
    t, exists, T = locate_tokens(T, BT)
    NUM_DOTS: tl.constexpr = (N if BRANCH else 0) + (N * N if MIX else 0)
    sums = ()
    for _ in tl.static_range(NUM_DOTS):
        sums += (tl.zeros((BT, BC // V), tl.float32),)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = exists[:, None] & (c < C)[None, :]
        x = ()
        for j in tl.static_range(N):
            tile = tl.load(x_ptr + (t * N + j)[:, None] * C + c[None, :], mask=inside, other=0.0)
            x += (unzip(tile, V, BT, BC, PTX),)
        mixed = ()
        if MIX:
            for i in tl.static_range(N):
                g = tl.load(g_ptr + (t * N + i)[:, None] * C + c[None, :], mask=inside, other=0.0)
                g = unzip(g, V, BT, BC, PTX)
                for j in tl.static_range(N):
                    mixed += (add_products(sums[(N if BRANCH else 0) + i * N + j], g, x[j], V),)
        read = ()
        if BRANCH:
            du = widen(tl.load(du_ptr + t[:, None] * C + c[None, :], mask=inside, other=0.0), PTX)
            if NORM:
                # one a token, from the cache: a row spread over the tile would pass through shared memory
                channels = tl.broadcast_to(c[None, :], (BT, BC))
                du *= widen(tl.load(gain_ptr + channels, mask=inside, other=0.0), PTX)
            du = unzip(du, V, BT, BC, PTX)
            for j in tl.static_range(N):
                read += (add_products(sums[j], x[j], du, V),)
        sums = read + mixed
    dots = ()
    for k in tl.static_range(NUM_DOTS):
        dots += (tl.sum(sums[k], 1),)
    if BRANCH:
        store_rows(pre_dots_ptr, 0, dots, t, exists, T, N)
    if MIX:
        for k in tl.static_range(N * N):
            tl.store(res_dots_ptr + k * T + t, dots[(N if BRANCH else 0) + k], mask=exists)


@triton.jit
def separate_streams(tile, NP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """[BT, NP*BC], streams side by side, as a tuple of NP [BT, BC]."""
    tile = tl.permute(tl.reshape(tile, (BT, BC // SIDE, NP, SIDE)), (0, 1, 3, 2))
    parts = (tl.reshape(tile, (BT, BC, NP)),)
    # the last bit of a stream's number first: even streams, then odd ones
    for bit in tl.static_range(3):
        if 2 << bit <= NP:
            even, odd = (), ()
            for k in tl.static_range(1 << bit):
                halves = tl.split(tl.reshape(parts[k], (BT, BC, NP >> (bit + 1), 2)))
                even += (halves[0],)
                odd += (halves[1],)
            parts = even + odd
    streams = ()
    for j in tl.static_range(NP):
        streams += (tl.reshape(parts[j], (BT, BC)),)
    return streams


@triton.jit
def load_weights(weights_ptr, start, row, last, WIDTH: tl.constexpr):
    """The numbers of tokens start + row, as a tuple; of the last token for those after it."""
    pointer = weights_ptr + tl.cast(start, tl.int64) * WIDTH + tl.minimum(row, last - start - 1) * WIDTH
    weights = ()
    for k in tl.static_range(WIDTH):
        weights += (tl.load(pointer + k),)
    return weights


@triton.jit(do_not_specialize=["T", "tiles_group"])
def streams_bwd_kernel(
    x_ptr,
    g_ptr,
    du_ptr,
    phi_ptr,
    d_projected_ptr,
    weights_ptr,
    gain_ptr,
    d_x_ptr,
    d_phi_ptr,
    d_gain_ptr,
    T,
    C,
    tiles_group,
    N: tl.constexpr,
    NP: tl.constexpr,
    MP: tl.constexpr,
    BRANCH: tl.constexpr,
    MIX: tl.constexpr,
    NORM: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT_PRECISION: tl.constexpr,
):
    """d_x_j = sum_i H_ij G_i (with MIX) + h_pre_j du (with BRANCH) + along x_j + d_projected . phi_j, and the partial
    sum over tiles_group * BT tokens of d_phi = d_projected x, [groups, M, N*C], with NORM also of d_gain, [groups, C].
    G is mixed here and only here, so no partial d_x exists. Grid: (C / BC, groups).
    """
    M: tl.constexpr = (N + 2) * N
    WIDTH: tl.constexpr = N * N + N + (3 if NORM else 1)
    group = tl.program_id(1)
    m = tl.arange(0, MP)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    # all streams side by side, SIDE channels of each in turn: one product serves them all
    k = tl.arange(0, NP * BC)
    stream = k // SIDE % NP
    c_all = tl.program_id(0) * BC + k // (SIDE * NP) * SIDE + k % SIDE
    columns = stream * C + c_all
    columns_exist = (stream < N) & (c_all < C)
    phi_rows = (m * (N * C))[None, :] + columns[:, None]
    phi_exists = (m < M)[None, :] & columns_exist[:, None]
    phi = tl.load(phi_ptr + phi_rows, mask=phi_exists, other=0.0)
    d_phi = tl.zeros((NP * BC, MP), tl.float32)
    if NORM:
        gain = tl.load(gain_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        d_gain = tl.zeros((BT, BC), tl.float32)
    last = min(T, (group + 1) * tiles_group * BT)
    row = tl.arange(0, BT)
    begin = group * tiles_group * BT
    weights = load_weights(weights_ptr, begin, row, last, WIDTH)
    for start in tl.range(begin, last, BT, num_stages=STAGES):
        t = tl.cast(start, tl.int64)
        exists = row < last - start
        inside = exists[:, None] & (c < C)[None, :]
        inside_all = exists[:, None] & columns_exist[None, :]
        d_projected = tl.load(
            d_projected_ptr + t * M + (row * M)[:, None] + m[None, :],
            mask=exists[:, None] & (m < M)[None, :],
            other=0.0,
        )
        # before all else and transposed, or the sums below take the layout of a product
        product = tl.dot(phi, tl.trans(d_projected), input_precision=OUT_PRECISION)
        product = separate_streams(tl.trans(product), NP, BT, BC)
        x_all = tl.load(x_ptr + t * (N * C) + (row * (N * C))[:, None] + columns[None, :], mask=inside_all, other=0.0)
        x = separate_streams(x_all, NP, BT, BC)
        if MIX:
            g = tl.load(g_ptr + t * (N * C) + (row * (N * C))[:, None] + columns[None, :], mask=inside_all, other=0.0)
            g = separate_streams(g, NP, BT, BC)
        if BRANCH:
            du = widen(tl.load(du_ptr + t * C + (row * C)[:, None] + c[None, :], mask=inside, other=0.0), PTX)
        if NORM:
            u = tl.zeros((BT, BC), tl.float32)
            for j in tl.static_range(N):
                u += weights[N * N + j][:, None] * widen(x[j], PTX)
            du *= weights[N * N + N + 1][:, None]
            d_gain += u * du
            du = gain * du - weights[N * N + N + 2][:, None] * u
        for j in tl.static_range(N):
            total = product[j] + weights[N * N + N][:, None] * widen(x[j], PTX)
            if BRANCH:
                total += weights[N * N + j][:, None] * du
            if MIX:
                for i in tl.static_range(N):
                    total += weights[i * N + j][:, None] * widen(g[i], PTX)
            d_x = narrow(total, d_x_ptr.dtype.element_ty)
            tl.store(d_x_ptr + t * (N * C) + (row * (N * C))[:, None] + (j * C + c)[None, :], d_x, mask=inside)
        # ahead, and under a condition: else each number would be copied through shared memory as tiles are
        if start + BT < last:
            weights = load_weights(weights_ptr, start + BT, row, last, WIDTH)
        d_phi = dot_streams(tl.trans(x_all), d_projected, d_phi, PRECISION)
    tl.store(d_phi_ptr + group.to(tl.int64) * M * (N * C) + phi_rows, d_phi, mask=phi_exists)
    if NORM:
        tl.store(d_gain_ptr + group.to(tl.int64) * C + c, tl.sum(d_gain, 0), mask=c < C)
