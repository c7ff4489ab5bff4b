"""What test_two_ranks.py runs under `python -m torch.distributed.run --nproc_per_node 2`: every engine, one step each.

Each engine loads the checkpoint that the one before it has written, computes the loss and the gradients of one batch,
takes a step of SGD and writes a checkpoint for the next: `FOLDER/<n>/<engine>/`. What the engines should have found is
for the test to say, on one process.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from mhc_hf import HyperConnection
from mhc_hf.training import TrainingPipeline, mhc_lora_config, mhc_param_groups, shard_widened_model
from mhc_hf.training.pipeline import GREETS_ITSELF

LEARNING_RATE = 0.05
# earlier versions of transformers shard layers as one group, which float32 sites and other weights cannot share
GROUPS_BY_DTYPE = hasattr(DistributedConfig, "fsdp_plan")
OWN_GROUPS = {f"model.layers.*.{site}": "free_full_weight" for site in ("attn_hc", "ffn_hc")}


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).train()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean_over_ranks(loss):
    loss = whole(loss.detach()).clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def my_rows(tokens):
    return tokens.chunk(dist.get_world_size())[dist.get_rank()]


def step_and_write(folder, loss, parameters, save):
    """Write loss and gradients (each rank what it has), step, and `save` the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    gradients = {name: whole(p.grad).contiguous().clone() for name, p in parameters.items()}
    save_file(gradients, folder / f"gradients-{dist.get_rank()}.safetensors")
    (folder / f"loss-{dist.get_rank()}.json").write_text(json.dumps(float(loss)))
    torch.optim.SGD(parameters.values(), lr=LEARNING_RATE, foreach=False).step()
    save(folder / "checkpoint")
    dist.barrier()


def run_trainer(source, folder, tokens):
    """DDP, two micro-batches a step, gradient checkpointing."""

    class Keep(TrainerCallback):
        gradients = None

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model = load(source)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=1,
        per_device_train_batch_size=len(tokens) // 4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    keep = Keep()
    optimizer = torch.optim.SGD(mhc_param_groups(model, LEARNING_RATE))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[keep], optimizers=(optimizer, None))
    trainer.train()
    assert trainer.model_wrapped is not model, "this is meant to be DDP"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(keep.gradients, folder / f"gradients-{dist.get_rank()}.safetensors")
    (folder / f"loss-{dist.get_rank()}.json").write_text(json.dumps(trainer.state.log_history[0]["loss"]))
    trainer.save_model(str(folder / "checkpoint"))
    dist.barrier()


def run_fully_shard(source, folder, tokens):
    model = shard_widened_model(load(source))
    rows = my_rows(tokens)
    loss = model(rows, labels=rows).loss
    loss.backward()

    def save(checkpoint):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            model.save_pretrained(checkpoint, state_dict=state)

    step_and_write(folder, mean_over_ranks(loss), dict(model.named_parameters()), save)


def run_fsdp(source, folder, tokens):
    # float64 weights and float32 sites do not share a group; in float32 and bf16 the plan needs no help
    model = load(source, distributed_config=DistributedConfig(fsdp_size=2, fsdp_plan=OWN_GROUPS))
    rows = my_rows(tokens)
    loss = model(rows, labels=rows).loss
    loss.backward()
    step_and_write(folder, mean_over_ranks(loss), dict(model.named_parameters()), model.save_pretrained)


def run_tensor_parallel(source, folder, tokens):
    model = load(source, distributed_config=DistributedConfig(tp_size=2))
    assert any(isinstance(p, DTensor) for p in model.parameters())
    # every rank sees every row
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    step_and_write(folder, whole(loss), dict(model.named_parameters()), model.save_pretrained)


def run_pipeline(schedule):
    def run(source, folder, tokens):
        pipeline = TrainingPipeline(load(source), schedule, num_microbatches=4)
        loss = pipeline.step(tokens, tokens)
        parameters = {name: p for stage in pipeline.module for name, p in stage.model.named_parameters()}
        step_and_write(folder, loss, parameters, pipeline.save_pretrained)

    return run


ENGINES = {
    "trainer": run_trainer,
    "fully_shard": run_fully_shard,
    **({"fsdp": run_fsdp} if GROUPS_BY_DTYPE else {}),
    "tensor_parallel": run_tensor_parallel,
    "gpipe": run_pipeline("GPipe"),
    "1f1b": run_pipeline("1F1B"),
    "interleaved": run_pipeline("Interleaved1F1B"),
    **({} if GREETS_ITSELF else {"zbv": run_pipeline("ZBVZeroBubble"), "dualpipev": run_pipeline("DualPipeV")}),
}


def observe_dtypes(model, tokens):
    """One step of AdamW; the dtypes that parameters, gradients, optimizer state and maps of the sites have had."""
    seen = {"parameter": set(), "in forward": set(), "gradient": set(), "state": set(), "base": set()}

    def look(module, arguments):
        seen["in forward"].update(str(p.dtype) for p in module.parameters())

    sites = [m for m in model.modules() if isinstance(m, HyperConnection) and m.phi.requires_grad]
    for site in sites:
        site.register_forward_pre_hook(look)
    optimizer = torch.optim.AdamW(mhc_param_groups(model, 1e-3))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    ours = {id(p) for site in sites for p in site.parameters()}
    for parameter in model.parameters():
        if id(parameter) in ours:
            seen["parameter"].add(str(parameter.dtype))
            seen["gradient"].add(str(parameter.grad.dtype))
            seen["state"].update(str(v.dtype) for v in optimizer.state[parameter].values() if v.dim())
        else:
            seen["base"].add(str(parameter.dtype))
    assert torch.isfinite(whole(loss.detach()))
    return {what: sorted(dtypes) for what, dtypes in seen.items()}


def observe_all_dtypes(source, tokens):
    from peft import get_peft_model

    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    bf16 = dict(dtype=torch.bfloat16)

    def with_lora():
        model = load(source, **bf16)
        return get_peft_model(model, mhc_lora_config(model, r=2))

    modes = {
        "fully_shard, bf16 mixed precision": lambda: shard_widened_model(load(source, dtype=torch.float32), None, low),
        "fully_shard, bf16 model": lambda: shard_widened_model(load(source, **bf16)),
        "fully_shard, bf16 model with LoRA": lambda: shard_widened_model(with_lora()),
        "fsdp, float32 model": lambda: load(
            source, distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float32
        ),
        "tensor parallel, bf16 model": lambda: load(source, distributed_config=DistributedConfig(tp_size=2), **bf16),
    }
    if GROUPS_BY_DTYPE:
        modes["fsdp, bf16 model"] = lambda: load(source, distributed_config=DistributedConfig(fsdp_size=2), **bf16)
    return {mode: observe_dtypes(make(), tokens) for mode, make in modes.items()}


def observe_refusals(source, tokens):
    """What is told a policy that lowers every parameter of a layer, and who asks for transformers' pipeline."""

    def lower():
        sharding = DistributedConfig(fsdp_size=2, fsdp_mixed_precision=True)
        load(source, distributed_config=sharding, dtype=torch.float32)(tokens, labels=tokens)

    def cut():
        load(source, distributed_config=DistributedConfig(pp_size=2))

    refusals = {"lower": lower}
    if hasattr(DistributedConfig, "pp_size"):
        refusals["cut"] = cut
    told = {}
    for name, ask in refusals.items():
        try:
            ask()
        except ValueError as error:
            told[name] = str(error)
    return told


def observe_loads(folder):
    """Which engine's checkpoint has come through which kind of loading with other bits than it was saved with."""
    kinds = {"tensor_parallel": dict(distributed_config=DistributedConfig(tp_size=2))}
    if GROUPS_BY_DTYPE:
        kinds["fsdp"] = dict(distributed_config=DistributedConfig(fsdp_size=2, fsdp_plan=OWN_GROUPS))
    changed = {}
    for engine in ENGINES:
        saved = load(folder / engine / "checkpoint").state_dict()
        for kind, arguments in kinds.items():
            loaded = {
                name: whole(p.detach())
                for name, p in load(folder / engine / "checkpoint", **arguments).named_parameters()
            }
            changed[f"{engine} as {kind}"] = [name for name, p in loaded.items() if not torch.equal(p, saved[name])]
    return changed


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for start in sorted(folder.glob("*/start")):
        tokens = torch.tensor(json.loads((start / "tokens.json").read_text()))
        source = start
        for name, run in ENGINES.items():
            run(source, start.parent / name, tokens)
            source = start.parent / name / "checkpoint"
        seen = {
            "dtypes": observe_all_dtypes(start, tokens),
            "refusals": observe_refusals(start, tokens),
            "changed": observe_loads(start.parent),
        }
        (start.parent / f"seen-{dist.get_rank()}.json").write_text(json.dumps(seen))
    # a rank that leaves while another still talks to it can take that one down
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
