"""Fine-tune a pretrained decoder with LoRA and hyper-connections: four residual streams, one small adapter folder.

    python examples/finetune_lora.py meta-llama/Llama-3.2-1B my_text.txt --output adapter

MODEL is any supported decoder, or a folder that `mhc-hf convert` has made; TEXT is a text file or the name of a dataset
with a "text" column. Killed runs go on where their last whole checkpoint was. On several GPUs put
`torchrun --nproc-per-node 8` in place of `python`.
"""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from mhc_hf import MHCConfig, MHCForCausalLM
from mhc_hf.training import last_complete_checkpoint, mhc_lora_config, mhc_param_groups


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
    parser.add_argument("model", help="folder or Hub id of a decoder, widened or not")
    parser.add_argument("text", help="text file, or name of a dataset with a text column")
    parser.add_argument("--output", default="finetuned_lora", help="folder of the adapter and its checkpoints")
    parser.add_argument("--train", choices=["lora+mhc", "lora", "mhc"], default="lora+mhc", help="what is trained")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate, of hyper-connections too")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8, help="a device and step")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a row")
    args = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # bf16 weights on a GPU; hyper-connections and adapters are float32 all the same
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if isinstance(AutoConfig.from_pretrained(args.model), MHCConfig):
        widened = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        widened = MHCForCausalLM.from_base(args.model, dtype=dtype)
    lora = {} if args.train == "mhc" else {"r": args.rank, "lora_alpha": 2 * args.rank}
    model = get_peft_model(widened, mhc_lora_config(widened, args.train, **lora))
    model.print_trainable_parameters()

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
    optimizer = torch.optim.AdamW(mhc_param_groups(model, args.lr))
    data = Chunks(read_text(args.text), tokenizer, args.context)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output))
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{args.output}: PeftModel.from_pretrained(MHCForCausalLM.from_base({args.model!r}), {args.output!r})")


if __name__ == "__main__":
    main()
