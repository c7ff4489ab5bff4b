"""Sinkhorn-Knopp: doubly stochastic, rows exact, finite at any logits, gradients of the unrolled iterations."""

from functools import partial

import pytest
import torch

from mhc_hf import ops
from mhc_hf.ops import reference
from mhc_hf.ops.sinkhorn import count_log_iters

from .sites import relative_error

# enough tokens that the path for many is taken, and one that takes the path for few
TOKENS = (700, 3)


@pytest.fixture(params=["torch", "native"])
def project(request):
    """`sinkhorn_knopp` on one backend."""
    return partial(ops.sinkhorn_knopp, backend=request.param)


def _logits(n, tokens, scale):
    return scale * torch.randn(tokens, n, n, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", range(2, 9))
@pytest.mark.parametrize("tokens", TOKENS)
def test_values_and_gradients_match_the_float64_reference(project, n, tokens):
    # float32 keeps 24 bits; 40 half-steps of n operations, errors adding like a walk: 6e-8 * sqrt(40 * n) < 2e-6
    logits = _logits(n, tokens, 2.0).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    got, want = project(logits), reference.sinkhorn_knopp(wide)
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got.backward(cotangent.float())
    want.backward(cotangent)
    assert relative_error(got.detach(), want.detach()) < 2e-6
    assert relative_error(logits.grad, wide.grad) < 2e-6


@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0])
@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_sum_to_one_to_rounding(project, scale, tokens):
    h_res = project(_logits(4, tokens, scale).clamp(-50, 50))
    assert (h_res.sum(-1) - 1).abs().max() < 1e-6


def _extreme_logits(n):
    generator = torch.Generator().manual_seed(7)
    rows = {
        "large": 1e4 * torch.sign(torch.randn(n, n, generator=generator)),
        "dominating": torch.zeros(n, n).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(1e4)),
        "empty column": torch.zeros(n, n).index_fill(1, torch.tensor([0]), -1e4),
        "empty row": torch.zeros(n, n).index_fill(0, torch.tensor([0]), -1e4),
        "equal": torch.full((n, n), 3.0),
        "denormal": torch.full((n, n), 1e-40) * torch.eye(n),
        # no positive diagonal within reach: the worst growth per iteration of what float32 cannot hold
        "no support": torch.full((n, n), -90.0)
        .index_fill(1, torch.tensor([0]), 0.0)
        .index_fill(0, torch.tensor([n - 1]), 0.0),
    }
    return torch.stack(list(rows.values())), list(rows)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("repeats", [1, 300])
def test_extreme_logits_give_the_right_finite_values_and_finite_gradients(project, n, repeats):
    extreme, names = _extreme_logits(n)
    logits = extreme.repeat(repeats, 1, 1).requires_grad_()
    got = project(logits)
    got.square().sum().backward()
    want = reference.sinkhorn_knopp(extreme.double())
    assert torch.isfinite(logits.grad).all()
    for k, name in enumerate(names):
        # float32 logits of 1e4 are read with a spacing of 1e-3; sums of few of them are exact
        torch.testing.assert_close(
            got[k].detach().double(), want[k], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_more_streams_and_more_iterations_take_more_logarithms():
    assert [count_log_iters(n, 20) for n in range(2, 9)] == [1, 1, 1, 1, 1, 3, 4]
    assert count_log_iters(4, 1) == 1
    assert count_log_iters(4, 100) == 76


@pytest.mark.parametrize("tokens", TOKENS)
def test_gradients_are_those_of_as_many_iterations_as_asked(tokens):
    # float64 throughout, so that nothing but the formula is compared
    logits = _logits(4, tokens, 2.0).double().requires_grad_()
    for num_iters in (1, 2, 7):
        (got,) = torch.autograd.grad(ops.sinkhorn_knopp(logits, num_iters).pow(3).sum(), logits)
        (want,) = torch.autograd.grad(reference.sinkhorn_knopp(logits, num_iters).pow(3).sum(), logits)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
