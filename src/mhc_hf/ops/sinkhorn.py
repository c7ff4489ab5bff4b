"""Sinkhorn-Knopp in PyTorch, forward and backward, for any number of tokens at once.

Shapes: n streams, T tokens. Logits and results are [n, n, T] (into, from, token): every operation then runs over
contiguous tokens, and n*n = 16 numbers a token never become a matrix of their own.
"""

import math

import torch
from torch import Tensor

# below this many numbers an operation costs its dispatch, above it what it computes
_FEW = 2048
# recomputed half-steps of one block of tokens stay in cache
_BLOCK = 4096


def count_log_iters(n: int, num_iters: int) -> int:
    """How many of the first iterations must run on logarithms so that float32 loses nothing in the others.

    Once columns and then rows have been normalised, every later row and column sum lies in [1/n, n]: a column sum is an
    average of 1/(row sum) with weights that sum to 1, and the other way round. Nothing divides by less than 1/n from
    there on, so plain division is safe. What underflowed to zero (below 1.2e-38) could have grown by at most n*n an
    iteration; 30 decades of growth leave it under 1.2e-8.
    """
    safe_iters = int(30 / (2 * math.log10(n)))
    return min(num_iters, max(1, num_iters - safe_iters))


def project_doubly_stochastic(logits: Tensor, num_iters: int) -> Tensor:
    """exp(logits) after `num_iters` normalisations of columns, then rows. [n, n, T] -> [n, n, T], a new tensor."""
    n = logits.shape[0]
    # few tokens: two operations an iteration, whatever they compute. many: no logarithms where none are needed
    log_iters = num_iters if logits.numel() <= _FEW else count_log_iters(n, num_iters)
    log_m = logits
    for _ in range(log_iters):
        log_m = torch.log_softmax(torch.log_softmax(log_m, 0), 1)
    m = log_m.exp()
    for _ in range(num_iters - log_iters):
        m.div_(m.sum(0, keepdim=True))
        m.div_(m.sum(1, keepdim=True))
    return m


def backpropagate_projection(grad: Tensor, logits: Tensor, num_iters: int) -> tuple[Tensor, Tensor]:
    """Gradient of the logits from that of the result, through the unrolled iterations, and the result. [n, n, T] each.

    A half-step divides by sums along one dimension; in logarithms its gradient is g - p * sum(g) with p the matrix
    after the half-step. All p are made again, a block of tokens at a time; no gradient is divided, so finite stays
    finite.
    """
    n, _, num_tokens = logits.shape
    d_logits, h_res = torch.empty_like(logits), torch.empty_like(logits)
    log_iters = count_log_iters(n, num_iters)
    for start in range(0, num_tokens, _BLOCK):
        block = slice(start, start + _BLOCK)
        steps = logits.new_empty(2 * num_iters, *logits[..., block].shape)
        log_m = logits[..., block]
        for k in range(2 * log_iters):
            log_m = torch.log_softmax(log_m, k % 2)
            torch.exp(log_m, out=steps[k])
        for k in range(2 * log_iters, 2 * num_iters):
            torch.div(steps[k - 1], steps[k - 1].sum(k % 2, keepdim=True), out=steps[k])
        g = grad[..., block] * steps[-1]
        for k in reversed(range(2 * num_iters)):
            g.addcmul_(steps[k], g.sum(k % 2, keepdim=True), value=-1)
        d_logits[..., block] = g
        h_res[..., block] = steps[-1]
    return d_logits, h_res
