"""The starting points do what docs/math.md proves of them."""

import itertools

import pytest
import torch

from mhc_hf.modeling.starts import CONVERSION_STARTS, STARTS, bias_of, default_start, zero_mean_directions
from mhc_hf.ops import reference

MULTS = [2, 3, 4, 5, 6, 7, 8, 11]
SITES = range(25)


def conversions():
    return [
        pytest.param(name, n, id=f"{name}-{n}")
        for name, start in CONVERSION_STARTS.items()
        for n in MULTS
        if n >= start.min_mult
    ]


@pytest.mark.parametrize("n", MULTS)
def test_directions_are_orthogonal_and_have_zero_mean(n):
    directions = torch.stack(zero_mean_directions(n))  # [n-1, n]
    assert directions.shape == (n - 1, n)
    gram = directions @ directions.T
    torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-14, rtol=0)
    torch.testing.assert_close(directions.sum(-1), torch.zeros(n - 1, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(directions.abs().amax(-1), torch.ones(n - 1, dtype=torch.float64))


def test_four_streams_get_the_walsh_directions():
    expected = torch.tensor([[1, 1, -1, -1], [1, -1, -1, 1], [1, -1, 1, -1]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(zero_mean_directions(4)), expected)


@pytest.mark.parametrize(("name", "n"), conversions())
def test_what_exactness_asks_of_the_maps(name, n):
    for site in SITES:
        h_pre, h_post, h_res = CONVERSION_STARTS[name].maps(n, site)
        ones = torch.ones(n, dtype=torch.float64)
        torch.testing.assert_close(h_pre.sum(), ones[0])
        torch.testing.assert_close(h_post.mean(), ones[0])
        torch.testing.assert_close(h_res.sum(-1), ones)
        torch.testing.assert_close(h_res.sum(-2), ones)


@pytest.mark.parametrize("n", [n for n in MULTS if n >= 3])
def test_every_read_is_orthogonal_to_every_write(n):
    maps = [CONVERSION_STARTS["orthogonal"].maps(n, site) for site in SITES]
    for (h_pre, _, _), (_, h_post, h_res) in itertools.product(maps, maps):
        e, d = h_pre - 1 / n, h_post - 1
        assert abs(float(e @ d)) < 1e-14
        # and mixing only scales what was written, so it stays orthogonal
        assert abs(float(e @ h_res @ d)) < 1e-14


@pytest.mark.parametrize(("name", "n"), conversions())
def test_no_read_is_uniform(name, n):
    for site in SITES:
        h_pre, _, _ = CONVERSION_STARTS[name].maps(n, site)
        assert h_pre.max() - h_pre.min() > 0.1 / n


@pytest.mark.parametrize(("name", "n"), conversions())
def test_maps_stay_where_sigmoid_and_softmax_are_alive(name, n):
    for site in SITES:
        h_pre, h_post, h_res = CONVERSION_STARTS[name].maps(n, site)
        # slope of the sigmoid at its value p is p (1 - p)
        assert (h_pre * (1 - h_pre)).min() > 0.3 / n * 0.9
        assert (h_post / 2 * (1 - h_post / 2)).min() > 0.15
        assert (h_res * (1 - h_res)).min() > 0.01


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_writes_alone_tell_the_streams_apart(n):
    writes = torch.stack([CONVERSION_STARTS["orthogonal"].maps(n, site)[1] for site in range(2 * n)])  # [sites, n]
    for i, j in itertools.combinations(range(n), 2):
        assert (writes[:, i] - writes[:, j]).abs().max() > 0.1


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("n", [3, 4, 8])
def test_biases_give_the_maps_back(name, n):
    start = STARTS[name]
    x = torch.randn(5, n, 7)
    phi = torch.zeros((n + 2) * n, n * 7)
    for site in (0, 1, 6):
        maps = start.maps(n, site)
        got = reference.mhc_coefficients(x, phi, bias_of(maps), torch.full((3,), start.alpha))
        for have, want in zip(got, maps, strict=True):
            # biases up to 4 in float32 carry 2.4e-7, and the slopes are below 1
            torch.testing.assert_close(have, want.float().expand_as(have), atol=5e-7, rtol=0)


def test_two_streams_have_no_room_for_orthogonal_directions():
    assert default_start(2) == "copies"
    assert default_start(3) == default_start(8) == "orthogonal"
