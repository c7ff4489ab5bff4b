"""The kernels against the float64 reference, run by Triton's interpreter in a process of their own."""

import pytest

from ..interpreter import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAYERS = [f"layer n={n} C=60 torch.float32" for n in range(2, 9)]
LAYERS += ["layer n=4 C=60 torch.bfloat16", "layer n=4 C=60 torch.float16", "layer n=3 C=576 torch.bfloat16"]
LAYERS += [f"layer n={n} handed on, torch.{dtype}" for n, dtype in ((3, "float32"), (2, "float32"), (4, "bfloat16"))]
LAYERS += ["layer of long loops torch.float32", "layer of long loops torch.bfloat16"]
OPS = [f"{name} n=3" for name in ("sinkhorn_knopp", "mhc_coefficients", "mhc_pre", "mhc_post_res", "mhc_pre_branch")]


@pytest.fixture(scope="module")
def figures():
    return run_interpreted("tests.ops.interpreted")


@pytest.mark.parametrize("case", LAYERS + OPS)
def test_values_and_all_gradients_match_float64(figures, case):
    for name, (error, plain_error) in figures[case].items():
        # float32: 2e-6 a site, and a layer has two. Half precision: twice the plain formula in the same dtype
        bound = 2 * plain_error if "16" in case.split()[-1] else 2e-6 * (2 if "layer" in case else 1)
        assert error <= bound, (name, error, bound)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_hidden_states_are_widened_to_copies_and_projected_as_well_as_from_memory(figures, n):
    copies, errors = figures[f"widened n={n}"]
    assert copies
    for error, plain_error in errors:
        assert error <= max(1.5 * plain_error, 2e-6), (error, plain_error)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_the_mean_of_the_last_streams_is_that_of_streams_that_were_written(figures, n):
    units, copies_stay_copies = figures[f"collapsed n={n}"]
    # 1/7 is rounded, and a mean is divided by 7 on a CPU
    assert units <= (1 if n == 7 else 0)
    assert copies_stay_copies


def test_streams_that_cancel_are_normed_as_well_as_by_the_plain_formula(figures):
    # |u| is 3e-3 of |x| here: Gram numbers alone would give 40 times the plain formula's error (docs/kernels.md)
    for name, (error, plain_error) in figures["opposed streams"].items():
        assert error <= max(4 * plain_error, 4e-6), (name, error, plain_error)


@pytest.mark.parametrize(
    "case", ["logits of 1e4", "one dominates", "all equal", "denormal streams", "fp16 streams of 1e4"]
)
def test_extremes_are_right_and_have_finite_gradients(figures, case):
    error, finite = figures[f"extreme: {case}"]
    # fp16: half a unit in the last place, 4.9e-4, at each of two writes
    assert finite and error <= (1e-3 if "fp16" in case else 4e-6), error


def test_h_res_goes_from_j_to_i_and_not_as_deepseek_v4_stores_it(figures):
    right, transposed = figures["direction"]
    assert right < 2e-6 and transposed > 0.1


def test_extreme_logits_are_finite_and_right(figures):
    assert figures["extremes"]["finite"]
    assert figures["extremes"]["error"] < 1e-6


def test_the_same_run_twice_gives_the_same_bits(figures):
    assert figures["same bits"]


def test_zero_tokens_launch_nothing_and_give_zero_gradients(figures):
    assert figures["zero tokens"] == [[2, 0, 4, 16], 0.0]


def test_registration_passes_opcheck_on_the_kernels(figures):
    assert len(figures["opcheck"]) == 6
    assert all(set(checks.values()) == {"SUCCESS"} for checks in figures["opcheck"])


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
