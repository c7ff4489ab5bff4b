"""mHC parameters are float32 whatever is done to the model, and so is what they compute."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from mhc_hf import HyperConnection, MHCForCausalLM


def dtypes(model):
    """(of the mHC parameters, of the others)"""
    named = list(model.named_parameters())
    return {p.dtype for name, p in named if "_hc." in name}, {p.dtype for name, p in named if "_hc." not in name}


@pytest.fixture
def widened(llama):
    return MHCForCausalLM.from_base(copy.deepcopy(llama))


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.type(torch.bfloat16),
        lambda model: copy.deepcopy(model).to(torch.bfloat16).to(torch.float32),
    ],
    ids=["to", "bfloat16", "half", "device and dtype", "type", "there and back"],
)
def test_casting_the_model_leaves_mhc_parameters_to_the_bit(widened, cast):
    before = {name: p.detach().clone() for name, p in widened.named_parameters() if "_hc." in name}
    cast_model = cast(widened)
    assert dtypes(cast_model)[0] == {torch.float32}
    for name, value in before.items():
        assert torch.equal(cast_model.get_parameter(name), value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_a_low_dtype_keeps_float32(widened, tmp_path, dtype):
    widened.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert dtypes(loaded) == ({torch.float32}, {dtype})


def test_autocast_leaves_the_maps_in_float32(widened, token_ids):
    # 1 + 2**-10 is 1 in bf16: biases this close together stay apart only in float32
    seen = {}
    site = widened.model.layers[1].attn_hc
    with torch.no_grad():
        site.bias += 2.0**-10 * torch.arange(len(site.bias))

    def look(module, args):
        seen["streams"] = args[0]

    handle = site.register_forward_pre_hook(look)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = widened(token_ids).logits
        maps = site.maps(seen["streams"])
    handle.remove()
    assert out.isfinite().all()
    assert {m.dtype for m in maps} == {torch.float32}
    outside = site.maps(seen["streams"])
    assert all(torch.equal(a, b) for a, b in zip(maps, outside, strict=True))


def test_gradients_and_optimizer_state_are_float32_in_a_bf16_model(widened, token_ids):
    widened.to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(widened.parameters(), lr=1e-3)
    widened(token_ids, labels=token_ids).loss.backward()
    optimizer.step()
    for module in widened.modules():
        if isinstance(module, HyperConnection):
            for parameter in module.parameters():
                assert parameter.grad.dtype == torch.float32
                assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
