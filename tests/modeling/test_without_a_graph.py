"""On a CPU a model's own site passes without an op's checks where no graph is recorded: the same bits, less Python."""

import pytest
import torch

from mhc_hf import MHCForCausalLM
from mhc_hf.modeling.hyper_connection import NO_KERNELS
from mhc_hf.ops.backends import explain_no_native

from ..conftest import tiny_model

TOKEN_IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def model(request):
    """Maps away from their start."""
    widened = MHCForCausalLM.from_base(tiny_model("llama"), hc_mult=3).eval().to(request.param)
    for name, parameter in widened.named_parameters():
        if name.endswith("phi"):
            torch.nn.init.normal_(parameter, std=0.05)
    # without a C compiler PyTorch's operations run, with a graph and without: there is no second way to compare
    if reason := explain_no_native(torch.zeros(1, 3, 8, dtype=request.param), 3):
        pytest.skip(reason)
    return widened


def test_logits_are_those_of_a_recorded_graph_to_the_bit(model):
    with torch.no_grad():
        got = model(TOKEN_IDS).logits
    assert torch.equal(got, model(TOKEN_IDS).logits)


@torch.no_grad()
def test_streams_may_be_empty_and_need_not_be_contiguous(model):
    site = model.model.layers[0].attn_hc
    streams = torch.randn(2, 6, 3 * site.hidden_size).to(model.dtype)
    assert site(streams[:, :0], torch.tanh, joins=NO_KERNELS).shape == (2, 0, 3 * site.hidden_size)
    apart, together = streams[:, ::2], streams[:, ::2].contiguous()
    assert torch.equal(site(apart, torch.tanh, joins=NO_KERNELS), site(together, torch.tanh))
