"""Every engine on two real processes finds the loss and the gradients that one process finds."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from .engine_runs import one_process, relative_error, run_engines, two_ranks, write_start
from .two_ranks import ENGINES, GROUPS_BY_DTYPE, LEARNING_RATE

pytestmark = pytest.mark.slow
MULTS = [3, 4]
# float64 models, so that reordered sums agree to 1e-13; what remains is the float32 of mHC gradients, 6e-8 for each of
# the few that are added up
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two_ranks.py has written, for each n; one of them with hc_recompute."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for n in MULTS:
        write_start(folder, n, num_hidden_layers=5, recompute=n == 4)
    run_engines(folder)
    return folder


@pytest.mark.parametrize("n", MULTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_loss_gradients_and_checkpoint_are_those_of_one_process(runs, engine, n):
    folder = runs / str(n)
    model, loss = one_process(folder, engine)
    seen = set()
    for rank_loss, gradients in two_ranks(folder, engine):
        assert rank_loss == pytest.approx(loss, rel=TOLERANCE)
        for name, gradient in gradients.items():
            reference = model.get_parameter(name).grad
            assert gradient.dtype == reference.dtype
            assert relative_error(gradient, reference) <= TOLERANCE, name
            seen.add(name)
    assert seen == {name for name, _ in model.named_parameters()}

    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    saved = AutoModelForCausalLM.from_pretrained(folder / engine / "checkpoint")
    assert type(saved) is type(model)
    for name, value in model.named_parameters():
        after = saved.get_parameter(name)
        assert after.dtype == value.dtype
        assert relative_error(after, value) <= TOLERANCE, name


@pytest.mark.parametrize("n", MULTS)
def test_mhc_is_float32_in_every_engine_and_mode(runs, n):
    for rank in (0, 1):
        modes = json.loads((runs / str(n) / f"seen-{rank}.json").read_text())["dtypes"]
        assert len(modes) == 5 + GROUPS_BY_DTYPE
        for mode, seen in modes.items():
            for what in ("parameter", "in forward", "gradient", "state"):
                assert seen[what] == ["torch.float32"], (mode, what)
            assert ("torch.bfloat16" in seen["base"]) == ("bf16 model" in mode), mode


@pytest.mark.parametrize("n", MULTS)
def test_every_engines_checkpoint_loads_into_every_other(runs, n):
    # those that are not named here load as one process does, which the test of each engine has done
    for rank in (0, 1):
        changed = json.loads((runs / str(n) / f"seen-{rank}.json").read_text())["changed"]
        assert len(changed) == len(ENGINES) * (1 + GROUPS_BY_DTYPE)
        assert not any(changed.values()), changed


@pytest.mark.parametrize("n", MULTS)
def test_what_hyper_connections_cannot_take_is_refused_by_name(runs, n):
    for rank in (0, 1):
        refusals = json.loads((runs / str(n) / f"seen-{rank}.json").read_text())["refusals"]
        assert "`phi` must be float32, got torch.bfloat16" in refusals["lower"]
        if "cut" in refusals:
            assert "`pp_size` above 1 for a widened model, got 2" in refusals["cut"]
            assert "TrainingPipeline" in refusals["cut"]
