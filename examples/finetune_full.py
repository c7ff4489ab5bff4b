"""Fine-tune all of a pretrained decoder, widened into four residual streams, on one device or many.

    python examples/finetune_full.py meta-llama/Llama-3.2-1B my_text.txt --output finetuned
    torchrun --nproc-per-node 8 examples/finetune_full.py widened/ my_text.txt --fsdp-size 8

MODEL is any supported decoder, or a folder that `mhc-hf convert` has made; TEXT is a text file or the name of a dataset
with a "text" column. Under torchrun every process has the whole model (DDP), unless --fsdp-size shards it. Killed runs
go on where their last whole checkpoint was; a sharded run starts afresh, as Trainer cannot resume one.
"""

import argparse
import os
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from mhc_hf import MHCConfig, MHCForCausalLM
from mhc_hf.training import last_complete_checkpoint, mhc_param_groups


class Chunks(Dataset):
    """A text as consecutive pieces of `context` tokens, each its own label."""

    def __init__(self, text: str, tokenizer, context: int):
        ids = torch.tensor(tokenizer(text).input_ids)
        self.chunks = ids[: len(ids) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.chunks[index], "labels": self.chunks[index]}


def read_text(name: str) -> str:
    if Path(name).is_file():
        return Path(name).read_text()
    from datasets import load_dataset

    return "\n\n".join(load_dataset(name, split="train")["text"])


def load_model(name: str, fsdp_size: int | None):
    # float32 weights: a step of 1e-5 does not move a bf16 one. Trainer computes in bf16 by autocast
    if fsdp_size:
        from transformers.distributed import DistributedConfig

        sharded = DistributedConfig(fsdp_size=fsdp_size)
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, distributed_config=sharded)
    if isinstance(AutoConfig.from_pretrained(name), MHCConfig):
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return MHCForCausalLM.from_base(name, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a decoder, widened or not")
    parser.add_argument("text", help="text file, or name of a dataset with a text column")
    parser.add_argument("--output", default="finetuned", help="folder of the model and its checkpoints")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate")
    parser.add_argument("--hc-lr", type=float, help="learning rate of hyper-connections; --lr unless given")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8, help="a device and step")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--fsdp-size", type=int, help="shard over so many devices (FSDP2); MODEL must be widened")
    parser.add_argument("--deepspeed", help="DeepSpeed configuration, e.g. examples/configs/deepspeed_zero3.json")
    args = parser.parse_args()

    set_seed(0)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # made first: it joins the processes, which a sharded load needs
    arguments = TrainingArguments(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        gradient_checkpointing=True,
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 20,
        logging_steps=10,
        save_steps=max(1, args.max_steps // 10),
        save_total_limit=2,
        save_only_model=bool(args.fsdp_size),
        # DeepSpeed's own bf16 would lower the hyper-connections too; its configuration turns on autocast instead
        bf16=on_gpu and not args.deepspeed,
        deepspeed=args.deepspeed,
        # said aloud, or Trainer under torchrun on CPUs would train apart in every process
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_model(args.model, args.fsdp_size)
    groups = mhc_param_groups(model, args.lr, hc_lr=args.hc_lr, weight_decay=args.weight_decay)
    data = Chunks(read_text(args.text), tokenizer, args.context)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": args.lr}),
    )
    trainer.train(resume_from_checkpoint=None if args.fsdp_size else last_complete_checkpoint(args.output))
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(args.output)
        print(f"{args.output}: AutoModelForCausalLM.from_pretrained({args.output!r}) after `import mhc_hf`")


if __name__ == "__main__":
    main()
