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

from .language import add_products, dot_weights, locate_tokens, narrow, store_rows, unzip


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
):
    """pre_dots_i = <x_i, du> (with BRANCH; with NORM <x_i, gain * du>), res_dots_ij = <G_i, x_j> (with MIX).
    Grid: (T / BT,).
    """
    t, exists, T = locate_tokens(T, BT)
    NUM_DOTS: tl.constexpr = (N if BRANCH else 0) + (N * N if MIX else 0)
    V: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    sums = ()
    for _ in tl.static_range(NUM_DOTS):
        sums += (tl.zeros((BT, BC // V), tl.float32),)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = exists[:, None] & (c < C)[None, :]
        x = ()
        for j in tl.static_range(N):
            tile = tl.load(x_ptr + (t * N + j)[:, None] * C + c[None, :], mask=inside, other=0.0)
            x += (unzip(tile, V, BT, BC),)
        next_sums = ()
        if BRANCH:
            du = tl.load(du_ptr + t[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            if NORM:
                # one a token, from the cache: a row spread over the tile would pass through shared memory
                channels = tl.broadcast_to(c[None, :], (BT, BC))
                du *= tl.load(gain_ptr + channels, mask=inside, other=0.0).to(tl.float32)
            du = unzip(du, V, BT, BC)
            for j in tl.static_range(N):
                next_sums += (add_products(sums[j], x[j], du, V),)
        if MIX:
            for i in tl.static_range(N):
                g = unzip(tl.load(g_ptr + (t * N + i)[:, None] * C + c[None, :], mask=inside, other=0.0), V, BT, BC)
                for j in tl.static_range(N):
                    next_sums += (add_products(sums[(N if BRANCH else 0) + i * N + j], g, x[j], V),)
        sums = next_sums
    dots = ()
    for k in tl.static_range(NUM_DOTS):
        dots += (tl.sum(sums[k], 1),)
    if BRANCH:
        store_rows(pre_dots_ptr, 0, dots, t, exists, T, N)
    if MIX:
        for k in tl.static_range(N * N):
            tl.store(res_dots_ptr + k * T + t, dots[(N if BRANCH else 0) + k], mask=exists)


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
    MP: tl.constexpr,
    BRANCH: tl.constexpr,
    MIX: tl.constexpr,
    NORM: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT_PRECISION: tl.constexpr,
):
    """d_x_j = sum_i H_ij G_i (with MIX) + h_pre_j du (with BRANCH) + along x_j + d_projected . phi_j, and the partial
    sum over tiles_group * BT tokens of d_phi = d_projected x, [groups, M, N*C], with NORM also of d_gain, [groups, C].
    G is mixed here and only here, so no partial d_x exists. Grid: (C / BC, groups).
    """
    M: tl.constexpr = (N + 2) * N
    WIDTH: tl.constexpr = N * N + N + (3 if NORM else 1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    group = tl.program_id(1)
    m = tl.arange(0, MP)
    last = min(T, (group + 1) * tiles_group * BT)
    d_phi = ()
    for _ in tl.static_range(N):
        d_phi += (tl.zeros((MP, BC), tl.float32),)
    if NORM:
        gain = tl.load(gain_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        d_gain = tl.zeros((BT, BC), tl.float32)
    for start in range(group * tiles_group * BT, last, BT):
        t = start + tl.arange(0, BT).to(tl.int64)
        exists = t < last
        inside = exists[:, None] & (c < C)[None, :]
        d_projected = tl.load(
            d_projected_ptr + t[:, None] * M + m[None, :], mask=exists[:, None] & (m < M)[None, :], other=0.0
        )
        weights = weights_ptr + t * WIDTH
        along = tl.load(weights + N * N + N, mask=exists, other=0.0)
        g = ()
        if MIX:
            for i in tl.static_range(N):
                g += (tl.load(g_ptr + (t * N + i)[:, None] * C + c[None, :], mask=inside, other=0.0),)
        x = ()
        for j in tl.static_range(N):
            x += (tl.load(x_ptr + (t * N + j)[:, None] * C + c[None, :], mask=inside, other=0.0),)
        if BRANCH:
            du = tl.load(du_ptr + t[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            u = tl.zeros((BT, BC), tl.float32)
            for j in tl.static_range(N):
                u += tl.load(weights + N * N + j, mask=exists, other=0.0)[:, None] * x[j].to(tl.float32)
            branch_inv_rms = tl.load(weights + N * N + N + 1, mask=exists, other=0.0)[:, None]
            along_u = tl.load(weights + N * N + N + 2, mask=exists, other=0.0)[:, None]
            d_gain += branch_inv_rms * u * du
            du = branch_inv_rms * gain * du - along_u * u
        next_d_phi = ()
        for j in tl.static_range(N):
            next_d_phi += (dot_weights(tl.trans(d_projected), x[j], d_phi[j], PRECISION),)
            phi = tl.load(
                phi_ptr + m[:, None] * (N * C) + (j * C + c)[None, :],
                mask=(m < M)[:, None] & (c < C)[None, :],
                other=0.0,
            )
            total = along[:, None] * x[j].to(tl.float32)
            if BRANCH:
                h_pre = tl.load(weights + N * N + j, mask=exists, other=0.0)
                total += h_pre[:, None] * du
            if MIX:
                for i in tl.static_range(N):
                    h = tl.load(weights + i * N + j, mask=exists, other=0.0)
                    total += h[:, None] * g[i].to(tl.float32)
            # last, so that only the sum is in the layout of a product, which holds numbers a token several times
            total += tl.dot(d_projected, phi, input_precision=OUT_PRECISION)
            d_x = narrow(total, d_x_ptr.dtype.element_ty)
            tl.store(d_x_ptr + (t * N + j)[:, None] * C + c[None, :], d_x, mask=inside)
        d_phi = next_d_phi
    for j in tl.static_range(N):
        row = (group.to(tl.int64) * M + m)[:, None] * (N * C)
        tl.store(d_phi_ptr + row + (j * C + c)[None, :], d_phi[j], mask=(m < M)[:, None] & (c < C)[None, :])
    if NORM:
        tl.store(d_gain_ptr + group.to(tl.int64) * C + c, tl.sum(d_gain, 0), mask=c < C)
