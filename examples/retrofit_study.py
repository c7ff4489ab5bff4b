"""Does widening a pretrained model pay? The same tokens for the base trained on and for widened ones, side by side.

One small LLaMA is pretrained. Then, for every seed, the same fine-tuning tokens go to: the base continued; the base
widened with the start "copies"; with "orthogonal"; and uniformly, a control built by hand that cannot wake. Each in
full and with LoRA (hyper-connections trained beside it). Validation loss and spread of the streams are compared, and
written to docs/results/retrofit.{md,json,png}.

    python examples/retrofit_study.py                                   # about 25 minutes on two CPU cores
    python examples/retrofit_study.py --layers 12 --hidden 768 --pretrain-steps 20000 --steps 5000 --batch 64 \\
        --context 512 --text corpus.txt
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from study import choose_device, describe_run, draw_batches, evaluate, read_tokens, train, write_page
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from mhc_hf import HyperConnection, MHCForCausalLM
from mhc_hf.inspection import measure_streams
from mhc_hf.plotting import plot_curves, save_figure
from mhc_hf.training import mhc_lora_config, mhc_param_groups

KINDS = ("base", "copies", "orthogonal", "uniform")
COLORS = {"base": "#7f7f7f", "copies": "#e69f00", "orthogonal": "#0072b2", "uniform": "#d55e00"}
TUNINGS = ("full", "LoRA")


def widen(base: PreTrainedModel, kind: str, args: argparse.Namespace) -> PreTrainedModel:
    """A copy of the base, widened as `kind` says."""
    base = copy.deepcopy(base)
    if kind == "base":
        return base
    start = "copies" if kind == "uniform" else kind
    hc = {"hc_alpha_init": args.alpha} if args.alpha is not None else None
    model = MHCForCausalLM.from_base(base, hc_mult=args.streams, start=start, hc=hc)
    if kind == "uniform":
        with torch.no_grad():
            for site in model.modules():
                if isinstance(site, HyperConnection):
                    # reads 1/n, writes 1, uniform mixing: exact too, and the same for every stream
                    site.bias.zero_()
                    site.bias[: args.streams] = -torch.log(torch.tensor(args.streams - 1.0))
    return model.to(choose_device())


def tune(base: PreTrainedModel, kind: str, tuning: str, seed: int, tokens: dict, args: argparse.Namespace) -> dict:
    """Fine-tune one model; validation loss by step, and the spread of its streams at both ends."""
    set_seed(seed)
    model = widen(base, kind, args)
    lr = args.lr if tuning == "full" else args.lora_lr
    trained = model
    if tuning == "LoRA":
        options = dict(r=args.rank, lora_alpha=2 * args.rank)
        lora = (
            LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
            if kind == "base"
            else mhc_lora_config(model, **options)
        )
        trained = get_peft_model(model, lora)
    if kind == "base":
        groups = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    else:
        groups = mhc_param_groups(trained, lr=lr, hc_lr=args.hc_lr_ratio * lr)
    probe = tokens["validate"][:4].to(choose_device())
    result = {"losses": [[0, evaluate(trained, tokens["validate"])]], "spread": []}
    result["trained_parameters"] = sum(p.numel() for p in trained.parameters() if p.requires_grad)

    def look(step: int, loss: float = 0.0, norm: float = 0.0) -> None:
        if step and step % max(1, args.steps // 6) and step != args.steps:
            return
        if step:
            result["losses"].append([step, evaluate(trained, tokens["validate"])])
        if kind != "base":
            result["spread"].append([step, max(measure_streams(trained, input_ids=probe).table["spread"])])

    look(0)
    train(trained, draw_batches(tokens["finetune"], args.batch, seed), args.steps, groups, lr, look)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--pretrain-lr", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate in full")
    parser.add_argument("--lora-lr", type=float, default=2e-3, help="learning rate with LoRA")
    parser.add_argument("--hc-lr-ratio", type=float, default=1.0, help="of the hyper-connections' rate to the other")
    parser.add_argument("--alpha", type=float, help="gating factors at the start (default: the start's own, 1)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--text", type=Path, help="text to train on (default: Python's language reference)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    started = time.monotonic()
    tokens, vocab_size = read_tokens(args.text, args.context, ("pretrain", "finetune", "validate"))

    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 32),
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config).to(choose_device())
    batches = draw_batches(tokens["pretrain"], args.batch, 0)
    train(base, batches, args.pretrain_steps, base.parameters(), args.pretrain_lr, lambda step, loss, norm: None)
    print(
        f"base: validation loss {evaluate(base, tokens['validate']):.4f}, {time.monotonic() - started:.0f} s",
        flush=True,
    )

    runs: dict[str, dict[str, list[dict]]] = {tuning: {kind: [] for kind in KINDS} for tuning in TUNINGS}
    for seed in args.seeds:
        for tuning in TUNINGS:
            for kind in KINDS:
                result = tune(base, kind, tuning, seed, tokens, args)
                runs[tuning][kind].append(result)
                spread = f", spread {result['spread'][-1][1]:.2e}" if result["spread"] else ""
                print(
                    f"{tuning} {kind:10s} seed {seed}: {result['losses'][-1][1]:.4f}{spread}, "
                    f"{time.monotonic() - started:.0f} s",
                    flush=True,
                )

    args.out.mkdir(parents=True, exist_ok=True)
    facts = describe_run(started)
    (args.out / "retrofit.json").write_text(json.dumps({"run": facts, "runs": runs}))
    panels = {
        f"validation loss, {tuning}": {kind: [r["losses"] for r in runs[tuning][kind]] for kind in KINDS}
        for tuning in TUNINGS
    }
    title = f"{args.layers} layers, {len(args.seeds)} seeds, the same tokens"
    save_figure(plot_curves(panels, COLORS, title), args.out / "retrofit.png")
    write_page(args.out / "retrofit.md", "Retrofit: the same tokens, widened and not", facts, describe(runs))
    print(args.out / "retrofit.md")


def describe(runs: dict[str, dict[str, list[dict]]]) -> list[str]:
    """The table: means over seeds, and differences from the base paired by seed."""
    lines = [
        "![validation loss over steps](retrofit.png)",
        "",
        "Validation loss in nats a token at the end, mean and standard deviation over seeds. A seed is an order of the "
        "fine-tuning tokens (and of LoRA's start); differences from the base are paired by seed.",
        "",
        "| tuning | model | trained parameters | validation loss | less the base continued | spread of the streams |",
        "|---|---|---|---|---|---|",
    ]
    for tuning, by_kind in runs.items():
        bases = [r["losses"][-1][1] for r in by_kind["base"]]
        for kind, results in by_kind.items():
            ends = [r["losses"][-1][1] for r in results]
            gaps = [end - base for end, base in zip(ends, bases, strict=True)]
            spread = ", ".join(f"{r['spread'][-1][1]:.2g}" for r in results if r["spread"]) or "-"
            lines.append(
                f"| {tuning} | {kind} | {results[0]['trained_parameters']:,} | {_mean_and_deviation(ends, '.4f')} | "
                f"{'-' if kind == 'base' else _mean_and_deviation(gaps, '+.4f')} | {spread} |"
            )
    asleep = all(r["spread"][-1][1] < 1e-6 for tuning in runs for r in runs[tuning]["uniform"])
    lines += [
        "",
        "The streams of the uniform control never woke: what it gains or loses, it does without them."
        if asleep
        else "The streams of the uniform control did part, if only by rounding.",
    ]
    return lines


def _mean_and_deviation(values: list[float], form: str) -> str:
    if len(values) == 1:
        return format(values[0], form)
    return f"{format(statistics.mean(values), form)} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
