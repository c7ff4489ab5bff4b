"""Sharded parameters are measured as whole ones are."""

import json

import pytest

from ..training.launching import run_python


@pytest.mark.slow
def test_under_fsdp2_every_number_is_that_of_the_whole_model():
    printed = run_python("-m", "tests.inspection.sharded_measurement", ranks=2)
    whole, sharded = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    assert len(whole) == 6 * (18 + 3 + 3)
    # the same forward; gradients are float32 sums over the same two batches, halved and added: a rounding or two
    assert sharded == pytest.approx(whole, rel=1e-5, abs=1e-8)
