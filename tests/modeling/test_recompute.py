"""hc_recompute keeps less for backward and changes no gradient (arXiv 2512.24880, Eq. 20)."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mhc_hf import HyperConnection, MHCConfig, MHCForCausalLM
from mhc_hf.modeling.recompute import StreamBlock, default_block_layers

from ..conftest import tiny_model
from .memory import allocated_bytes


def widen_pair(n, dtype=torch.float32, **base):
    """The same widened model without and with recompute; its dynamic maps are awake."""
    plain = MHCForCausalLM.from_base(tiny_model("llama", **base).to(dtype), hc_mult=n).train()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, HyperConnection):
                module.phi.normal_(std=0.02, generator=torch.Generator().manual_seed(module.site))
    frugal = copy.deepcopy(plain)
    for module in frugal.modules():
        if isinstance(module, HyperConnection):
            module.recompute = True
    return plain, frugal


def gradients(model, token_ids):
    model.zero_grad()
    model(token_ids, labels=token_ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def kept_bytes(model, token_ids, monkeypatch):
    """Bytes of all storages that forward keeps for backward, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    class WatchedBlock(StreamBlock):
        # a block's own tensors are not seen by autograd's hooks
        def __init__(self, first):
            super().__init__(first)
            keep(first)

        def record(self, branch_out, site):
            super().record(branch_out, site)
            for tensor in (branch_out, site.h_post, site.h_res):
                keep(tensor)

    monkeypatch.setattr("mhc_hf.modeling.recompute.StreamBlock", WatchedBlock)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(token_ids, labels=token_ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "num_layers"), [(2, 1), (3, 5), (4, 7)])
def test_gradients_are_the_same_to_the_bit(token_ids, n, num_layers, dtype):
    plain, frugal = widen_pair(n, dtype, num_hidden_layers=num_layers)
    expected = gradients(plain, token_ids)
    for name, gradient in gradients(frugal, token_ids).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same_under_gradient_checkpointing(token_ids, use_reentrant):
    plain, frugal = widen_pair(3)
    expected = gradients(plain, token_ids)
    frugal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, gradient in gradients(frugal, token_ids).items():
        assert torch.equal(gradient, expected[name]), name


def test_gradient_checkpointing_keeps_no_more_with_it(token_ids):
    plain, frugal = widen_pair(4)
    for model in (plain, frugal):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert 0 < allocated_bytes(frugal, token_ids) <= allocated_bytes(plain, token_ids)


def test_compiled_it_keeps_less_and_gradients_are_the_same_to_the_bit(token_ids, monkeypatch):
    n = 3
    kept, found = [], []
    for model in widen_pair(n, num_hidden_layers=2):
        torch._dynamo.reset()
        # inductor's own partitioner, which decides what is kept, without its code generation, which takes long
        compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
        found.append(gradients(compiled, token_ids))
        kept.append(kept_bytes(compiled, token_ids, monkeypatch))
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())
    # blocks of one layer: of its two sites, what the first one writes is made again, n*C float32 a token, from its
    # h_res and a link of one number
    assert kept[0] - kept[1] == 2 * 4 * (token_ids.numel() * (n * 60 - n * n) - 1)


@pytest.mark.parametrize("touch", [lambda x: x.view_as(x), lambda x: x * 1.5, lambda x: x.mul_(1.5)])
def test_blocks_go_on_through_aliases_and_end_at_changes(token_ids, monkeypatch, touch):
    # hooks of a sharded model hand on aliases; others may change what a site gets
    plain, frugal = widen_pair(4, num_hidden_layers=5)
    untouched = kept_bytes(frugal, token_ids, monkeypatch)
    for model in (plain, frugal):
        for layer in model.model.layers[1:]:
            layer.register_forward_pre_hook(lambda module, inputs: (touch(inputs[0]), *inputs[1:]))
    expected = gradients(plain, token_ids)
    assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(frugal, token_ids).items())
    ends = not torch.equal(touch(torch.ones(1)), torch.ones(1))
    assert (kept_bytes(frugal, token_ids, monkeypatch) > untouched) == ends


def test_streams_read_twice_belong_to_one_block_each_time(token_ids):
    plain, frugal = widen_pair(4)
    found = []
    for model in (plain, frugal):
        site = model.model.layers[1].attn_hc
        x = torch.randn(2, 9, 4 * 60, generator=torch.Generator().manual_seed(0), requires_grad=True)
        streams = site(x, torch.nn.Identity())
        both = site(streams, torch.nn.Identity()) + model.model.layers[2].attn_hc(streams, torch.nn.Identity())
        found.append(torch.autograd.grad(both.square().sum(), x)[0])
    assert torch.equal(*found)


def test_a_second_backward_through_the_same_graph_gives_the_same(token_ids):
    _, frugal = widen_pair(4)
    loss = frugal(token_ids, labels=token_ids).loss
    weight = frugal.model.layers[0].self_attn.q_proj.weight
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, weight)[0], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 4])
def test_memory_is_near_the_bases(token_ids, monkeypatch, n, dtype):
    shape = dict(num_hidden_layers=24, hidden_size=120, intermediate_size=330, head_dim=20)
    plain, frugal = widen_pair(n, dtype, **shape)
    base = kept_bytes(tiny_model("llama", **shape).to(dtype).train(), token_ids, monkeypatch)
    assert kept_bytes(plain, token_ids, monkeypatch) <= 2 * base
    assert kept_bytes(frugal, token_ids, monkeypatch) <= 1.25 * base


def test_the_configuration_turns_it_on(llama):
    widened = MHCForCausalLM(MHCConfig.from_base(llama.config, hc_recompute=True, hc_recompute_layers=2))
    sites = [module for module in widened.modules() if isinstance(module, HyperConnection)]
    assert all(site.recompute and site.sites_per_block == 4 for site in sites)
    assert widened.config.to_diff_dict()["hc_recompute"] is True
    with pytest.raises(ValueError, match="`hc_recompute_layers` must be an integer >= 1, got 0"):
        MHCConfig.from_base(llama.config, hc_recompute_layers=0)


def test_blocks_are_as_long_as_the_paper_says():
    assert default_block_layers(4, 24) == 4
    assert default_block_layers(4, 60) == 6
    assert default_block_layers(2, 1) == 1
