"""Run on two ranks by test_sharded.py: measures a model whole and under FSDP2, and prints both."""

import copy
import json

import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard

from mhc_hf import MHCForCausalLM
from mhc_hf.inspection.measure import measure_gradients, summarize
from mhc_hf.inspection.recording import record_streams
from tests.conftest import VOCAB_SIZE, tiny_model

torch.distributed.init_process_group("gloo")
whole = MHCForCausalLM.from_base(tiny_model("llama"))
sharded = copy.deepcopy(whole)
for layer in sharded.model.layers:
    fully_shard(layer)
fully_shard(sharded)
ids = torch.randint(2, VOCAB_SIZE, (2, 31), generator=torch.Generator().manual_seed(0))
for model in (whole, sharded):
    with record_streams(model.train()) as recording:
        model(input_ids=ids, labels=ids).loss.backward()
    by_site = summarize(recording, measure_gradients(model)).by_site()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(by_site))
# a rank that leaves while another still talks to it can take that one down
torch.distributed.barrier()
torch.distributed.destroy_process_group()
