"""Run on two ranks by test_monitor.py: Trainer with the monitor, under DDP and under FSDP2; prints what it logged.

... -m tests.training.monitored_trainers CHECKPOINT OUTPUT
"""

import json
import sys

import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer
from transformers.distributed import DistributedConfig

import mhc_hf  # noqa: F401, registers the model type
from mhc_hf.training import StreamMonitorCallback

from .conftest import Rows, training_arguments
from .two_ranks import GROUPS_BY_DTYPE

checkpoint, output = sys.argv[1:]
dist.init_process_group("gloo")
engines: dict[str, dict] = {"DDP": {}}
if GROUPS_BY_DTYPE:
    # Trainer of transformers 5.17 wraps a sharded model in DDP
    engines["FSDP2"] = {"distributed_config": DistributedConfig(fsdp_size=2)}
for engine, options in engines.items():
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(checkpoint, **options),
        args=training_arguments(f"{output}/{engine}", max_steps=1),
        train_dataset=Rows(),
        callbacks=[StreamMonitorCallback(per_site=True)],
    )
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "streams/spread" in entry]
    if dist.get_rank() == 0:
        print(json.dumps({"engine": engine, "wrapped": type(trainer.model_wrapped).__name__, "entry": entry}))
# a rank that leaves while another still talks to it can take that one down
dist.barrier()
dist.destroy_process_group()
