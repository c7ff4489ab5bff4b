"""From a conversion every mHC parameter learns, and the streams part."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from mhc_hf import HyperConnection, MHCConfig, MHCForCausalLM

from ..conftest import streams_between_layers, tiny_config

NUM_STEPS = 20
STARTS_BY_MULT = [(2, "copies"), (3, "orthogonal"), (4, "orthogonal"), (4, "copies"), (8, "orthogonal")]


def sites(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, HyperConnection)}


def train(model, token_ids, num_steps=NUM_STEPS):
    """AdamW on one batch; returns the gradients of the first and of the last step by parameter name."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    gradients = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(token_ids, labels=token_ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return gradients[0], gradients[-1]


def relative_spread(model, token_ids):
    """By how much the streams differ between layers: |x - mean over streams| / |x|, the largest over layers."""
    streams = [x.float() for x in streams_between_layers(model, token_ids)]
    return max(float((x - x.mean(-2, keepdim=True)).norm() / x.norm()) for x in streams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "start"), STARTS_BY_MULT)
def test_every_parameter_moves_and_h_res_learns(llama, token_ids, n, start, dtype):
    widened = MHCForCausalLM.from_base(copy.deepcopy(llama).to(dtype), hc_mult=n, start=start)
    before = {name: p.detach().clone() for name, p in widened.named_parameters()}
    first, last = train(widened, token_ids)
    for name in sites(widened):
        for part in ("phi", "bias", "alpha"):
            full = f"{name}.{part}"
            # weight decay alone would shrink by at most lr * decay * steps: that is not learning
            decayed = before[full] * (1 - 1e-3 * 1e-2) ** NUM_STEPS
            assert float((widened.get_parameter(full).detach() - decayed).abs().max()) > 1e-4, full
            assert float(last[full].norm()) > 0, full
    # not the first site, whose streams are still copies, nor the last, which mixes into a mean over the streams: a
    # doubly stochastic matrix leaves both alone, so there is nothing to learn
    for name in list(sites(widened))[1:-1]:
        assert float(last[f"{name}.bias"][2 * n :].abs().max()) > 1e-9, name
        if start == "orthogonal":
            assert float(first[f"{name}.bias"][2 * n :].abs().max()) > 1e-7, f"{name} at step 0"
    assert relative_spread(widened, token_ids) > (0.05 if start == "orthogonal" else 1e-5)


def test_a_uniform_start_never_wakes(llama, token_ids):
    """The control: what a conversion must not start from, built by hand."""
    n = 4
    widened = MHCForCausalLM.from_base(copy.deepcopy(llama).double(), hc_mult=n, start="copies")
    with torch.no_grad():
        for module in sites(widened).values():
            module.bias[:n] = -torch.log(torch.tensor(n - 1.0))
    train(widened, token_ids)
    # float64 streams, so that rounding does not do what the start cannot
    assert relative_spread(widened, token_ids) < 1e-12


def test_from_scratch_starts_as_the_paper_does(token_ids):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MHCConfig.from_base(tiny_config("llama")))
    assert isinstance(model, MHCForCausalLM) and model.config.hc_alpha_init == 0.01
    for module in sites(model).values():
        assert torch.all(module.alpha == 0.01)
        assert 0.015 < float(module.phi.std()) < 0.025
    _, last = train(model, token_ids)
    assert all(float(gradient.abs().max()) > 0 for name, gradient in last.items() if "_hc." in name)
    losses = [float(model(token_ids, labels=token_ids).loss)]
    train(model, token_ids)
    losses.append(float(model(token_ids, labels=token_ids).loss))
    assert losses[1] < losses[0] < torch.log(torch.tensor(97.0))
