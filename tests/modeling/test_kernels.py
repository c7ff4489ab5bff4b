"""A widened model on the kernels computes what it does on a CPU, whoever watches or wraps it."""

import pytest

from ..interpreter import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# one layer of two sites, forward and backward
READ, WRITE_READ = ["project_fwd", "maps_fwd norm"], ["write_project", "maps_fwd norm"]
SITE_BACKWARD = ["collapse", "dots_bwd norm", "maps_bwd norm", "streams_bwd norm"]


@pytest.fixture(scope="module")
def figures():
    return run_interpreted("tests.modeling.interpreted")


@pytest.mark.parametrize(
    "case",
    [
        *("inference", "training", "decoding", "steered", "watched site", "watched norm", "another layer follows"),
        *("gathered late", "checkpointed", "recomputed", "adapted", "compiled", "another norm"),
    ],
)
def test_results_are_those_of_a_cpu(figures, case):
    # float32 on both sides: 2e-6 a site and direction, four sites
    assert figures[case][0] <= 1.6e-5


def test_a_layer_trains_with_its_sites_and_norms_joined(figures):
    layer = [*READ, *WRITE_READ, "write"]
    assert figures["training"][1] == 2 * layer + 4 * SITE_BACKWARD
    assert figures["compiled"][1][-len(layer) * 2 - 16 :] == 2 * layer + 4 * SITE_BACKWARD
    # under PEFT too, where the sites are wrapped
    assert figures["adapted"][1] == 2 * layer + 4 * SITE_BACKWARD


def test_decoding_takes_two_launches_a_site_and_one_for_the_last_write(figures):
    num_sites = 4
    assert figures["decoding"][1] == [*READ, *(WRITE_READ * (num_sites - 1)), "write"]
    assert len(figures["decoding"][1]) == 2 * num_sites + 1


def test_projections_that_are_out_of_date_are_made_again(figures):
    # somebody added to the first layer's output in place: the second layer projects by itself
    assert figures["steered"][1] == [*READ, *WRITE_READ, "write_project", *READ, *WRITE_READ, "write"]
    # the first layer's output is read by another layer than it knows of, and so is that one's
    assert figures["another layer follows"][1].count("project_fwd") == 3


def test_a_parameter_that_is_not_there_yet_is_not_used_ahead(figures):
    assert figures["gathered late"][1] == 2 * [*READ, *WRITE_READ, "write"]


def test_a_hook_on_a_site_or_a_norm_is_called_and_sees_what_it_should(figures):
    # written streams before the watched site; the watched norm runs by itself
    assert figures["watched site"][1][2:5] == ["write", "project_fwd", "maps_fwd norm"]
    assert figures["watched norm"][1][:2] == ["project_fwd", "maps_fwd"]


def test_a_norm_of_another_kind_runs_by_itself(figures):
    # the last writes hand on Gram numbers all the same, and the readers leave them
    assert figures["another norm"][1] == ["project_fwd", "maps_fwd", *(["write_project", "maps_fwd"] * 3), "write"]
