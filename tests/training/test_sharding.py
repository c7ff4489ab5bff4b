"""FSDP2 takes nothing from hc_recompute: its hooks stand between sites, and blocks go on through them."""

import copy

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from mhc_hf import MHCForCausalLM
from mhc_hf.training import shard_widened_model

from ..conftest import tiny_model
from ..modeling.memory import allocated_bytes


def test_a_model_that_is_not_widened_is_not_sharded(llama):
    with pytest.raises(ValueError, match="LlamaForCausalLM without an MHCDecoderLayer"):
        shard_widened_model(llama)


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
def test_recompute_saves_as_much_in_a_sharded_model(one_rank, token_ids, param_dtype):
    base = tiny_model("llama", num_hidden_layers=6)
    saved = {}
    for sharded in (False, True):
        found = []
        for recompute in (False, True):
            model = MHCForCausalLM.from_base(copy.deepcopy(base), hc={"hc_recompute": recompute}).train()
            if sharded:
                shard_widened_model(model, mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype))
            elif param_dtype is not None:
                model.to(param_dtype)
            model(token_ids, labels=token_ids).loss.backward()
            gradients = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
            found.append((gradients, allocated_bytes(model, token_ids)))
        (expected, without), (gradients, with_recompute) = found
        assert all(map(torch.equal, gradients, expected))
        saved[sharded] = without - with_recompute
    assert saved[True] == saved[False] > 0
