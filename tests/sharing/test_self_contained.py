"""A self-contained folder is, where the package is not installed, what the package makes of it, to the bit."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from mhc_hf import HyperConnection, verify_conversion
from mhc_hf.sharing import CODE_FILE, generate_modeling_code

from .conftest import FAMILIES
from .stranger import HEADS, TOKENS, observe

pytestmark = pytest.mark.slow
# the same numbers at another address, or in another graph: sums are taken in another order
ROUNDING = 1e-6


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_the_package_was_not_there(strangers):
    assert strangers["package was there"] is False


def test_logits_tokens_gradients_and_a_step_are_the_packages(folders, strangers, family, torch_path):
    model = AutoModelForCausalLM.from_pretrained(folders / family)
    expected, found = observe(model), strangers[family]
    for name in ("logits", "generated", "loss", "trained"):
        assert torch.equal(found[name], expected[name]), name
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert torch.equal(found["gradients"][name], gradient), name
    assert not torch.equal(expected["trained"], expected["logits"])


def test_the_decoder_is_the_packages(folders, strangers, family, torch_path):
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folders / family)(TOKENS).last_hidden_state
    assert torch.equal(strangers[family]["decoder"], expected)


def test_classes_are_those_that_the_configuration_names(folders, strangers, family):
    named = json.loads((folders / family / "config.json").read_text())["auto_map"]
    found = strangers[family]
    for auto_class, (module, name) in [("AutoConfig", found["config"]), ("AutoModelForCausalLM", found["class"])]:
        assert module.startswith("transformers_modules.") and module.endswith(".modeling_mhc")
        assert named[auto_class] == f"modeling_mhc.{name}"
    for head in HEADS:
        name, trained = found[head.__name__]
        assert named[head.__name__] == f"modeling_mhc.{name}" and trained


def test_saving_takes_the_code_along(folders, strangers, family):
    assert strangers[family]["saved weights"] and strangers[family]["saved"] <= ROUNDING
    saved = folders.parent / "saved" / family
    assert (saved / CODE_FILE).read_bytes() == (folders / family / CODE_FILE).read_bytes()
    one, other = (json.loads((folder / "config.json").read_text())["auto_map"] for folder in (folders / family, saved))
    assert one == other and len(one) == 6


def test_copies_pickles_pipelines_and_the_compiler(strangers):
    assert max(strangers["copies"]) <= ROUNDING
    written, expected = strangers["pipeline"]
    assert written == expected
    assert strangers["compiled"] <= ROUNDING


def test_recompute_and_float32_parameters_come_along(strangers):
    assert strangers["recompute"]
    assert strangers["dtypes"] == {(True, torch.float32), (False, torch.bfloat16)}


def test_where_the_package_is_imported_its_classes_are_taken_and_the_others_go_on(folders, strangers, torch_path):
    together = strangers["together"]
    assert together["guest is a guest"] and together["host is the package's"] and together["guest computes on"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folders / "llama")(TOKENS).logits
    # the other process may have taken another backend
    assert (together["host's logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(together["loss"], strangers["llama"]["loss"])


def test_the_package_loads_and_verifies_the_folder_as_ever(folders, family):
    model = AutoModelForCausalLM.from_pretrained(folders / family, trust_remote_code=True)
    assert any(isinstance(module, HyperConnection) for module in model.modules())
    assert (folders / family / CODE_FILE).read_text() == generate_modeling_code()
    if family == "llama":
        verified = verify_conversion(folders.parent / "bases" / family, folders / family)
        assert verified, str(verified)
