"""Gains, distances and similarities against numbers worked out by hand or by NumPy in float64."""

import math

import numpy as np
import pytest
import torch

from mhc_hf.inspection import statistics


def test_forward_is_along_rows_and_backward_along_columns():
    h = torch.tensor([[1.0, 2.0], [0.5, -3.0]])
    assert statistics.forward_gain(h) == 3
    assert statistics.backward_gain(h) == 1.5
    assert statistics.log_column_sum(h) == pytest.approx(math.log(1.5))


def test_a_column_that_fades_is_seen_by_its_logarithm_only():
    h = torch.tensor([[1.0, 0.0], [1.0 - 1e-3, 1e-3]], dtype=torch.float64)
    assert statistics.backward_gain(h) < 2
    assert float(statistics.log_column_sum(h)) == pytest.approx(-math.log(1e-3))
    assert math.isfinite(statistics.log_column_sum(torch.tensor([[1.0, 0.0], [1.0, 0.0]])))


def test_distances_of_known_matrices():
    identity, uniform = torch.eye(4), torch.full((4, 4), 0.25)
    swap = torch.eye(4)[[1, 0, 2, 3]]
    for h in (identity, uniform, swap):
        assert statistics.distance_from_doubly_stochastic(h) == 0
    assert statistics.distance_from_identity(identity) == 0
    assert float(statistics.distance_from_identity(swap)) == pytest.approx(2)
    # |I - J/n| = sqrt(n - 1)
    assert float(statistics.distance_from_identity(uniform)) == pytest.approx(math.sqrt(3))
    assert float(statistics.distance_from_doubly_stochastic(1.25 * identity)) == pytest.approx(0.25)
    # its rows and columns sum to 1, and still it is none
    assert float(statistics.distance_from_doubly_stochastic(torch.tensor([[1.5, -0.5], [-0.5, 1.5]]))) == 0.5


def test_products_run_from_the_first_site_to_the_last():
    h = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    from_first, to_last = statistics.compose_from_first(h), statistics.compose_to_last(h)
    for token in range(3):
        for k in range(5):
            maps = [site[token].numpy() for site in h]
            np.testing.assert_allclose(from_first[k, token], np.linalg.multi_dot(maps[k::-1] + [np.eye(4)] * 2), 1e-12)
            np.testing.assert_allclose(
                to_last[k, token], np.linalg.multi_dot(maps[: k - 1 if k else None : -1] + [np.eye(4)] * 2), 1e-12
            )


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8])
def test_equal_streams_have_a_spread_of_exactly_zero(n):
    x = torch.randn(11, 1, 13, generator=torch.Generator().manual_seed(n)).repeat(1, n, 1)
    assert not statistics.squared_deviations(x).any()


def test_spread_agrees_with_its_definition():
    x = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = np.square(x.numpy() - x.numpy().mean(1, keepdims=True)).sum((1, 2))
    np.testing.assert_allclose(statistics.squared_deviations(x), wanted, 1e-12)


def test_copies_count_as_one_stream_and_orthogonal_ones_as_n():
    copies = torch.ones(1, 4, 6)
    orthogonal = torch.eye(6)[None, :4]
    for x, cosine, number in ((copies, 1, 1), (orthogonal, 0, 4)):
        gram = statistics.gram(x)
        assert float(statistics.pairwise_cosine(statistics.cosines(gram))) == pytest.approx(cosine)
        assert float(statistics.effective_streams(gram)) == pytest.approx(number)


def test_entropy_is_log_n_where_streams_count_alike_and_zero_where_one_does():
    assert float(statistics.entropy(torch.full((8,), 0.3))) == pytest.approx(math.log(8))
    assert float(statistics.entropy(torch.tensor([0.0, 0.7, 0.0]))) == 0


def test_liveness_tells_a_lead_of_four_from_one_of_eight():
    for lead, wanted in ((4, 4.9e-2), (8, 1.0e-3)):
        h = torch.softmax(lead * torch.eye(4, dtype=torch.float64), -1)
        assert float(statistics.liveness(h)) == pytest.approx(wanted, rel=0.02)
