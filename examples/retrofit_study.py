"""Does widening a pretrained model pay? The same tokens for the base trained on and for widened ones, side by side.

One small LLaMA is pretrained. Then, for every seed, the same fine-tuning tokens go to: the base continued; the base
widened with the start "copies"; with "orthogonal"; and uniformly, a control built by hand that cannot wake. Each in
full and with LoRA (hyper-connections trained beside it). Validation loss and spread of the streams are compared, and
written to docs/results/retrofit.{md,json,png}.

    python examples/retrofit_study.py                                   # about 15 minutes of one CPU core
    python examples/retrofit_study.py --layers 12 --hidden 768 --pretrain-steps 20000 --steps 5000 --batch 64 \\
        --context 512 --vocabulary 32000 --text corpus.txt
"""

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from study import (
    add_arguments,
    choose_device,
    describe_run,
    draw_batches,
    evaluate,
    make_config,
    read_tokens,
    say_mean,
    train,
    write_page,
)
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, set_seed

from mhc_hf import HyperConnection, MHCForCausalLM
from mhc_hf.inspection import find_problems, measure_streams
from mhc_hf.inspection.problems import ASLEEP_AFTER
from mhc_hf.plotting import plot_curves, save_figure
from mhc_hf.training import mhc_lora_config, mhc_param_groups

KINDS = ("base", "copies", "orthogonal", "uniform")
STARTS = ("copies", "orthogonal")
COLORS = {"base": "#7f7f7f", "copies": "#e69f00", "orthogonal": "#0072b2", "uniform": "#d55e00"}
TUNINGS = ("full", "LoRA")


def add_tuning_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """What a retrofit takes, beside the model and its text."""
    add_arguments(parser, **{"layers": 6, "hidden": 64, "steps": 500} | defaults)
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--pretrain-lr", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate in full")
    parser.add_argument("--lora-lr", type=float, default=2e-3, help="learning rate with LoRA")
    parser.add_argument("--hc-lr-ratio", type=float, default=1.0, help="of the hyper-connections' rate to the other")
    parser.add_argument("--alpha", type=float, help="gating factors at the start (default: the start's own, 1)")
    parser.add_argument("--rank", type=int, default=8)


def pretrain_base(tokens: dict[str, Tensor], vocab_size: int, args: argparse.Namespace) -> LlamaForCausalLM:
    """The one base that every run of a study begins from."""
    set_seed(0)
    base = LlamaForCausalLM(make_config(vocab_size, args)).to(choose_device())
    batches = draw_batches(tokens["pretrain"], args.batch, 0)
    train(base, batches, args.pretrain_steps, base.parameters(), args.pretrain_lr, title="base")
    return base


def widen(base: PreTrainedModel, kind: str, args: argparse.Namespace) -> PreTrainedModel:
    """A copy of the base, widened as `kind` says."""
    base = copy.deepcopy(base)
    if kind == "base":
        return base
    if kind == "uniform":
        # its streams get the same gradient, but for rounding: in float32 Adam would make steps of that
        base = base.double()
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


def tune(
    base: PreTrainedModel, kind: str, tuning: str, seed: int, tokens: dict, args: argparse.Namespace, looks: int = 8
) -> dict:
    """Fine-tune one model, and look at it at the start and `looks` times on the way, or once more.

    Returns:
        "losses" and "spread" as (step, value), validation loss and largest spread of the streams over sites;
        "trained_parameters"; "monitor", what the monitor has to say at the end.
    """
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
    result: dict[str, Any] = {"losses": [], "spread": [], "monitor": []}
    result["trained_parameters"] = sum(p.numel() for p in trained.parameters() if p.requires_grad)

    def look(step: int, loss: float = 0.0, norm: float = 0.0) -> None:
        if step % max(1, args.steps // looks) and step != args.steps:
            return
        result["losses"].append((step, evaluate(trained, tokens["validate"])))
        if kind != "base":
            measurement = measure_streams(trained, input_ids=probe)
            result["spread"].append((step, max(measurement.table["spread"])))
            result["monitor"] = list(find_problems(measurement, step=step).values())

    look(0)
    batches = draw_batches(tokens["finetune"], args.batch, seed)
    train(trained, batches, args.steps, groups, lr, look, f"{tuning} {kind} seed {seed}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tuning_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    tokens, vocab_size = read_tokens(args, ("pretrain", "finetune", "validate"))
    base = pretrain_base(tokens, vocab_size, args)
    print(f"base: {evaluate(base, tokens['validate']):.4f}, {time.monotonic() - started:.0f} s", flush=True)

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
    save_figure(draw(runs, args), args.out / "retrofit.png")
    write_page(args.out / "retrofit.md", "Retrofit: the same tokens, widened and not", facts, describe(runs, args))
    print(args.out / "retrofit.md")


def subtract_base(runs: dict[str, list[dict]], kind: str) -> list[list[tuple[int, float]]]:
    """By seed: (step, validation loss less that of the base continued on the same tokens)."""
    return [
        [(step, loss - base_loss) for (step, loss), (_, base_loss) in zip(r["losses"], base["losses"], strict=True)]
        for r, base in zip(runs[kind], runs["base"], strict=True)
    ]


def draw(runs: dict[str, dict[str, list[dict]]], args: argparse.Namespace) -> Figure:
    full = runs["full"]
    panels = {"validation loss, in full": {kind: [r["losses"] for r in full[kind]] for kind in KINDS}}
    for tuning, name in (("full", "in full"), ("LoRA", "LoRA")):
        panels[f"less the base continued, {name}"] = {kind: subtract_base(runs[tuning], kind) for kind in KINDS[1:]}
    # what is exactly 0 has no place on a logarithmic axis
    awake = {kind: [[point for point in r["spread"] if point[1] > 0] for r in full[kind]] for kind in KINDS[1:]}
    panels["spread of the streams, in full"] = {kind: curves for kind, curves in awake.items() if all(curves)}
    title = f"{args.layers} layers of {args.hidden} channels, {args.streams} streams, {len(args.seeds)} seeds"
    return plot_curves(panels, COLORS, title, log_scale=["spread of the streams, in full"])


def describe(runs: dict[str, dict[str, list[dict]]], args: argparse.Namespace) -> list[str]:
    """The table, and in words what came out, whichever way it did."""
    lines = [
        "![validation loss, difference from the base and spread of the streams over steps](retrofit.png)",
        "",
        "Validation loss in nats a token at the end, mean and standard deviation over seeds. A seed is an order of the "
        "fine-tuning tokens (and of LoRA's start); differences are paired by seed. The control trains all "
        "gates and has no streams to speak of, so the difference from it is what the streams themselves give.",
        "",
        "| tuning | model | trained parameters | validation loss | less the base continued | less the control | "
        "spread of the streams |",
        "|---|---|---|---|---|---|---|",
    ]
    for tuning, by_kind in runs.items():
        ends = {kind: [r["losses"][-1][1] for r in results] for kind, results in by_kind.items()}
        for kind, results in by_kind.items():
            lines.append(
                f"| {tuning} | {kind} | {results[0]['trained_parameters']:,} | {say_mean(ends[kind], '.4f')} | "
                f"{_say_gap(ends, kind, 'base')} | {_say_gap(ends, kind, 'uniform')} | "
                f"{_say_spread(results)} |"
            )
    lines.append("")
    for tuning, by_kind in runs.items():
        for kind in STARTS:
            lines.append(f"- {tuning}, {kind}: {_judge(subtract_base(by_kind, kind), args)}")
    lines += ["", *_describe_sleep(runs, args.steps)]
    return lines


def _say_gap(ends: dict[str, list[float]], kind: str, other: str) -> str:
    if kind == other or kind == "base":
        return "-"
    return say_mean([one - another for one, another in zip(ends[kind], ends[other], strict=True)], "+.4f")


def _say_spread(results: list[dict]) -> str:
    return ", ".join(f"{r['spread'][-1][1]:.2g}" for r in results if r["spread"]) or "-"


def _judge(gaps: list[list[tuple[int, float]]], args: argparse.Namespace) -> str:
    """One sentence: whether it paid, and from how many tokens on."""
    ends = [curve[-1][1] for curve in gaps]
    better = sum(end < 0 for end in ends)
    words = f"below the base continued on {better} of {len(ends)} seeds at the end, {statistics.mean(ends):+.4f} nats"
    steps = [step for step, _ in gaps[0]]
    below = [all(curve[index][1] < 0 for curve in gaps) for index in range(len(steps))]
    since = next((index for index in range(1, len(steps)) if all(below[index:])), None)
    if since is None:
        return f"{words}; at no look were all seeds below it and stayed there."
    return f"{words}; on all of them from {steps[since] * args.batch * args.context:,} tokens on."


def _describe_sleep(runs: dict[str, dict[str, list[dict]]], steps: int) -> list[str]:
    """What the monitor said of the control, and of the starts."""
    control = [r for by_kind in runs.values() for r in by_kind["uniform"]]
    started = [r for by_kind in runs.values() for kind in STARTS for r in by_kind[kind]]
    spread = max(value for r in control for _, value in r["spread"])
    of_control, of_starts = (sorted({words for r in some for words in r["monitor"]}) for some in (control, started))
    silence = "nothing" if steps >= ASLEEP_AFTER else f"nothing, since it waits for {ASLEEP_AFTER} steps"
    return [
        f"The largest spread that the streams of the uniform control had, over all runs and looks, is {spread:g}. "
        f"After {steps} steps the monitor says of it: {' '.join(f'*{words}*' for words in of_control) or silence}",
        "",
        f"Of the two starts it says: {' '.join(f'*{words}*' for words in of_starts) or silence}.",
    ]


if __name__ == "__main__":
    main()
