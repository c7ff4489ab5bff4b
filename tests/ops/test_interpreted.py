"""The kernels against the float64 reference, run by Triton's interpreter in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAYERS = [f"layer n={n} C=60 torch.float32" for n in range(2, 9)]
LAYERS += ["layer n=4 C=60 torch.bfloat16", "layer n=4 C=60 torch.float16", "layer n=3 C=576 torch.bfloat16"]
OPS = [f"{name} n=3" for name in ("sinkhorn_knopp", "mhc_coefficients", "mhc_pre", "mhc_post_res", "mhc_pre_branch")]


@pytest.fixture(scope="module")
def figures():
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.interpreted"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout[result.stdout.index("{") :])


@pytest.mark.parametrize("case", LAYERS + OPS)
def test_values_and_all_gradients_match_float64(figures, case):
    for name, (error, plain_error) in figures[case].items():
        # float32: 2e-6 a site, and a layer has two. Half precision: twice the plain formula in the same dtype
        bound = 2 * plain_error if "16" in case.split()[-1] else 2e-6 * (2 if "layer" in case else 1)
        assert error <= bound, (name, error, bound)


def test_extreme_logits_are_finite_and_right(figures):
    assert figures["extremes"]["finite"]
    assert figures["extremes"]["error"] < 1e-6


def test_the_same_run_twice_gives_the_same_bits(figures):
    assert figures["same bits"]


def test_zero_tokens_launch_nothing_and_give_zero_gradients(figures):
    assert figures["zero tokens"] == [[2, 0, 4, 16], 0.0]


def test_registration_passes_opcheck_on_the_kernels(figures):
    assert set(figures["opcheck"].values()) == {"SUCCESS"}


def test_a_layer_runs_every_fused_kernel(figures):
    assert figures["target"] == "interpreter"
    assert figures["kernels run"] == [
        "collapse_kernel",
        "dots_bwd_kernel",
        "maps_bwd_kernel",
        "maps_fwd_kernel",
        "project_fwd_kernel",
        "streams_bwd_kernel",
        "write_kernel",
        "write_project_kernel",
    ]
