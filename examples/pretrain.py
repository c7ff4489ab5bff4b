"""Train a decoder with hyper-connections from scratch, as the mHC paper starts it.

    python examples/pretrain.py meta-llama/Llama-3.2-1B my_text.txt --hc-mult 4 --output pretrained

Of MODEL only the configuration and the tokenizer are taken; TEXT is a text file or the name of a dataset with a "text"
column. Killed runs go on where their last whole checkpoint was. On several GPUs put `torchrun --nproc-per-node 8` in
place of `python`.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from mhc_hf import MHCConfig
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a decoder whose configuration and tokenizer are taken")
    parser.add_argument("text", help="text file, or name of a dataset with a text column")
    parser.add_argument("--output", default="pretrained", help="folder of the model and its checkpoints")
    parser.add_argument("--hc-mult", type=int, default=4, help="number of residual streams")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate, of hyper-connections too")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--max-steps", type=int, default=10000)
    parser.add_argument("--batch-size", type=int, default=16, help="a device and step")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a row")
    args = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = MHCConfig.from_base(AutoConfig.from_pretrained(args.model), hc_mult=args.hc_mult)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {args.hc_mult} residual streams")

    arguments = TrainingArguments(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 20,
        logging_steps=10,
        save_steps=max(1, args.max_steps // 10),
        save_total_limit=2,
        bf16=torch.cuda.is_available(),
        # said aloud, or Trainer under torchrun on CPUs would train apart in every process
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
    )
    optimizer = torch.optim.AdamW(mhc_param_groups(model, args.lr, weight_decay=args.weight_decay), betas=(0.9, 0.95))
    data = Chunks(read_text(args.text), tokenizer, args.context)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output))
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(args.output)
        print(f"{args.output}: AutoModelForCausalLM.from_pretrained({args.output!r}) after `import mhc_hf`")


if __name__ == "__main__":
    main()
