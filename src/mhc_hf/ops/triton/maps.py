"""The maps of a site from its projections, forward with the branch's input, and backward.

Shapes: T tokens, N streams, C channels, M = (N+2)*N; token-last: partial [SPLITS, M + 1, T] from `project`, projected
[M, T], inv_rms [T], h_pre [N, T], h_post [N, T], h_res [N, N, T]. x [T, N, C], branch_in [T, C].
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

from .language import load_rows, locate_tokens, narrow, store_rows
from .sinkhorn import backpropagate_matrix, project_matrix


@triton.jit
def sum_splits(partial_ptr, num_splits, t, exists, T, ROWS: tl.constexpr):
    """[SPLITS, ROWS, T] summed over the splits in their order, as a tuple of rows."""
    totals = load_rows(partial_ptr, 0, t, exists, T, ROWS)
    for split in range(1, num_splits):
        sums = ()
        for k in tl.static_range(ROWS):
            part = tl.load(partial_ptr + (split * ROWS + k) * T + t, mask=exists, other=0.0)
            sums += (totals[k] + part,)
        totals = sums
    return totals


@triton.jit(do_not_specialize=["T", "num_iters", "log_iters", "num_splits"])
def maps_fwd_kernel(
    partial_ptr,
    bias_ptr,
    alpha_ptr,
    x_ptr,
    projected_ptr,
    inv_rms_ptr,
    h_pre_ptr,
    h_post_ptr,
    h_res_ptr,
    branch_in_ptr,
    T,
    C,
    num_iters,
    log_iters,
    num_splits,
    norm_eps,
    N: tl.constexpr,
    COLLAPSE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """All maps of BT tokens; with COLLAPSE also branch_in = H_pre x, h_pre staying on chip. Grid: (T / BT,)."""
    M: tl.constexpr = (N + 2) * N
    t, exists, T = locate_tokens(T, BT)
    projected = sum_splits(partial_ptr, num_splits, t, exists, T, M + 1)
    inv_rms = tl.rsqrt(projected[M] / (N * C) + norm_eps)
    tl.store(inv_rms_ptr + t, inv_rms, mask=exists)

    h_pre = ()
    logits_res = ()
    for k in tl.static_range(M):
        tl.store(projected_ptr + k * T + t, projected[k], mask=exists)
        gate = tl.load(alpha_ptr + (0 if k < N else (1 if k < 2 * N else 2)))
        logit = gate * (projected[k] * inv_rms) + tl.load(bias_ptr + k)
        if k < N:
            h_pre += (tl.sigmoid(logit),)
        elif k < 2 * N:
            tl.store(h_post_ptr + (k - N) * T + t, 2 * tl.sigmoid(logit), mask=exists)
        else:
            logits_res += (logit,)
    h_res = project_matrix(logits_res, num_iters, log_iters, N)
    store_rows(h_res_ptr, 0, h_res, t, exists, T, N * N)

    if COLLAPSE:
        for start in range(0, C, BC):
            c = start + tl.arange(0, BC)
            inside = exists[:, None] & (c < C)[None, :]
            total = tl.zeros((BT, BC), tl.float32)
            for i in tl.static_range(N):
                x = tl.load(x_ptr + (t * N + i)[:, None] * C + c[None, :], mask=inside, other=0.0)
                total += h_pre[i][:, None] * x.to(tl.float32)
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
    BT: tl.constexpr,
):
    """From gradients of the maps to d_logits [M, T], d_projected [T, M] and weights [T, N*N + N + 1]: h_res and h_pre
    once more, and what x itself gets through its rms. Gradients of h_pre and h_res come as given, as dots over channels
    or both. Grid: (T / BT,).
    """
    M: tl.constexpr = (N + 2) * N
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
    weights_ptr += t * (N * N + N + 1)
    for k in tl.static_range(N * N):
        tl.store(weights_ptr + k, h_res[k], mask=exists)

    for k in tl.static_range(M):
        gate = tl.load(alpha_ptr + (0 if k < N else (1 if k < 2 * N else 2)))
        z = tl.load(projected_ptr + k * T + t, mask=exists, other=0.0) * inv_rms
        d_logit = tl.zeros_like(inv_rms)
        if k < N:
            h_pre = tl.sigmoid(gate * z + tl.load(bias_ptr + k))
            tl.store(weights_ptr + N * N + k, h_pre, mask=exists)
            if HAS_PRE_DOTS:
                d_logit += tl.load(d_pre_dots_ptr + k * T + t, mask=exists, other=0.0)
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
