"""PEFT on widened models: LoRA, hyper-connections, or both; saved, loaded, merged, switched and resumed."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer

from mhc_hf import MHCForCausalLM
from mhc_hf.training import mhc_lora_config

from .conftest import Rows, hc_parameters, losses, training_arguments

MODES = ["lora+mhc", "lora", "mhc"]
RANK = {"lora+mhc": dict(r=4), "lora": dict(r=4), "mhc": {}}


def adapt(base, mode, dtype=torch.float32):
    torch.manual_seed(0)
    widened = MHCForCausalLM.from_base(copy.deepcopy(base).to(dtype))
    return get_peft_model(widened, mhc_lora_config(widened, mode, **RANK[mode]))


def train(model, output_dir, **arguments):
    trainer = Trainer(model, training_arguments(output_dir, **arguments), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


@torch.no_grad()
def logits(model, token_ids):
    return model.eval()(input_ids=token_ids).logits


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """(model, folder) by mode, after a few steps; the folders hold adapters."""
    made = {}
    for mode in MODES:
        folder = tmp_path_factory.mktemp("adapter")
        model = adapt(llama, mode)
        train(model, folder)
        model.save_pretrained(folder)
        made[mode] = (model, folder)
    return made


@pytest.mark.parametrize("mode", MODES)
def test_what_the_mode_names_is_trained_and_nothing_else(llama, trained, mode):
    before = dict(adapt(llama, mode).named_parameters())
    model, _ = trained[mode]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"lora": "lora_", "mhc": "modules_to_save.default."}
    for part, mark in expected.items():
        assert any(mark in name for name in moved) == (part in mode)
    assert all("lora_" in name or "modules_to_save.default." in name for name in moved)
    # three layers of seven linears, two matrices each; three layers of two sites, three parameters each
    assert len(moved) == (42 if "lora" in mode else 0) + (18 if "mhc" in mode else 0)


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_loads_onto_a_freshly_widened_base_to_the_bit(llama, trained, token_ids, mode):
    model, folder = trained[mode]
    on_disk = load_file(folder / "adapter_model.safetensors")
    stored = {name for name in on_disk if "_hc." in name}
    assert len(stored) == (18 if "mhc" in mode else 0) and all(on_disk[n].dtype == torch.float32 for n in stored)
    loaded = PeftModel.from_pretrained(MHCForCausalLM.from_base(copy.deepcopy(llama)), folder)
    for name, value in hc_parameters(model).items():
        assert torch.equal(hc_parameters(loaded)[name], value), name
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


@pytest.mark.parametrize("mode", MODES)
def test_merged_equals_unmerged(trained, token_ids, mode):
    # in float64, so that what remains is an error of merging, not the rounding of a matrix product
    model = copy.deepcopy(trained[mode][0]).double()
    before = logits(model, token_ids)
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "MHCLlamaForCausalLM"
    assert not any("original_module" in name or "lora" in name for name, _ in merged.named_modules())
    assert float((logits(merged, token_ids) - before).abs().max() / before.abs().max()) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_merged_equals_unmerged_in_float32_to_1e_6(trained, token_ids, mode, tmp_path):
    model = copy.deepcopy(trained[mode][0])
    before = logits(model, token_ids)
    merged = model.merge_and_unload()
    error = (logits(merged, token_ids) - before).double()
    # root mean square, as rounding errors of some thousand products add up like noise: each is below 6e-8
    assert float(error.square().mean().sqrt() / before.double().square().mean().sqrt()) <= 1e-6
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(MHCForCausalLM.from_pretrained(tmp_path), token_ids), logits(merged, token_ids))


def test_several_adapters_keep_their_own_hyper_connections(llama, trained, token_ids):
    both = PeftModel.from_pretrained(
        MHCForCausalLM.from_base(copy.deepcopy(llama)), trained["lora+mhc"][1], adapter_name="one"
    )
    both.load_adapter(trained["mhc"][1], adapter_name="two")
    of_base = logits(MHCForCausalLM.from_base(llama), token_ids)
    for name, mode in (("one", "lora+mhc"), ("two", "mhc"), ("one", "lora+mhc")):
        both.set_adapter(name)
        assert torch.equal(logits(both, token_ids), logits(trained[mode][0], token_ids))
        assert not torch.equal(logits(both, token_ids), of_base)
    with both.disable_adapter():
        assert torch.equal(logits(both, token_ids), of_base)


def test_training_resumes_from_a_checkpoint_to_the_bit(llama, tmp_path):
    whole = train(adapt(llama, "lora+mhc"), tmp_path / "whole", max_steps=6)
    train(adapt(llama, "lora+mhc"), tmp_path / "parts", max_steps=6, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    resumed = train(adapt(llama, "lora+mhc"), tmp_path / "rest", max_steps=6, resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), value), name


def test_copies_of_a_bf16_base_are_trained_in_float32(llama, tmp_path):
    model = adapt(llama, "lora+mhc", torch.bfloat16)
    trainer = train(model, tmp_path, bf16=True)
    trainable = {name: p for name, p in hc_parameters(model).items() if p.requires_grad}
    assert len(trainable) == 18
    for name, parameter in trainable.items():
        state = trainer.optimizer.optimizer.state[parameter]
        assert parameter.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32, name
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


def test_what_the_user_asks_for_comes_beside_what_mhc_needs(widened):
    config = mhc_lora_config(widened, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="SEQ_CLS")
    assert config.modules_to_save == ["attn_hc", "ffn_hc", "lm_head"]
    assert config.target_modules == {"q_proj"} and config.task_type == "SEQ_CLS"
    assert mhc_lora_config(widened).task_type == "CAUSAL_LM"
    assert not mhc_lora_config(widened, "lora").modules_to_save


def test_wrong_use_is_named_with_its_rule(llama, widened):
    with pytest.raises(ValueError, match="`train` must be one of 'lora\\+mhc', 'lora', 'mhc', got 'all'"):
        mhc_lora_config(widened, "all")
    with pytest.raises(ValueError, match='r set up LoRA, and `train="mhc"` has none'):
        mhc_lora_config(widened, "mhc", r=4)
    with pytest.raises(ValueError, match="LlamaForCausalLM without a HyperConnection"):
        mhc_lora_config(llama)
    with pytest.raises(ValueError, match="must not be wrapped by PEFT yet"):
        mhc_lora_config(get_peft_model(widened, mhc_lora_config(widened)))
