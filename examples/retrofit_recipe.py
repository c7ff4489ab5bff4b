"""The recipe of a retrofit: learning rate of the hyper-connections, gating factors and start, swept one at a time.

The base, the text and the runs are those of retrofit_study.py. Around the defaults (the base's learning rate, alpha 1)
one number is changed at a time, for both starts, in full and with LoRA. Written to docs/results/recipe.{md,json,png}.

    python examples/retrofit_recipe.py                                  # about 11 minutes of one CPU core
    python examples/retrofit_recipe.py --layers 12 --hidden 768 --pretrain-steps 20000 --steps 2000 --batch 64 \\
        --context 512 --vocabulary 32000 --text corpus.txt
"""

import argparse
import json
import statistics
import time

import torch
from matplotlib.figure import Figure
from retrofit_study import COLORS, STARTS, TUNINGS, add_tuning_arguments, pretrain_base, tune
from study import describe_run, evaluate, read_tokens, say_mean, write_page

from mhc_hf.plotting import plot_curves, save_figure

HC_LR_RATIOS = (0.1, 0.3, 1.0, 3.0, 10.0)
ALPHAS = (0.01, 0.1, 1.0)
WORDS = {"hc_lr_ratio": "by learning rate ratio", "alpha": "by alpha"}
# (ratio, alpha): a cross through the defaults
RECIPES = [(ratio, 1.0) for ratio in HC_LR_RATIOS] + [(1.0, alpha) for alpha in ALPHAS if alpha != 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tuning_arguments(parser, steps=200, seeds=[0, 1])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    tokens, vocab_size = read_tokens(args, ("pretrain", "finetune", "validate"))
    base = pretrain_base(tokens, vocab_size, args)
    print(f"base: {evaluate(base, tokens['validate']):.4f}, {time.monotonic() - started:.0f} s", flush=True)

    rows: list[dict] = []
    for tuning in TUNINGS:
        continued = [_tune(base, "base", tuning, seed, tokens, args) for seed in args.seeds]
        for kind in STARTS:
            for ratio, alpha in RECIPES:
                recipe = argparse.Namespace(**vars(args) | {"hc_lr_ratio": ratio, "alpha": alpha})
                losses = [_tune(base, kind, tuning, seed, tokens, recipe) for seed in args.seeds]
                gaps = [loss - base_loss for loss, base_loss in zip(losses, continued, strict=True)]
                rows.append(dict(tuning=tuning, start=kind, hc_lr_ratio=ratio, alpha=alpha, losses=losses, gaps=gaps))
                print(
                    f"{tuning} {kind:10s} hc_lr x {ratio:g}, alpha {alpha:g}: {say_mean(gaps, '+.4f')}, "
                    f"{time.monotonic() - started:.0f} s",
                    flush=True,
                )

    args.out.mkdir(parents=True, exist_ok=True)
    facts = describe_run(started)
    (args.out / "recipe.json").write_text(json.dumps({"run": facts, "rows": rows}))
    save_figure(draw(rows, args), args.out / "recipe.png")
    write_page(args.out / "recipe.md", "Recipe of a retrofit", facts, describe(rows))
    print(args.out / "recipe.md")


def _tune(base, kind: str, tuning: str, seed: int, tokens: dict, args: argparse.Namespace) -> float:
    """Validation loss at the end."""
    return tune(base, kind, tuning, seed, tokens, args, looks=1)["losses"][-1][1]


def draw(rows: list[dict], args: argparse.Namespace) -> Figure:
    panels: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for tuning, name in zip(TUNINGS, ("in full", "LoRA"), strict=True):
        for swept, fixed in (("hc_lr_ratio", "alpha"), ("alpha", "hc_lr_ratio")):
            along = sorted((r for r in rows if r["tuning"] == tuning and r[fixed] == 1), key=lambda r: r[swept])
            panels[f"{WORDS[swept]}, {name}"] = {
                kind: [[(r[swept], r["gaps"][i]) for r in along if r["start"] == kind] for i in range(len(args.seeds))]
                for kind in STARTS
            }
    title = f"Validation loss less the base continued, {args.steps} steps, {len(args.seeds)} seeds"
    figure = plot_curves(panels, COLORS, title, xlabel="")
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.axhline(0, color="black", linewidth=0.6, alpha=0.6)
    return figure


def describe(rows: list[dict]) -> list[str]:
    """The table, and for each tuning and start the best recipe against the default."""
    lines = [
        "![validation loss less the base continued, by learning rate and by alpha](recipe.png)",
        "",
        "Validation loss in nats a token at the end, less that of the base continued on the same tokens; mean and "
        "standard deviation over seeds. `hc_lr` is the hyper-connections' learning rate, as a multiple of the other.",
        "",
        "| tuning | start | hc_lr | alpha | validation loss | less the base continued |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['tuning']} | {r['start']} | x {r['hc_lr_ratio']:g} | {r['alpha']:g} | "
            f"{say_mean(r['losses'], '.4f')} | {say_mean(r['gaps'], '+.4f')} |"
        )
    lines.append("")
    for tuning in TUNINGS:
        for kind in STARTS:
            some = [r for r in rows if (r["tuning"], r["start"]) == (tuning, kind)]
            default = next(r for r in some if (r["hc_lr_ratio"], r["alpha"]) == (1.0, 1.0))
            best = min(some, key=lambda r: statistics.mean(r["losses"]))
            lines.append(f"- {tuning}, {kind}: {_compare(best, default)}")
    return lines


def _compare(best: dict, default: dict) -> str:
    if best is default:
        return "the default is the best of these."
    gains = [loss - other for loss, other in zip(best["losses"], default["losses"], strict=True)]
    clear = "on every seed" if all(gain < 0 for gain in gains) else "not on every seed"
    return (
        f"hc_lr x {best['hc_lr_ratio']:g} with alpha {best['alpha']:g} is best, {say_mean(gains, '+.4f')} nats from "
        f"the default, below it {clear}."
    )


if __name__ == "__main__":
    main()
