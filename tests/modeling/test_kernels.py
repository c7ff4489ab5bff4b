"""A widened model on the kernels computes what it does on a CPU, whoever watches or wraps it."""

import pytest

from ..interpreter import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# one layer of two sites, forward and backward
READ, WRITE_READ = ["project_fwd", "maps_fwd norm"], ["write_project", "maps_fwd norm"]
# in inference: the first site of a model, and one that the layer before has projected for
FIRST_READ = ["widen_project", "maps_fwd norm"]
SITE_BACKWARD = ["collapse", "dots_bwd norm", "maps_bwd norm", "streams_bwd norm"]


@pytest.fixture(scope="module")
def figures():
    return run_interpreted("tests.modeling.interpreted")


@pytest.mark.parametrize(
    "case",
    [
        *("inference", "training", "decoding", "steered", "watched site", "watched norm", "another layer follows"),
        *("gathered late", "checkpointed", "recomputed", "adapted", "compiled", "another norm", "one layer"),
        *("one site a layer", "scaled streams", "inference mode", "adapted inference"),
        *("watched first site", "watched last site"),
    ],
)
def test_results_are_those_of_a_cpu(figures, case):
    # float32 on both sides: 2e-6 a site and direction, four sites
    assert figures[case][0] <= 1.6e-5


def test_layers_train_with_their_sites_and_norms_joined(figures):
    # the first site has nobody before it, the last one nobody after it
    joined = [*READ, *(3 * WRITE_READ), "write"]
    assert figures["training"][1] == joined + 4 * SITE_BACKWARD
    # under PEFT, where the sites are wrapped, and for a compiler, one layer follows the other
    layers = 2 * [*READ, *WRITE_READ, "write"]
    assert figures["adapted"][1] == layers + 4 * SITE_BACKWARD
    assert figures["compiled"][1][-len(layers) - 16 :] == layers + 4 * SITE_BACKWARD


def test_a_checkpointed_layer_finds_its_projections_again(figures):
    again = [*WRITE_READ[1:], *WRITE_READ, "write"]
    forward = [*READ, *(3 * WRITE_READ), "write"]
    assert figures["checkpointed"][1][: len(forward) + len(again)] == forward + again
    assert figures["checkpointing changes"] == []


def test_decoding_takes_two_launches_a_site_and_one_for_the_widening(figures):
    num_sites = 4
    assert figures["decoding"][1] == [*FIRST_READ, *(WRITE_READ * (num_sites - 1)), "write_collapse"]
    assert len(figures["decoding"][1]) == 2 * num_sites + 1
    assert figures["one layer"][1] == [*FIRST_READ, *WRITE_READ, "write_collapse"]
    assert figures["one site a layer"][1] == [
        "widen_project",
        "maps_fwd",
        "write_project",
        "maps_fwd",
        "write_collapse",
    ]


def test_decoding_adds_no_operation_of_torch_to_those_of_the_base(figures):
    assert figures["operations added"] == {}


def test_streams_that_are_scaled_are_written_before_they_are_collapsed(figures):
    layer = ["maps_fwd", "write_project", "maps_fwd", "write"]
    assert figures["scaled streams"][1] == ["widen_project", *layer, "project_fwd", *layer]


def test_tensors_without_a_version_hand_nothing_on(figures):
    layer = [*READ, *WRITE_READ]
    assert figures["inference mode"][1] == [*layer, "write", *layer, "write_collapse"]


def test_projections_that_are_out_of_date_are_made_again(figures):
    # somebody added to the first layer's output in place: the second layer projects by itself
    layer = [*READ, *WRITE_READ]
    assert figures["steered"][1] == [*FIRST_READ, *WRITE_READ, "write_project", *layer, "write_collapse"]
    # the first layer's output is read by another layer than it knows of, and so is that one's
    assert figures["another layer follows"][1].count("project_fwd") == 2


def test_a_parameter_that_is_not_there_yet_is_not_used_ahead(figures):
    assert figures["gathered late"][1] == [*FIRST_READ, *WRITE_READ, "write", *READ, *WRITE_READ, "write_collapse"]


def test_a_hook_on_a_site_or_a_norm_is_called_and_sees_what_it_should(figures):
    # written streams before the watched site; the watched norm runs by itself
    assert figures["watched site"][1][2:5] == ["write", "project_fwd", "maps_fwd norm"]
    assert figures["watched norm"][1][:2] == ["widen_project", "maps_fwd"]
    # streams into the first site, and streams out of the last
    assert figures["watched first site"][1][:3] == [*READ, "write"]
    assert figures["watched last site"][1][-4:] == ["write", *READ, "write"]


def test_a_norm_of_another_kind_runs_by_itself(figures):
    # the last writes hand on Gram numbers all the same, and the readers leave them
    sites = ["widen_project", "maps_fwd", *(["write_project", "maps_fwd"] * 3), "write_collapse"]
    assert figures["another norm"][1] == sites
