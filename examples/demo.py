"""The main job, end to end, on a CPU in a few minutes: widen a pretrained LLaMA, check it, fine-tune it, look at it.

There is no download: the LLaMA is trained here first, on the language reference that ships with every CPython
(`pydoc_data.topics`, 465 kB of English). Everything after that is what you would do with a checkpoint of your own.
What one run made the next one reuses; `make demo-clean` forgets it.
"""

import argparse
import json
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from mhc_hf import HyperConnection, MHCForCausalLM, convert_checkpoint, verify_conversion
from mhc_hf.plotting import plot_finetuning
from mhc_hf.training import mhc_lora_config

CONTEXT = 128
PROMPT = "The assignment statement is used to"


class Chunks(Dataset):
    """A text as consecutive pieces of CONTEXT tokens, each its own label."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast):
        ids = torch.tensor(tokenizer(text).input_ids)
        self.chunks = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.chunks[index], "labels": self.chunks[index]}


def read_texts() -> dict[str, str]:
    """The language reference in three parts that share no topic: to pretrain on, to fine-tune on, to validate on."""
    parts: dict[str, list[str]] = {"pretrain": [], "finetune": [], "validate": []}
    for index, name in enumerate(sorted(topics)):
        part = {0: "validate", 3: "finetune", 6: "finetune", 9: "finetune"}.get(index % 10, "pretrain")
        parts[part].append(topics[name])
    return {part: "\n\n".join(texts) for part, texts in parts.items()}


def train_tokenizer(text: str, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def train(model, data: Dataset, validation: Dataset, steps: int, lr: float, callbacks=()) -> list[tuple[int, float]]:
    """Train with Trainer; returns the validation loss by step. The same seed gives every model the same batches."""
    arguments = TrainingArguments(
        output_dir="demo/trainer",
        max_steps=steps,
        learning_rate=lr,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=steps,
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=0,
        data_seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=validation, callbacks=[*callbacks])
    trainer.train()
    return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]


def add_adapters(model: PreTrainedModel):
    """LoRA on all linear layers; a widened model's hyper-connections are trained beside it, in full and in float32."""
    if isinstance(model, MHCForCausalLM):
        return get_peft_model(model, mhc_lora_config(model, "lora+mhc", r=8, lora_alpha=16))
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


@torch.no_grad()
def look_at_streams(model, token_ids: torch.Tensor) -> tuple[float, dict[str, list]]:
    """Relative spread of the streams, the largest over layers, and H_res [n, n] of some sites, averaged over tokens."""
    seen, handles = {}, []
    names = {name: module for name, module in model.named_modules() if isinstance(module, HyperConnection)}
    for name, module in names.items():
        if "original_module" not in name:  # what PEFT put aside does not run

            def keep(module, arguments, name=name):
                seen[name] = (arguments[0], module.maps(arguments[0])[2].mean((0, 1)))

            handles.append(module.register_forward_pre_hook(keep))
    model.eval()(input_ids=token_ids)
    for handle in handles:
        handle.remove()
    spread = 0.0
    for name, (streams, _) in seen.items():
        x = streams.unflatten(-1, (names[name].hc_mult, -1))
        spread = max(spread, float((x - x.mean(-2, keepdim=True)).norm() / x.norm()))
    return spread, {_short(name): h_res.tolist() for name, (_, h_res) in seen.items()}


def _short(name: str) -> str:
    """The site's name as a reader would say it: "base_model.model.model.layers.3.attn_hc..." -> "layer 3 attn"."""
    parts = name.split(".")
    return f"layer {parts[parts.index('layers') + 1]} {next(p for p in parts if p.endswith('_hc'))[:-3]}"


class WatchSpread(TrainerCallback):
    """Looks at the streams whenever the model is evaluated."""

    def __init__(self, token_ids: torch.Tensor):
        self.token_ids = token_ids
        self.by_step: list[tuple[int, float]] = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.by_step.append((state.global_step, look_at_streams(model, self.token_ids)[0]))


def say(headline: str) -> None:
    print(f"\n\033[1m{headline}\033[0m", flush=True)


def generate(model, tokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.eval().generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="folder for everything that is made")
    parser.add_argument("--pretrain-steps", type=int, default=300)
    parser.add_argument("--finetune-steps", type=int, default=100)
    args = parser.parse_args()
    begin = time.monotonic()
    logging.set_verbosity_error()
    args.dir.mkdir(parents=True, exist_ok=True)
    base_dir, wide_dir, tuned_dir = args.dir / "base", args.dir / "widened", args.dir / "finetuned"
    texts = read_texts()

    say("1. A pretrained LLaMA")
    if not (base_dir / "model.safetensors").exists():
        set_seed(0)
        tokenizer = train_tokenizer(texts["pretrain"])
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
        base = LlamaForCausalLM(config)
        train(
            base,
            Chunks(texts["pretrain"], tokenizer),
            Chunks(texts["validate"], tokenizer),
            args.pretrain_steps,
            lr=2e-3,
        )
        tokenizer.save_pretrained(base_dir)
        base.save_pretrained(base_dir)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    print(f"{base_dir}: {base.num_parameters():,} parameters, {len(base.model.layers)} layers")

    say("2. Widened into four residual streams")
    if not wide_dir.exists():
        print(convert_checkpoint(base_dir, wide_dir))
    widened = AutoModelForCausalLM.from_pretrained(wide_dir)
    print(f"{wide_dir}: a {type(widened).__name__} of {widened.num_parameters():,} parameters")

    say("3. The same function")
    print(verify_conversion(base_dir, wide_dir, text=texts["validate"][:4000]))
    words, words_widened = generate(base, tokenizer), generate(widened, tokenizer)
    print(f"base:    {words}\nwidened: {words_widened}\nthe same words: {words == words_widened}")

    say("4. Fine-tuned: LoRA on the base; LoRA and hyper-connections on the widened model; the same tokens")
    numbers = args.dir / "finetuning.json"
    if not (numbers.exists() and tuned_dir.exists()):
        data, validation = Chunks(texts["finetune"], tokenizer), Chunks(texts["validate"], tokenizer)
        probe = validation.chunks[:4]
        set_seed(0)
        losses = {"base": train(add_adapters(base), data, validation, args.finetune_steps, lr=2e-3)}
        set_seed(0)
        adapted = add_adapters(widened)
        _, before = look_at_streams(adapted, probe)
        watch = WatchSpread(probe)
        losses["widened"] = train(adapted, data, validation, args.finetune_steps, lr=2e-3, callbacks=[watch])
        _, after = look_at_streams(adapted, probe)
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tuned_dir)
        tokenizer.save_pretrained(tuned_dir)
        maps = {site: (before[site], after[site]) for site in before}
        numbers.write_text(json.dumps({"losses": losses, "spread": watch.by_step, "maps": maps}))
    results = json.loads(numbers.read_text())
    for name, curve in results["losses"].items():
        print(f"{name:8s} validation loss {curve[0][1]:.4f} -> {curve[-1][1]:.4f}")
    print(f"spread of the streams {results['spread'][0][1]:.3f} -> {results['spread'][-1][1]:.3f}")

    say("5. Saved, and loaded again")
    tuned = AutoModelForCausalLM.from_pretrained(tuned_dir)
    print(f"{tuned_dir}: {generate(tuned, tokenizer)}")

    say("6. A picture")
    shown = list(results["maps"])[1:-1:2]
    figure = plot_finetuning(
        results["losses"],
        {"base": "base, LoRA", "widened": "widened, LoRA and hyper-connections"},
        results["spread"],
        {site: tuple(map(np.array, results["maps"][site])) for site in shown},
        "A pretrained LLaMA widened into four residual streams, then fine-tuned",
    )
    figure.savefig(args.dir / "report.png", dpi=140)
    print(f"{args.dir / 'report.png'}\n\ndone in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
