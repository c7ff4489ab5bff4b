"""A widened model computes what its base computes."""

import copy

import pytest
import torch

from mhc_hf import MHCForCausalLM, MHCModel

from ..conftest import streams_between_layers, tiny_model

STARTS_BY_MULT = [(2, "copies"), (3, "orthogonal"), (3, "copies"), (4, "orthogonal"), (4, "copies"), (8, "orthogonal")]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def base(request):
    return tiny_model(request.param)


def distance(logits, reference):
    return float((logits - reference).abs().max() / reference.abs().max())


def root_mean_square(x):
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
@pytest.mark.parametrize(("n", "start"), STARTS_BY_MULT)
def test_logits_are_the_bases(base, token_ids, n, start):
    widened = MHCForCausalLM.from_base(base, hc_mult=n, start=start)
    assert (
        isinstance(widened, MHCForCausalLM) and isinstance(widened, type(base)) and isinstance(widened.model, MHCModel)
    )
    assert distance(widened(token_ids).logits, base(token_ids).logits) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("n", "start"), [(2, "copies"), (4, "orthogonal")])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_continuations_are_the_bases(base, token_ids, n, start, use_cache):
    widened = MHCForCausalLM.from_base(base, hc_mult=n, start=start)
    padded = token_ids[:, :9].clone()
    padded[0, :4] = 0  # left padding
    arguments = dict(attention_mask=(padded != 0).long(), max_new_tokens=64, do_sample=False, use_cache=use_cache)
    assert torch.equal(widened.generate(padded, **arguments), base.generate(padded, **arguments))


@torch.no_grad()
def test_a_step_with_cache_equals_the_whole_sequence(llama, token_ids):
    widened = MHCForCausalLM.from_base(llama)
    whole = widened(token_ids).logits
    cache = widened(token_ids[:, :40], use_cache=True).past_key_values
    stepped = widened(token_ids[:, 40:], past_key_values=cache).logits
    assert distance(stepped, whole[:, 40:]) <= 1e-5
    # the cache never hears of n
    assert cache.layers[0].keys.shape == (2, 2, 63, 10)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_copies_of_one_stream_compute_the_base_to_the_bit(base, token_ids, n, dtype):
    low = copy.deepcopy(base).to(dtype)
    widened = MHCForCausalLM.from_base(low, hc_mult=n, start="copies")
    assert torch.equal(widened(token_ids).logits, low(token_ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("n", [3, 4, 8])
def test_bf16_is_no_further_from_float32_than_the_base_is(base, token_ids, n):
    exact = base(token_ids).logits
    low = copy.deepcopy(base).to(torch.bfloat16)
    error_of_base = root_mean_square(low(token_ids).logits - exact)
    widened = MHCForCausalLM.from_base(low, hc_mult=n)
    assert root_mean_square(widened(token_ids).logits - exact) <= 1.05 * error_of_base


@torch.no_grad()
def test_streams_hold_different_content_from_the_first_layer(llama, token_ids):
    widened = MHCForCausalLM.from_base(copy.deepcopy(llama), hc_mult=4, start="orthogonal")
    streams = streams_between_layers(widened, token_ids)
    assert [x.shape for x in streams] == 2 * [(2, 63, 4, 60)]
    for x in streams:
        spread = (x - x.mean(-2, keepdim=True)).norm() / x.norm()
        assert spread > 0.1


@torch.no_grad()
def test_gradients_of_base_parameters_are_the_bases(llama, token_ids):
    base = copy.deepcopy(llama)
    widened = MHCForCausalLM.from_base(copy.deepcopy(llama), hc_mult=3)
    with torch.enable_grad():
        for model in (base, widened):
            model(token_ids, labels=token_ids).loss.backward()
    for name, parameter in base.named_parameters():
        got = widened.get_parameter(name).grad
        assert float((got - parameter.grad).norm() / parameter.grad.norm()) <= 1e-5, name
