"""What the studies share: a small model and its text, one training loop, and a record of what was run where."""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig

import mhc_hf

# `demo` is a script beside this one and, once that has run, a folder in the root too
# isort: off
from demo import read_texts, train_tokenizer

# isort: on


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Size of the model, its text and what is done with it; `defaults` are the study's own."""
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=512, help="tokens of the tokenizer that is trained")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--text", type=Path, help="text to train on (default: Python's language reference)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; with another number the last bits differ")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.set_defaults(**defaults)


def make_config(vocab_size: int, args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 32),
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
    )


def read_tokens(args: argparse.Namespace, parts: tuple[str, ...]) -> tuple[dict[str, Tensor], int]:
    """Pieces of `context` tokens [count, context] for each part of the text, and the size of the vocabulary.

    Without a file it is the language reference of CPython. A file is cut in three: 80 % to pretrain on, 15 % to
    fine-tune on, 5 % to validate on.
    """
    if args.text is None:
        texts = read_texts()
    else:
        whole = args.text.read_text(encoding="utf-8", errors="replace")
        cuts = [0, int(0.8 * len(whole)), int(0.95 * len(whole)), len(whole)]
        names = ("pretrain", "finetune", "validate")
        texts = {name: whole[a:b] for name, a, b in zip(names, cuts[:-1], cuts[1:], strict=True)}
    tokenizer = train_tokenizer(texts["pretrain"], args.vocabulary)
    tokens = {}
    for part in parts:
        ids = torch.tensor(tokenizer(texts[part], verbose=False).input_ids)
        tokens[part] = ids[: len(ids) // args.context * args.context].view(-1, args.context)
    return tokens, len(tokenizer)


def draw_batches(pieces: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches without end, every piece once before any comes again; the same seed gives the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(pieces), generator=generator).split(batch):
            if len(chosen) == min(batch, len(pieces)):
                yield pieces[chosen]


def train(
    model: nn.Module,
    batches: Iterator[Tensor],
    steps: int,
    groups: Any,
    lr: float,
    watch: Callable[[int, float, float], None] = lambda step, loss, norm: None,
    title: str = "",
) -> None:
    """AdamW, 5 % warm-up, cosine to a tenth, gradients clipped at 1. `watch(step, loss, gradient norm)` every step."""
    device = next(model.parameters()).device
    # no decay: it would pull unlike parameters of the models compared
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, steps // 20)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        angle = torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup))
        return 0.55 + 0.45 * float(torch.cos(angle))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    # a bar on a terminal; in a file the lines that follow each run are progress enough
    for step in tqdm(range(1, steps + 1), desc=title, leave=False, disable=None):
        ids = next(batches).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        watch(step, float(loss.detach()), float(norm))


@torch.no_grad()
def evaluate(model: nn.Module, pieces: Tensor, batch: int = 32) -> float:
    """Mean loss in nats a token."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    losses = [
        float(model(input_ids=ids.to(device), labels=ids.to(device)).loss) * len(ids) for ids in pieces.split(batch)
    ]
    model.train(was_training)
    return sum(losses) / len(pieces)


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_run(started: float) -> dict[str, str]:
    """The command, the device and the versions that made a result."""
    device = choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": f"{device.type}: {name}, {torch.get_num_threads()} threads",
        "versions": f"mhc-hf {mhc_hf.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        "seconds": f"{time.monotonic() - started:.0f}, {time.process_time():.0f} of them at work",
    }


def write_page(path: Path, title: str, run: dict[str, str], lines: list[str]) -> None:
    """A page of results that says first what made it."""
    facts = [f"- {name}: `{value}`" for name, value in run.items()]
    path.write_text("\n".join([f"# {title}", "", *facts, "", *lines, ""]), encoding="utf-8")


def say_mean(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
