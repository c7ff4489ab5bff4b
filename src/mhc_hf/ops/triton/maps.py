"""The maps of a site from its projections, forward with the branch's input, and backward.

Shapes: T tokens, N streams, C channels, M = (N+2)*N; token-last: partial [SPLITS, ROWS, T] from `project`, projected
[M, T], inv_rms [T], h_pre [N, T], h_post [N, T], h_res [N, N, T]. x [T, N, C], branch_in [T, C].

With NORM the branch begins with a weighted RMSNorm, which is made here: branch_in = gain * u / rms(u), u = H_pre x,
gain [C]. rms(u) is known before u is: |u|^2 = H_pre G H_pre, with G the Gram numbers. Kept for backward:
branch_inv_rms [T], read_dots [N, T], which is <x_i, u> = (G H_pre)_i.
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

from .language import load_rows, locate_tokens, narrow, store_rows
from .sinkhorn import backpropagate_matrix, project_matrix


@triton.jit
def sum_splits(partial_ptr, totals_ptr, num_splits, rows, t, exists, T, COUNT: tl.constexpr):
    """The first COUNT of [SPLITS, rows, T] summed over the splits in their order, as a tuple.

    Threads that each summed all rows would do so many times over. So they share the rows, and meet in totals [rows, T],
    to which all programs of the same tokens write the same; one split needs no sum, and its totals are partial itself.
    """
    # loads of several splits wait for memory together; as many as registers hold
    AT_ONCE: tl.constexpr = 8 if COUNT <= 64 else 4
    if num_splits > 1:
        row = tl.arange(0, triton.next_power_of_2(COUNT))
        place = row[:, None] * T + t[None, :]
        inside = (row < COUNT)[:, None] & exists[None, :]
        total = tl.load(partial_ptr + place, mask=inside, other=0.0)
        for first in range(1, num_splits, AT_ONCE):
            parts = ()
            for k in tl.static_range(AT_ONCE):
                there = inside & (tl.full((1, 1), first + k, tl.int32) < num_splits)
                parts += (tl.load(partial_ptr + (first + k) * rows * T + place, mask=there, other=0.0),)
            for k in tl.static_range(AT_ONCE):
                total += parts[k]
        tl.store(totals_ptr + place, total, mask=inside)
        tl.debug_barrier()
    return load_rows(totals_ptr, 0, t, exists, T, COUNT)


@triton.jit
def make_logit(projected, inv_rms, alpha_ptr, bias_ptr, k: tl.constexpr, N: tl.constexpr):
    """Row k of the logits."""
    gate = tl.load(alpha_ptr + (0 if k < N else (1 if k < 2 * N else 2)))
    return gate * (projected * inv_rms) + tl.load(bias_ptr + k)


@triton.jit
def store_maps(
    projected,
    inv_rms,
    alpha_ptr,
    bias_ptr,
    h_post_ptr,
    h_res_ptr,
    t,
    exists,
    T,
    num_iters,
    log_iters,
    N: tl.constexpr,
):
    """H_post and H_res of M projections."""
    M: tl.constexpr = (N + 2) * N
    for k in tl.static_range(N):
        logit = make_logit(projected[N + k], inv_rms, alpha_ptr, bias_ptr, N + k, N)
        tl.store(h_post_ptr + k * T + t, 2 * tl.sigmoid(logit), mask=exists)
    logits_res = ()
    for k in tl.static_range(2 * N, M):
        logits_res += (make_logit(projected[k], inv_rms, alpha_ptr, bias_ptr, k, N),)
    h_res = project_matrix(logits_res, num_iters, log_iters, N)
    store_rows(h_res_ptr, 0, h_res, t, exists, T, N * N)


@triton.jit
def collapse_tile(x_ptr, h_pre, t, c, inside, C, N: tl.constexpr):
    """A tile of H_pre x, float32."""
    x = tl.load(x_ptr + (t * N)[:, None] * C + c[None, :], mask=inside, other=0.0)
    total = h_pre[0][:, None] * x.to(tl.float32)
    for i in tl.static_range(1, N):
        x = tl.load(x_ptr + (t * N + i)[:, None] * C + c[None, :], mask=inside, other=0.0)
        total += h_pre[i][:, None] * x.to(tl.float32)
    return total


@triton.jit
def square_branch_input(x_ptr, h_pre, gram, t, exists, C, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """|u|^2 and (G H_pre)_i, u = H_pre x, from the Gram numbers.

    Where the streams cancel in u, |u|^2 is a small difference of large Gram numbers. Independent streams give the sum
    of h_pre_i^2 |x_i|^2; where it is less than a quarter of that, the squares are summed from u itself, in one more
    sweep.
    """
    dots = ()
    squares = tl.zeros_like(h_pre[0])
    apart = tl.zeros_like(h_pre[0])
    for i in tl.static_range(N):
        dot = tl.zeros_like(h_pre[0])
        for j in tl.static_range(N):
            dot += gram[i * (i + 1) // 2 + j if j <= i else j * (j + 1) // 2 + i] * h_pre[j]
        dots += (dot,)
        squares += h_pre[i] * dot
        apart += h_pre[i] * h_pre[i] * gram[i * (i + 1) // 2 + i]
    cancels = exists & (squares < 0.25 * apart)
    if tl.max(cancels.to(tl.int32), 0) > 0:
        summed = tl.zeros((BT, BC), tl.float32)
        for start in range(0, C, BC):
            c = start + tl.arange(0, BC)
            u = collapse_tile(x_ptr, h_pre, t, c, exists[:, None] & (c < C)[None, :], C, N)
            summed += u * u
        squares = tl.where(cancels, tl.sum(summed, 1), squares)
    return squares, dots


@triton.jit(do_not_specialize=["T", "num_iters", "log_iters", "num_splits", "rows", "tiles_part"])
def maps_fwd_kernel(
    partial_ptr,
    totals_ptr,
    bias_ptr,
    alpha_ptr,
    x_ptr,
    projected_ptr,
    inv_rms_ptr,
    h_pre_ptr,
    h_post_ptr,
    h_res_ptr,
    branch_in_ptr,
    gain_ptr,
    branch_inv_rms_ptr,
    read_dots_ptr,
    T,
    C,
    num_iters,
    log_iters,
    num_splits,
    rows,
    tiles_part,
    norm_eps,
    gain_eps,
    N: tl.constexpr,
    COLLAPSE: tl.constexpr,
    NORM: tl.constexpr,
    SAVES: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """All maps of BT tokens; with COLLAPSE also branch_in = H_pre x, normed with NORM, h_pre staying on chip.

    With SAVES what backward needs is stored too.

    Grid: (T / BT, PARTS). A part collapses tiles_part tiles of BC channels; every one makes its h_pre again, and the
    last one writes the numbers a token. Where there are several, that one has no channels: H_res takes its time.
    """
    M: tl.constexpr = (N + 2) * N
    NUM_GRAM: tl.constexpr = N * (N + 1) // 2 if NORM else 0
    t, exists, T = locate_tokens(T, BT)
    part = tl.program_id(1)
    is_last = part == tl.num_programs(1) - 1
    projected = sum_splits(partial_ptr, totals_ptr, num_splits, rows, t, exists, T, M + 1 + NUM_GRAM)
    inv_rms = tl.rsqrt(projected[M] / (N * C) + norm_eps)
    h_pre = ()
    for k in tl.static_range(N):
        h_pre += (tl.sigmoid(make_logit(projected[k], inv_rms, alpha_ptr, bias_ptr, k, N)),)
    if is_last:
        if SAVES:
            tl.store(inv_rms_ptr + t, inv_rms, mask=exists)
            store_rows(projected_ptr, 0, projected, t, exists, T, M)
        store_maps(
            projected,
            inv_rms,
            alpha_ptr,
            bias_ptr,
            h_post_ptr,
            h_res_ptr,
            t,
            exists,
            T,
            num_iters,
            log_iters,
            N,
        )
    if NORM:
        gram = ()
        for k in tl.static_range(NUM_GRAM):
            gram += (projected[M + 1 + k],)
        squares, dots = square_branch_input(x_ptr, h_pre, gram, t, exists, C, N, BT, BC)
        branch_inv_rms = tl.rsqrt(squares / C + gain_eps)
        if SAVES:
            # all parts the same
            tl.store(branch_inv_rms_ptr + t, branch_inv_rms, mask=exists)
            store_rows(read_dots_ptr, 0, dots, t, exists, T, N)
    if COLLAPSE:
        for tile in range(part * tiles_part, min(tl.cdiv(C, BC), (part + 1) * tiles_part)):
            c = tile * BC + tl.arange(0, BC)
            inside = exists[:, None] & (c < C)[None, :]
            total = collapse_tile(x_ptr, h_pre, t, c, inside, C, N)
            if NORM:
                # as transformers does it: rounded before the weight, and after
                total = narrow(total * branch_inv_rms[:, None], branch_in_ptr.dtype.element_ty).to(tl.float32)
                total *= tl.load(gain_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
            branch_in = narrow(total, branch_in_ptr.dtype.element_ty)
            tl.store(branch_in_ptr + t[:, None] * C + c[None, :], branch_in, mask=inside)
    else:
        store_rows(h_pre_ptr, 0, h_pre, t, exists, T, N)


@triton.jit(do_not_specialize=["T", "num_iters", "log_iters"])
def maps_bwd_kernel(
    projected_ptr,
    inv_rms_ptr,
    bias_ptr,
    alpha_ptr,
    d_pre_dots_ptr,
    d_h_pre_ptr,
    d_h_post_ptr,
    d_res_dots_ptr,
    d_h_res_ptr,
    branch_inv_rms_ptr,
    read_dots_ptr,
    sums_ptr,
    d_logits_ptr,
    d_projected_ptr,
    weights_ptr,
    T,
    C,
    num_iters,
    log_iters,
    N: tl.constexpr,
    HAS_PRE_DOTS: tl.constexpr,
    HAS_H_PRE: tl.constexpr,
    HAS_H_POST: tl.constexpr,
    HAS_RES_DOTS: tl.constexpr,
    HAS_H_RES: tl.constexpr,
    NORM: tl.constexpr,
    BT: tl.constexpr,
):
    """From gradients of the maps to d_logits [M, T], d_projected [T, M] and weights [T, WIDTH]: h_res and h_pre once
    more, what x itself gets through its rms, and with NORM what the branch's gradient is made of, branch_inv_rms and
    along u. Gradients of h_pre and h_res come as given, as dots over channels or both; with NORM the dots are with
    gain * d_branch_in. Grid: (T / BT,).
    """
    M: tl.constexpr = (N + 2) * N
    WIDTH: tl.constexpr = N * N + N + (3 if NORM else 1)
    t, exists, T = locate_tokens(T, BT)
    inv_rms = tl.load(inv_rms_ptr + t, mask=exists, other=0.0)
    along = tl.zeros_like(inv_rms)
    d_res = ()
    logits_res = ()
    for k in tl.static_range(N * N):
        z = tl.load(projected_ptr + (2 * N + k) * T + t, mask=exists, other=0.0) * inv_rms
        logits_res += (tl.load(alpha_ptr + 2) * z + tl.load(bias_ptr + 2 * N + k),)
        grad = tl.zeros_like(inv_rms)
        if HAS_RES_DOTS:
            grad += tl.load(d_res_dots_ptr + k * T + t, mask=exists, other=0.0)
        if HAS_H_RES:
            grad += tl.load(d_h_res_ptr + k * T + t, mask=exists, other=0.0)
        d_res += (grad,)
    d_logits_res, h_res = backpropagate_matrix(d_res, logits_res, sums_ptr, t, exists, T, num_iters, log_iters, N)
    # token-first, unlike all else: the next kernel finds these at constant offsets, which costs it no registers
    weights_ptr += t * WIDTH
    for k in tl.static_range(N * N):
        tl.store(weights_ptr + k, h_res[k], mask=exists)
    if NORM:
        # du = r g - along_u u, with g = gain * d_branch_in, r = branch_inv_rms, along_u = r^3 <g, u> / C
        branch_inv_rms = tl.load(branch_inv_rms_ptr + t, mask=exists, other=0.0)
        along_u = tl.zeros_like(inv_rms)
        for k in tl.static_range(N):
            z = tl.load(projected_ptr + k * T + t, mask=exists, other=0.0) * inv_rms
            h_pre = tl.sigmoid(tl.load(alpha_ptr) * z + tl.load(bias_ptr + k))
            along_u += h_pre * tl.load(d_pre_dots_ptr + k * T + t, mask=exists, other=0.0)
        along_u *= branch_inv_rms * branch_inv_rms * branch_inv_rms / C
        tl.store(weights_ptr + N * N + N + 1, branch_inv_rms, mask=exists)
        tl.store(weights_ptr + N * N + N + 2, along_u, mask=exists)

    for k in tl.static_range(M):
        gate = tl.load(alpha_ptr + (0 if k < N else (1 if k < 2 * N else 2)))
        z = tl.load(projected_ptr + k * T + t, mask=exists, other=0.0) * inv_rms
        d_logit = tl.zeros_like(inv_rms)
        if k < N:
            h_pre = tl.sigmoid(gate * z + tl.load(bias_ptr + k))
            tl.store(weights_ptr + N * N + k, h_pre, mask=exists)
            if HAS_PRE_DOTS:
                dot = tl.load(d_pre_dots_ptr + k * T + t, mask=exists, other=0.0)
                if NORM:
                    read_dot = tl.load(read_dots_ptr + k * T + t, mask=exists, other=0.0)
                    dot = branch_inv_rms * dot - along_u * read_dot
                d_logit += dot
            if HAS_H_PRE:
                d_logit += tl.load(d_h_pre_ptr + k * T + t, mask=exists, other=0.0)
            d_logit = d_logit * h_pre * (1 - h_pre)
        elif k < 2 * N:
            if HAS_H_POST:
                sigmoid = tl.sigmoid(gate * z + tl.load(bias_ptr + k))
                grad = tl.load(d_h_post_ptr + (k - N) * T + t, mask=exists, other=0.0)
                d_logit = 2 * grad * sigmoid * (1 - sigmoid)
        else:
            d_logit = d_logits_res[k - 2 * N]
        tl.store(d_logits_ptr + k * T + t, d_logit, mask=exists)
        along += gate * d_logit * z
        tl.store(d_projected_ptr + t * M + k, gate * d_logit * inv_rms, mask=exists)
    tl.store(weights_ptr + N * N + N, along * inv_rms * inv_rms * (-1.0 / (N * C)), mask=exists)
