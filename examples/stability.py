"""The paper's central claim, on your machine: constrained streams stay stable over depth, unconstrained ones do not.

One small decoder is trained from scratch three times on the same tokens with the same seeds: plain, with the original
Hyper-Connections (H_res unconstrained) and with mHC (H_res doubly stochastic). Loss, gradient norm and the composite
gain of H_res over all sites are drawn over steps, and written to docs/results/stability.{md,json,png}.

    python examples/stability.py                                        # about 8 minutes of one CPU core
    python examples/stability.py --layers 24 --hidden 512 --steps 4000 --batch 64 --context 512 --vocabulary 32000 \\
        --text corpus.txt
"""

import argparse
import json
import time

import torch
from study import (
    add_arguments,
    choose_device,
    describe_run,
    draw_batches,
    evaluate,
    make_config,
    read_tokens,
    train,
    write_page,
)
from transformers import AutoModelForCausalLM, set_seed

from mhc_hf import MHCConfig
from mhc_hf.inspection import measure_streams
from mhc_hf.plotting import plot_curves, save_figure

KINDS = {"plain": None, "HC": "none", "mHC": "sinkhorn"}
COLORS = {"plain": "#7f7f7f", "HC": "#d55e00", "mHC": "#0072b2"}
PANELS = {
    "training loss": "loss",
    "gradient norm": "gradient_norm",
    "composite forward gain": "composite_forward_gain",
    "composite backward gain": "composite_backward_gain",
}


def build(kind: str, vocab_size: int, args: argparse.Namespace) -> torch.nn.Module:
    config = make_config(vocab_size, args)
    if KINDS[kind] is not None:
        config = MHCConfig.from_base(config, hc_mult=args.streams, hc_projection=KINDS[kind])
    return AutoModelForCausalLM.from_config(config).to(choose_device())


def run(kind: str, seed: int, tokens: dict[str, torch.Tensor], vocab_size: int, args: argparse.Namespace) -> dict:
    """Train one model; what was seen every `args.every` steps, and the validation loss at the end."""
    set_seed(seed)
    model = build(kind, vocab_size, args)
    probe = tokens["validate"][:4].to(choose_device())
    seen: dict[str, list] = {"step": [], "loss": [], "gradient_norm": []}

    def watch(step: int, loss: float, norm: float) -> None:
        if step != 1 and step % args.every and step != args.steps:
            return
        row = {"step": step, "loss": loss, "gradient_norm": norm}
        if KINDS[kind] is not None:
            summary = measure_streams(model, input_ids=probe).summary()
            row |= {name.removeprefix("streams/"): value for name, value in summary.items()}
        for name, value in row.items():
            seen.setdefault(name, []).append(value)

    batches = draw_batches(tokens["pretrain"], args.batch, seed)
    train(model, batches, args.steps, model.parameters(), args.lr, watch, f"{kind} seed {seed}")
    seen["validation_loss"] = evaluate(model, tokens["validate"])
    seen["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, layers=12, hidden=64, steps=600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=20, help="steps between two looks at the streams")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    tokens, vocab_size = read_tokens(args, ("pretrain", "validate"))

    runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for seed in args.seeds:
        for kind in KINDS:
            runs[kind].append(run(kind, seed, tokens, vocab_size, args))
            last = {name: values[-1] for name, values in runs[kind][-1].items() if isinstance(values, list)}
            print(
                f"{kind:5s} seed {seed}: loss {last['loss']:.3f}, validation {runs[kind][-1]['validation_loss']:.4f}, "
                f"composite gain {last.get('composite_forward_gain', 1):.4g} forward, "
                f"{last.get('composite_backward_gain', 1):.4g} backward, {time.monotonic() - started:.0f} s",
                flush=True,
            )

    args.out.mkdir(parents=True, exist_ok=True)
    facts = describe_run(started)
    (args.out / "stability.json").write_text(json.dumps({"run": facts, "runs": runs}))
    panels = {
        title: {
            kind: [list(zip(r["step"], r[name], strict=True)) for r in runs[kind]]
            for kind in KINDS
            if name in runs[kind][0]
        }
        for title, name in PANELS.items()
    }
    title = (
        f"{args.layers} layers, {2 * args.layers} sites, {len(args.seeds)} seeds: plain, HC and mHC on the same tokens"
    )
    save_figure(plot_curves(panels, COLORS, title, log_scale=list(PANELS)[1:]), args.out / "stability.png")
    write_page(args.out / "stability.md", "Stability: plain, HC and mHC from scratch", facts, describe(runs, args))
    print(args.out / "stability.md")


def describe(runs: dict[str, list[dict]], args: argparse.Namespace) -> list[str]:
    """The table, and in words whether the claim was seen."""
    lines = [
        "![loss, gradient norm and composite gains over steps](stability.png)",
        "",
        "Extremes are over all looks and seeds; losses are means over seeds.",
        "",
        "| model | parameters | validation loss | largest gradient norm after warm-up | composite forward gain, "
        "extremes | at the end | composite backward gain, extremes | at the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, of_kind in runs.items():
        late = [
            n for r in of_kind for step, n in zip(r["step"], r["gradient_norm"], strict=True) if step > args.steps // 20
        ]
        cells = [
            kind,
            f"{of_kind[0]['parameters']:,}",
            f"{sum(r['validation_loss'] for r in of_kind) / len(of_kind):.4f}",
            f"{max(late, default=float('nan')):.2f}",
        ]
        for name in ("composite_forward_gain", "composite_backward_gain"):
            values = [value for r in of_kind for value in r.get(name, [])]
            ends = [r[name][-1] for r in of_kind if name in r]
            cells.append(f"{min(values):.4g} to {max(values):.4g}" if values else "1 (no streams)")
            cells.append(", ".join(f"{end:.4g}" for end in ends) if ends else "1")
        lines.append(f"| {' | '.join(cells)} |")
    mhc = [value for r in runs["mHC"] for value in r["composite_forward_gain"]]
    hc = [r["composite_forward_gain"][-1] for r in runs["HC"]]
    stays = all(0.9 <= value <= 1.1 for value in mhc)
    grows = all(value > 5 for value in hc)
    lines += [
        "",
        f"The composite forward gain of mHC {'stayed' if stays else 'did not stay'} within [0.9, 1.1] at every look. "
        f"That of HC ended at {', '.join(f'{value:.3g}' for value in hc)}: "
        f"{'above 5 on every seed.' if grows else 'not above 5 on every seed at this size.'}",
        "",
        _compare_losses(runs),
    ]
    return lines


def _compare_losses(runs: dict[str, list[dict]]) -> str:
    """Stability is one thing and loss another: which learned more, in words."""
    loss = {kind: sum(r["validation_loss"] for r in of_kind) / len(of_kind) for kind, of_kind in runs.items()}
    gaps = ", ".join(f"{kind} {loss[kind] - loss['plain']:+.3f}" for kind in ("HC", "mHC"))
    best = min(loss, key=loss.__getitem__)
    return (
        f"Validation loss less that of the plain model, in nats: {gaps}; {best} has the least. "
        "A gain need do no harm in a short run of a small model: what this page shows is the gains."
    )


if __name__ == "__main__":
    main()
