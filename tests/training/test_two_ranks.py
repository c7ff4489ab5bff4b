"""Every engine on two real processes finds the loss and the gradients that one process finds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mhc_hf import MHCForCausalLM

from ..conftest import VOCAB_SIZE, tiny_model
from .launching import run_python
from .two_ranks import ENGINES, GROUPS_BY_DTYPE, LEARNING_RATE

pytestmark = pytest.mark.slow
MULTS = [3, 4]
# float64 models, so that reordered sums agree to 1e-13; what remains is the float32 of mHC gradients, 6e-8 for each of
# the few that are added up
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two_ranks.py has written, for each n."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for n in MULTS:
        model = MHCForCausalLM.from_base(tiny_model("llama", num_hidden_layers=5, vocab_size=98).double(), hc_mult=n)
        generator = torch.Generator().manual_seed(n)
        with torch.no_grad():
            # away from the start, where some gradients are zero
            for name, parameter in model.named_parameters():
                if "_hc." in name:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / str(n) / "start")
        tokens = torch.randint(2, VOCAB_SIZE, (8, 17), generator=generator)
        (folder / str(n) / "start" / "tokens.json").write_text(json.dumps(tokens.tolist()))
    run_python(Path(__file__).with_name("two_ranks.py"), folder, ranks=2)
    return folder


@pytest.mark.parametrize("n", MULTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_loss_gradients_and_checkpoint_are_those_of_one_process(runs, engine, n):
    folder = runs / str(n)
    names = ["start", *ENGINES]
    before = names[names.index(engine) - 1]
    # the checkpoint of another engine, loaded by one process
    source = folder / before if before == "start" else folder / before / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(source).train()
    tokens = torch.tensor(json.loads((folder / "start" / "tokens.json").read_text()))
    loss = model(tokens, labels=tokens).loss
    loss.backward()

    seen = set()
    for rank in (0, 1):
        assert json.loads((folder / engine / f"loss-{rank}.json").read_text()) == pytest.approx(
            float(loss.detach()), rel=TOLERANCE
        )
        for name, gradient in load_file(folder / engine / f"gradients-{rank}.safetensors").items():
            reference = model.get_parameter(name).grad
            assert gradient.dtype == reference.dtype
            assert float((gradient - reference).norm()) <= TOLERANCE * float(reference.norm()), name
            seen.add(name)
    assert seen == {name for name, _ in model.named_parameters()}

    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    saved = AutoModelForCausalLM.from_pretrained(folder / engine / "checkpoint")
    assert type(saved) is type(model)
    for name, value in model.named_parameters():
        after = saved.get_parameter(name)
        assert after.dtype == value.dtype
        assert float((after - value).detach().norm()) <= TOLERANCE * float(value.detach().norm()), name


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
def test_a_policy_that_would_lower_mhc_is_refused_by_name(runs, n):
    for rank in (0, 1):
        refusal = json.loads((runs / str(n) / f"seen-{rank}.json").read_text())["refusal"]
        assert "`phi` must be float32, got torch.bfloat16" in refusal
