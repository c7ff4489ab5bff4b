"""Pictures of the benches' JSON for docs/: `python benchmarks/plot.py`

    python benchmarks/plot.py [--gpu benchmarks/results/gpu-DEVICE.json] [--output docs]

bench-ops.png: a site beside its peers, as many times as fast as transformers' eager module. bench-model.png: a widened
model beside its base. With a result of `measure_gpu.py` bench-ops-gpu.png and bench-model-gpu.png. Only ratios within
one run are drawn, and every axis starts at zero.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from timing import RESULTS

from mhc_hf.plotting import COLORS, save_figure

DOCS = Path(__file__).parents[1] / "docs"
# others in greys and browns, ours in blues; compiled forms are hatched
COLOR_OF = {"transformers": COLORS["base"], "liger": "#a6761d", "mhc_hf torch": "#56b4e9", "mhc_hf triton": "#0072b2"}
OTHER_OURS = "#004b87"
KINDS = {"fwd": "forward", "fwd+bwd": "forward + backward"}


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", type=Path, help="a result of measure_gpu.py, in place of the CPU's")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the pictures")
    arguments = parser.parse_args()
    if arguments.gpu:
        parts = read(arguments.gpu)
        ops, models = [parts["ops"]], [parts[name] for name in ("model-1b", "model-8b") if name in parts]
    else:
        ops = [read(RESULTS / "ops-cpu.json")]
        models = [read(path) for path in sorted(RESULTS.glob("model-*-cpu.json"))]
    suffix = "-gpu" if arguments.gpu else ""
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, reports, plot in (("bench-ops", ops, plot_ops), ("bench-model", models, plot_models)):
        path = arguments.output / f"{name}{suffix}.png"
        save_figure(plot(reports), path)
        print(path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def plot_ops(reports: list[dict[str, Any]]) -> Any:
    """Bars of speed-ups: a panel a kind of step, a group of bars a shape."""
    report = reports[0]
    cells = report["results"]
    names = list(dict.fromkeys(name for cell in cells for name, row in cell["contenders"].items() if "fwd" in row))
    figure = pyplot.figure(figsize=(max(9.0, 0.26 * len(names) * len(cells)), 6.4), layout="constrained")
    figure.suptitle(f"One site beside the alternatives: {describe(report)}", fontsize=12)
    panels = figure.subplots(len(KINDS), 1)
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        for index, name in enumerate(names):
            for position, cell in enumerate(cells):
                row, base = cell["contenders"].get(name, {}), cell["contenders"]["transformers"]
                if kind in row:
                    ratio = base[kind]["median_ms"] / row[kind]["median_ms"]
                    draw_bar(axes, position, index, len(names), ratio, name, labelled=position == 0)
        frame(axes, [describe_cell(cell) for cell in cells], f"{title}: times as fast as transformers' eager module")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return figure


def plot_models(reports: list[dict[str, Any]]) -> Any:
    """Bars of ratios to the base: time of a step, of a layer, peak memory, decoding speed; a group a model."""
    panels: dict[str, list[dict[str, float]]] = {}
    for position, report in enumerate(reports):
        for title, ratios in collect_ratios(report).items():
            panels.setdefault(title, [{} for _ in reports])[position] = ratios
    figure = pyplot.figure(figsize=(max(9.0, 3.0 * len(panels)), 4.2), layout="constrained")
    figure.suptitle(f"A widened model beside its base (= 1): {describe(reports[0])}", fontsize=12)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, groups) in zip(grid, panels.items(), strict=True):
        names = list(dict.fromkeys(name for ratios in groups for name in ratios))
        for index, name in enumerate(names):
            for position, ratios in enumerate(groups):
                if name in ratios:
                    draw_bar(axes, position, index, len(names), ratios[name], name, labelled=position == 0)
        frame(axes, [describe_model(report) for report in reports], title)
        axes.legend(frameon=False, fontsize=7, loc="upper left")
    return figure


def collect_ratios(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Panel -> widened model -> ratio to the base."""
    panels = {
        "time of a step\n(lower is better)": report["step"],
        "time of a layer\n(lower is better)": report.get("layer"),
    }
    panels |= {f"tokens a second, batch {b}\n(higher is better)": rows for b, rows in report["decode"].items()}
    found = {
        title: {name: row["of_base"]["median"] for name, row in rows.items() if not name.startswith("base")}
        for title, rows in panels.items()
        if rows
    }
    memory = {name: row["of_base"] for name, row in report["memory"].items() if name != "base" and row["of_base"]}
    return found | ({"peak memory of a step\n(lower is better)": memory} if memory else {})


def draw_bar(axes: Any, position: int, index: int, count: int, ratio: float, name: str, *, labelled: bool) -> None:
    """One bar of a group, its number on top."""
    # a bar alone is no wider than one of three
    width = 0.86 / max(3, count)
    x = position + (index - (count - 1) / 2) * width
    compiled = name.endswith("compiled")
    plain = name.removesuffix("compiled").rstrip(", ")
    color = COLOR_OF.get(plain, OTHER_OURS if plain.startswith("mhc_hf") else None)
    color = color or {"widened": COLORS["widened"], "widened, recompute": "#56b4e9"}[plain]
    axes.bar(
        x,
        ratio,
        0.94 * width,
        color=color,
        hatch="///" if compiled else None,
        edgecolor="white",
        linewidth=0,
        label=name if labelled else None,
    )
    axes.text(x, ratio, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", ha="center", va="bottom", fontsize=7)


def frame(axes: Any, groups: list[str], title: str) -> None:
    """From zero up, a line at one, a name a group, room for the legend."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.axhline(1, color="black", linewidth=0.7, alpha=0.6)
    axes.set_ylim(0, 1.45 * axes.get_ylim()[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def describe(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    threads = "" if "CPU" not in machine["device"] else f", {machine['threads']} threads"
    return f"{machine['device']}{threads}, torch {machine['torch']}, transformers {machine['transformers']}"


def describe_cell(cell: Mapping[str, Any]) -> str:
    return f"{cell['dtype'].removeprefix('torch.')}, n = {cell['n']}\nT = {cell['T']}\nC = {cell['C']}"


def describe_model(report: Mapping[str, Any]) -> str:
    model = f"{report['shape']}, {report['layers'][0]} layers, n = {report['streams']}"
    return f"{model}\n{report['batch']} x {report['context']}, {report['dtype']}"


if __name__ == "__main__":
    main()
