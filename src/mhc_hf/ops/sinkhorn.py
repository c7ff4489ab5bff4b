"""Sinkhorn-Knopp in PyTorch, forward and backward, for any number of tokens at once.

Shapes: n streams, T tokens. Logits and results are [n, n, T] (into, from, token): every operation then runs over
contiguous tokens, and n*n = 16 numbers a token never become a matrix of their own. A half-step normalises columns, its
sums run over dimension 0, or rows, its sums run over dimension 1.
"""

import math
from functools import cache

import torch
from torch import Tensor

# below this many numbers an operation costs its dispatch, above it what it computes
_FEW = 2048
# tokens whose half-steps, kept for backward, stay in a cache
_BLOCK = 4096


@cache
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
    sums = m.new_empty(2 * (num_iters - log_iters), n, logits.shape[2])
    _normalize(m, sums)
    return m


def backpropagate_projection(grad: Tensor, logits: Tensor, num_iters: int) -> tuple[Tensor, Tensor]:
    """Gradient of the logits from that of the result, through the unrolled iterations, and the result. [n, n, T] each.

    A half-step divides by sums along one dimension; in logarithms its gradient is g - p * sum(g) with p the matrix
    after the half-step. From the last p and the sums, all p are made again; no gradient is divided, so finite stays
    finite.
    """
    n, _, num_tokens = logits.shape
    d_logits, h_res = torch.empty_like(logits), torch.empty_like(logits)
    log_iters = count_log_iters(n, num_iters)
    for start in range(0, num_tokens, _BLOCK):
        block = slice(start, start + _BLOCK)
        log_m = logits[..., block]
        log_steps = []
        for k in range(2 * log_iters):
            log_m = torch.log_softmax(log_m, k % 2)
            log_steps.append(log_m.exp())
        m = log_steps[-1].clone()
        sums = m.new_empty(2 * (num_iters - log_iters), n, m.shape[2])
        _normalize(m, sums)
        h_res[..., block] = m

        g = torch.mul(grad[..., block], m, out=d_logits[..., block])
        g_slices, g_sum = (g.unbind(0), g.unbind(1)), torch.empty_like(m[0])
        for k in reversed(range(len(sums))):
            g.addcmul_(m, _add(g_slices[k % 2], g_sum).unsqueeze(k % 2), value=-1)
            m.mul_(sums[k].unsqueeze(k % 2))
        for k in reversed(range(len(log_steps))):
            g.addcmul_(log_steps[k], g.sum(k % 2, keepdim=True), value=-1)
    return d_logits, h_res


def _normalize(m: Tensor, sums: Tensor) -> None:
    """Divide m [n, n, T] in place by its column sums, by its row sums, and so on; keep them in `sums` [steps, n, T]."""
    slices = m.unbind(0), m.unbind(1)
    for k, total in enumerate(sums.unbind()):
        m.div_(_add(slices[k % 2], total).unsqueeze(k % 2))


def _add(slices: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """The sum of n slices: n - 1 additions take less time than one reduction over a dimension of n."""
    torch.add(slices[0], slices[1], out=out)
    for other in slices[2:]:
        out.add_(other)
    return out
