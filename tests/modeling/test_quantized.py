"""Bases in 8 and 4 bits by transformers' own quantisers: mHC parameters are left alone, and the rest is the base's.

The quantisers are packages of their own, and each is looked at where it is installed.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from mhc_hf import MHCForCausalLM
from mhc_hf.conversion import convert_checkpoint, verify_conversion

from .family_models import family_model
from .test_families import distance


def torchao(name, **arguments):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    return TorchAoConfig(getattr(quantization, name)(**arguments))


def bitsandbytes(**arguments):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return BitsAndBytesConfig(**arguments)


def quanto(weights):
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    return QuantoConfig(weights=weights)


QUANTISERS = {
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-int4": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "bitsandbytes-int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes-nf4": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "quanto-int8": lambda: quanto("int8"),
    "quanto-int4": lambda: quanto("int4"),
}


@pytest.fixture(scope="module")
def prompt():
    return torch.arange(2, 20).view(2, 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and what it is widened into; quantisers take matrices by the 64."""
    folder = tmp_path_factory.mktemp("quantised")
    base = family_model(
        "llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128
    )
    base.save_pretrained(folder / "base")
    # copies compute the base to the bit, and what quantises activations rounds the same
    MHCForCausalLM.from_base(base, start="copies").save_pretrained(folder / "widened")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_quantised_base_is_widened_with_its_mhc_parameters_untouched(folders, prompt, quantiser):
    base = AutoModelForCausalLM.from_pretrained(folders / "base", quantization_config=QUANTISERS[quantiser]())
    expected, tokens = base(prompt).logits, base.generate(prompt, max_new_tokens=8, do_sample=False)
    exact = AutoModelForCausalLM.from_pretrained(folders / "widened")
    assert distance(expected, exact(prompt).logits) > 1e-3, "nothing was quantised"
    widened = AutoModelForCausalLM.from_pretrained(folders / "widened", quantization_config=QUANTISERS[quantiser]())
    at_once = MHCForCausalLM.from_base(folders / "base", start="copies", quantization_config=QUANTISERS[quantiser]())
    for model in (widened, at_once):
        assert torch.equal(model(prompt).logits, expected)
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), tokens)
        for name, parameter in exact.named_parameters():
            if "_hc." in name:
                assert torch.equal(model.get_parameter(name), parameter), name


@torch.no_grad()
@pytest.mark.parametrize("quantiser", [name for name in QUANTISERS if "quanto" not in name])  # which does not save
def test_a_quantised_checkpoint_is_converted(folders, prompt, quantiser, tmp_path):
    AutoModelForCausalLM.from_pretrained(folders / "base", quantization_config=QUANTISERS[quantiser]()).save_pretrained(
        tmp_path / "base"
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(prompt).logits
    assert torch.equal(MHCForCausalLM.from_base(tmp_path / "base", start="copies")(prompt).logits, expected)
    convert_checkpoint(tmp_path / "base", tmp_path / "widened", start="copies")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "widened")(prompt).logits, expected)
    assert verify_conversion(tmp_path / "base", tmp_path / "widened")


@pytest.mark.parametrize("quantiser", ["torchao-int8", "bitsandbytes-nf4"])
def test_a_quantised_model_in_memory_names_the_way(folders, quantiser):
    base = AutoModelForCausalLM.from_pretrained(folders / "base", quantization_config=QUANTISERS[quantiser]())
    with pytest.raises(ValueError, match=r"is quantised \(.*from_base\(path, quantization_config"):
        MHCForCausalLM.from_base(base)
