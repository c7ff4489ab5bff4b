"""Sinkhorn-Knopp in registers, forward and backward, alone and as part of other kernels.

Shapes: N streams, T tokens, BT of them a program; a matrix is a tuple of N*N [BT] vectors, (i, j) = into i from j at
i*N + j. A half-step of axis 0 normalises columns (sums over i), of axis 1 rows. The first log_iters iterations run on
logarithms, the others by division: `ops/sinkhorn.py` says why that is safe.
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

from .language import load_rows, locate_tokens, store_rows


@triton.jit
def sum_along(m, N: tl.constexpr, AXIS: tl.constexpr):
    """N column sums (axis 0) or row sums (axis 1)."""
    sums = ()
    for k in tl.static_range(N):
        total = m[k * (N if AXIS == 1 else 1)]
        for other in tl.static_range(1, N):
            total = total + m[k * (N if AXIS == 1 else 1) + other * (1 if AXIS == 1 else N)]
        sums += (total,)
    return sums


@triton.jit
def log_sum_along(m, N: tl.constexpr, AXIS: tl.constexpr):
    """log of the sums of exp(m), safe at any magnitude."""
    sums = ()
    for k in tl.static_range(N):
        peak = m[k * (N if AXIS == 1 else 1)]
        for other in tl.static_range(1, N):
            peak = tl.maximum(peak, m[k * (N if AXIS == 1 else 1) + other * (1 if AXIS == 1 else N)])
        total = tl.zeros_like(peak)
        for other in tl.static_range(N):
            total = total + tl.exp(m[k * (N if AXIS == 1 else 1) + other * (1 if AXIS == 1 else N)] - peak)
        sums += (peak + tl.log(total),)
    return sums


@triton.jit
def divide_along(m, sums, N: tl.constexpr, AXIS: tl.constexpr):
    """m with each column (axis 0) or row (axis 1) divided by its own of `sums`."""
    inverse = ()
    for k in tl.static_range(N):
        inverse += (1.0 / sums[k],)
    return multiply_along(m, inverse, N, AXIS)


@triton.jit
def multiply_along(m, factors, N: tl.constexpr, AXIS: tl.constexpr):
    """m with each column (axis 0) or row (axis 1) multiplied by its own of `factors`."""
    result = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            result += (m[i * N + j] * factors[i if AXIS == 1 else j],)
    return result


@triton.jit
def add_along(m, terms, SIGN: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    """m with SIGN times its own of `terms` added to each column (axis 0) or row (axis 1)."""
    result = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            result += (m[i * N + j] + SIGN * terms[i if AXIS == 1 else j],)
    return result


@triton.jit
def exp_all(m, N: tl.constexpr):
    """exp of every entry."""
    result = ()
    for k in tl.static_range(N * N):
        result += (tl.exp(m[k]),)
    return result


@triton.jit
def project_matrix(logits, num_iters, log_iters, N: tl.constexpr):
    """The tuple of logits made doubly stochastic, columns first and rows last."""
    log_m = logits
    for _ in range(log_iters):
        log_m = add_along(log_m, log_sum_along(log_m, N, 0), -1.0, N, 0)
        log_m = add_along(log_m, log_sum_along(log_m, N, 1), -1.0, N, 1)
    m = exp_all(log_m, N)
    for _ in range(num_iters - log_iters):
        m = divide_along(m, sum_along(m, N, 0), N, 0)
        m = divide_along(m, sum_along(m, N, 1), N, 1)
    return m


@triton.jit
def backpropagate_matrix(grad, logits, sums_ptr, t, exists, T, num_iters, log_iters, N: tl.constexpr):
    """Gradient of the logits through the unrolled iterations, and the matrix. sums [2*num_iters, N, T] is scratch.

    Every half-step is made again once, its sums kept; on the way back a matrix times its sums is the one before it.
    """
    log_m = logits
    for k in range(log_iters):
        for axis in tl.static_range(2):
            sums = log_sum_along(log_m, N, axis)
            store_rows(sums_ptr, (2 * k + axis) * N, sums, t, exists, T, N)
            log_m = add_along(log_m, sums, -1.0, N, axis)
    m = exp_all(log_m, N)
    for k in range(log_iters, num_iters):
        for axis in tl.static_range(2):
            sums = sum_along(m, N, axis)
            store_rows(sums_ptr, (2 * k + axis) * N, sums, t, exists, T, N)
            m = divide_along(m, sums, N, axis)
    h_res = m
    tl.debug_barrier()

    g = ()
    for k in tl.static_range(N * N):
        g += (grad[k] * m[k],)
    for back in range(num_iters - log_iters):
        for flip in tl.static_range(2):
            g = subtract_share(g, m, N, 1 - flip)
            row = (2 * (num_iters - 1 - back) + 1 - flip) * N
            m = multiply_along(m, load_rows(sums_ptr, row, t, exists, T, N), N, 1 - flip)
    for back in range(log_iters):
        for flip in tl.static_range(2):
            g = subtract_share(g, exp_all(log_m, N), N, 1 - flip)
            row = (2 * (log_iters - 1 - back) + 1 - flip) * N
            log_m = add_along(log_m, load_rows(sums_ptr, row, t, exists, T, N), 1.0, N, 1 - flip)
    return g, h_res


@triton.jit
def subtract_share(g, p, N: tl.constexpr, AXIS: tl.constexpr):
    """g - p * sum(g): the backward of one half-step, with p what it gave."""
    sums = sum_along(g, N, AXIS)
    result = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            result += (g[i * N + j] - p[i * N + j] * sums[i if AXIS == 1 else j],)
    return result


@triton.jit(do_not_specialize=["T", "num_iters", "log_iters"])
def sinkhorn_fwd_kernel(logits_ptr, h_res_ptr, T, num_iters, log_iters, N: tl.constexpr, BT: tl.constexpr):
    """logits [N, N, T] -> h_res [N, N, T]. Grid: (T / BT,)."""
    t, exists, T = locate_tokens(T, BT)
    logits = load_rows(logits_ptr, 0, t, exists, T, N * N)
    h_res = project_matrix(logits, num_iters, log_iters, N)
    store_rows(h_res_ptr, 0, h_res, t, exists, T, N * N)


@triton.jit(do_not_specialize=["T", "num_iters", "log_iters"])
def sinkhorn_bwd_kernel(
    grad_ptr,
    logits_ptr,
    d_logits_ptr,
    sums_ptr,
    T,
    num_iters,
    log_iters,
    N: tl.constexpr,
    BT: tl.constexpr,
):
    """grad, logits [N, N, T] -> d_logits [N, N, T]; sums [2*num_iters, N, T] is scratch. Grid: (T / BT,)."""
    t, exists, T = locate_tokens(T, BT)
    grad = load_rows(grad_ptr, 0, t, exists, T, N * N)
    logits = load_rows(logits_ptr, 0, t, exists, T, N * N)
    d_logits, _ = backpropagate_matrix(grad, logits, sums_ptr, t, exists, T, num_iters, log_iters, N)
    store_rows(d_logits_ptr, 0, d_logits, t, exists, T, N * N)
