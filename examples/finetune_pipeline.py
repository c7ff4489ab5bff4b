"""Fine-tune a widened decoder whose layers are spread over the devices of a pipeline.

    torchrun --nproc-per-node 4 examples/finetune_pipeline.py meta-llama/Llama-3.2-1B my_text.txt --schedule 1F1B

MODEL is any supported decoder, or a folder that `mhc-hf convert` has made; TEXT is a text file or the name of a dataset
with a "text" column. Models with tied embeddings need ZBVZeroBubble or DualPipeV, which put both ends on one device.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from mhc_hf import MHCConfig, MHCForCausalLM
from mhc_hf.training import TrainingPipeline, mhc_param_groups


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
    parser.add_argument("--output", default="finetuned_pipeline", help="folder of the model")
    parser.add_argument(
        "--schedule",
        choices=["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"],
        default="ZBVZeroBubble",
    )
    parser.add_argument("--microbatches", type=int, default=8, help="into how many parts a batch is cut")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate, of hyper-connections too")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32, help="of a step, over all micro-batches")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a row")
    args = parser.parse_args()

    set_seed(0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    first = dist.get_rank() == 0

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if isinstance(AutoConfig.from_pretrained(args.model), MHCConfig):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        model = MHCForCausalLM.from_base(args.model, dtype=torch.float32)
    pipeline = TrainingPipeline(model.train(), args.schedule, args.microbatches, device=device)
    optimizer = torch.optim.AdamW(mhc_param_groups(pipeline.module, args.lr))
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.max_steps // 20, args.max_steps)

    data = Chunks(read_text(args.text), tokenizer, args.context)
    # the same seed on every rank gives every rank the same batches
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0))
    if not len(loader):
        raise SystemExit(f"{args.text} has {len(data)} rows of {args.context} tokens, fewer than --batch-size.")
    progress = tqdm(total=args.max_steps, disable=not first)
    while progress.n < args.max_steps:
        for batch in loader:
            loss = pipeline.step(batch["input_ids"], batch["labels"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{float(loss):.4f}")
            progress.n += 1
            progress.refresh()
            if progress.n == args.max_steps:
                break
    progress.close()
    pipeline.save_pretrained(args.output)
    if first:
        tokenizer.save_pretrained(args.output)
        print(f"{args.output}: AutoModelForCausalLM.from_pretrained({args.output!r}) after `import mhc_hf`")
    # a rank that leaves while another still talks to it can take that one down
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
