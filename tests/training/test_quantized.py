"""LoRA and hyper-connections trained on a quantised base: QLoRA, where a quantiser runs on the CPU."""

import copy
import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from mhc_hf import MHCForCausalLM
from mhc_hf.training import mhc_lora_config, mhc_param_groups

from ..conftest import tiny_model
from .conftest import hc_parameters


def nf4(dtype):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def int8(dtype):
    # from what a broken one raises when it is imported, a skip must not be made
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base/ and widened/, of sizes that blocks of a quantiser divide."""
    folder = tmp_path_factory.mktemp("quantized")
    base = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16, num_attention_heads=4)
    base.save_pretrained(folder / "base")
    MHCForCausalLM.from_base(copy.deepcopy(base)).save_pretrained(folder / "widened")
    return folder


LOADERS = {"base": MHCForCausalLM.from_base, "widened": AutoModelForCausalLM.from_pretrained}


def load(folders, source, quantizer, dtype=torch.bfloat16):
    return LOADERS[source](folders / source, quantization_config=quantizer(dtype), dtype=dtype)


@torch.no_grad()
def logits(model, token_ids):
    return model.eval()(input_ids=token_ids).logits


# of the largest logit. torchao computes in float32, as unquantised models do. bitsandbytes' kernel for CPUs rounds what
# it multiplies to bf16: a float32 rounding before it may come out as one of bf16, in each of three layers
@pytest.mark.parametrize(("quantizer", "tolerance"), [(nf4, 3 * 2.0**-8), (int8, 1e-5)])
@pytest.mark.parametrize("source", LOADERS)
def test_widening_a_quantised_base_changes_no_logits(folders, token_ids, source, quantizer, tolerance):
    base = AutoModelForCausalLM.from_pretrained(
        folders / "base", quantization_config=quantizer(torch.float32), dtype=torch.float32
    )
    expected = logits(base, token_ids)
    largest = float(expected.abs().max())
    unquantised = logits(AutoModelForCausalLM.from_pretrained(folders / "base"), token_ids)
    widened = logits(load(folders, source, quantizer, torch.float32), token_ids)
    assert float((widened - expected).abs().max()) <= tolerance * largest
    # and it is quantised
    assert float((expected - unquantised).abs().max()) > max(1e-2, 4 * tolerance) * largest


@pytest.mark.parametrize("quantizer", [nf4, int8])
@pytest.mark.parametrize("source", LOADERS)
def test_adapters_on_a_quantised_base_train_in_float32_and_load_to_the_bit(
    folders, token_ids, tmp_path, source, quantizer
):
    torch.manual_seed(0)
    model = prepare_model_for_kbit_training(load(folders, source, quantizer), use_gradient_checkpointing=False)
    adapted = get_peft_model(model, mhc_lora_config(model, r=4)).train()
    optimizer = torch.optim.AdamW(mhc_param_groups(adapted, 5e-3))
    losses = []
    for _ in range(10):
        loss = adapted(input_ids=token_ids, labels=token_ids).loss
        loss.backward()
        trained = {name: p for name, p in hc_parameters(adapted).items() if p.requires_grad}
        assert len(trained) == 18
        assert {p.dtype for p in trained.values()} == {p.grad.dtype for p in trained.values()} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    adapted.save_pretrained(tmp_path)
    fresh = prepare_model_for_kbit_training(load(folders, source, quantizer), use_gradient_checkpointing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path), token_ids), logits(adapted, token_ids))
