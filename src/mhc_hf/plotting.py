"""Figures: numbers in, figures out. Knows nothing of models; needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# colour-blind safe, the same meaning in every figure
COLORS = {"base": "#7f7f7f", "widened": "#0072b2", "accent": "#d55e00"}
DIRECTION_COLORS = {"forward": "#009e73", "backward": "#d55e00"}
ACCENTS = ("#cc79a7", "#7a4988")
GATE_COLORS = {"pre": "#56b4e9", "post": "#e69f00", "res": "#000000"}
MAP_COLORS = "viridis"
SIGNED_COLORS = "RdBu_r"
STREAM_COLORS = "tab10"


def plot_finetuning(
    losses: Mapping[str, Sequence[tuple[int, float]]],
    labels: Mapping[str, str],
    spread: Sequence[tuple[int, float]],
    maps: Mapping[str, tuple[np.ndarray, np.ndarray]],
    title: str,
) -> Figure:
    """One picture of a fine-tuning: what it did to the loss, to the streams and to H_res.

    Args:
        losses: validation loss in nats a token by step, for "base" and "widened".
        labels: what the legend calls them.
        spread: relative spread of the streams by step, |x - mean over streams| / |x|.
        maps: by site, H_res [n, n] averaged over tokens before and after.
        title: headline of the figure.
    Raises:
        ModuleNotFoundError: matplotlib is missing; the message names the extra.
    """
    figure = _require_matplotlib().figure(figsize=(12, 7.2), layout="constrained")
    figure.suptitle(title, fontsize=13)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    left, right = top.subplots(1, 2)
    for name, curve in losses.items():
        left.plot(*zip(*curve, strict=True), color=COLORS[name], marker="o", markersize=3, label=labels[name])
    left.set(title="Validation loss, same tokens", xlabel="step", ylabel="nats a token")
    left.legend(frameon=False)
    right.plot(*zip(*spread, strict=True), color=COLORS["widened"], marker="o", markersize=3)
    right.set(title="Spread of the streams", xlabel="step", ylabel="|x - mean| / |x|")
    right.set_ylim(0, 1.15 * max(value for _, value in spread))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)

    grid = bottom.subplots(2, len(maps), squeeze=False)
    off_diagonal = max(float(_off_diagonal(after).max()) for _, after in maps.values())
    image: Any = None
    for column, (site, pair) in enumerate(maps.items()):
        for row, (when, matrix) in enumerate(zip(("before", "after"), pair, strict=True)):
            axes = grid[row, column]
            image = axes.imshow(matrix, cmap=MAP_COLORS, vmin=0, vmax=2 * off_diagonal)
            axes.set_xticks([])
            axes.set_yticks([])
            for (i, j), value in _entries(matrix):
                color = "black" if value > off_diagonal else "white"
                axes.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6.5, color=color)
            if row == 0:
                axes.set_title(site, fontsize=9)
            if column == 0:
                axes.set_ylabel(when)
    bottom.colorbar(image, ax=grid, label="H_res, into row from column", extend="max", shrink=0.9)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG and let go of the figure: pyplot keeps every figure that nobody closes."""
    figure.savefig(path, dpi=110)
    _require_matplotlib().close(figure)


def plot_matrices(matrices: Mapping[str, np.ndarray], title: str) -> Figure:
    """A heat map for each site, into row from column, all on one scale.

    Args:
        matrices: by site, [n, n].
        title: headline of the figure.
    """
    count, n = len(matrices), len(next(iter(matrices.values())))
    columns = min(count, 4 if count <= 4 else 8 if count <= 48 else 10)
    rows = -(-count // columns)
    side = 1.35
    figure = _require_matplotlib().figure(
        figsize=(columns * side + 1.2, rows * (side + 0.22) + 0.7), layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    scale = _matrix_scale(list(matrices.values()))
    size = 8 if n < 4 else 6.5
    image: Any = None
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes, (site, matrix) in zip(grid.flat, matrices.items(), strict=False):
        image = axes.imshow(matrix, **scale)
        axes.set_title(site, fontsize=7, pad=2)
        axes.set_xticks([])
        axes.set_yticks([])
        if n <= 4 and count <= 48:
            for (i, j), value in _entries(matrix):
                dark = scale["cmap"] == MAP_COLORS and value < 0.36
                text = f"{value:.2f}".replace("0.", ".", 1)
                axes.text(j, i, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 3 / rows + 0.3), pad=0.01, label="into row, from column")
    if scale["cmap"] == MAP_COLORS:
        bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    return figure


def plot_gains(sites: Sequence[str], table: Mapping[str, Sequence[float]]) -> Figure:
    """Single and composite gains over depth, forward and backward, and what only logarithms show.

    Args:
        sites: names such as "layers.3.attn_hc", in the order they run.
        table: the columns `forward_gain`, `backward_gain`, `log_column_sum` and their `composite_` forms.
    """
    figure = _require_matplotlib().figure(figsize=(12, 3.9), layout="constrained")
    single, composite, logs = figure.subplots(1, 3)
    for axes, prefix in ((single, ""), (composite, "composite_")):
        for direction in ("forward", "backward"):
            _draw_over_depth(axes, table[f"{prefix}{direction}_gain"], DIRECTION_COLORS[direction], direction)
        values = [*table[f"{prefix}forward_gain"], *table[f"{prefix}backward_gain"]]
        _frame_gains(axes, values)
        axes.legend(frameon=False)
    single.set(title="Single maps: Amax gain", ylabel="gain")
    composite.set(title="Composite maps: Amax gain")
    _draw_over_depth(logs, table["log_column_sum"], ACCENTS[0], "single")
    _draw_over_depth(logs, table["composite_log_column_sum"], ACCENTS[1], "composite, from the first site")
    logs.set(title="max |log column sum|")
    # room for the legend above the curves
    logs.set_ylim(0, 1.3 * max(1e-6, *table["log_column_sum"], *table["composite_log_column_sum"]))
    logs.legend(frameon=False, loc="upper left")
    for axes in (single, composite, logs):
        _finish_depth(axes, sites)
    return figure


def plot_reads_and_writes(
    sites: Sequence[str], h_pre: tuple[np.ndarray, np.ndarray], h_post: tuple[np.ndarray, np.ndarray]
) -> Figure:
    """What each stream gives to a branch and gets from it.

    Args:
        sites: names, in the order they run.
        h_pre, h_post: mean and standard deviation over tokens, [L, n] each.
    """
    n = h_pre[0].shape[1]
    figure = _require_matplotlib().figure(figsize=(12, 2 * (1.2 + 0.22 * n)), layout="constrained")
    grid = figure.subplots(2, 2)
    names = (
        "H_pre, mean over tokens",
        "H_pre, standard deviation",
        "H_post, mean over tokens",
        "H_post, standard deviation",
    )
    for axes, values, name in zip(grid.flat, (*h_pre, *h_post), names, strict=True):
        top = float(values.max()) or 1.0
        top = {0: 1.0, 2: 2.0}.get(list(grid.flat).index(axes), top)
        image = axes.imshow(values.T, aspect="auto", cmap=MAP_COLORS, vmin=0, vmax=max(top, float(values.max())))
        axes.set(title=name, ylabel="stream", yticks=range(n))
        _label_depth(axes, sites)
        figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def plot_similarity(sites: Sequence[str], table: Mapping[str, Sequence[float]], stream_rms: np.ndarray) -> Figure:
    """How different the streams are that each site gets.

    Args:
        sites: names, in the order they run.
        table: the columns `spread`, `cosine` and `effective_streams`.
        stream_rms: [L, n].
    """
    figure = _require_matplotlib().figure(figsize=(12, 6.4), layout="constrained")
    (spread, cosine), (number, size) = figure.subplots(2, 2)
    _draw_over_depth(spread, table["spread"], COLORS["widened"])
    spread.set(title="Spread of the streams", ylabel="|x - mean| / |x|")
    spread.set_ylim(bottom=0)
    _draw_over_depth(cosine, table["cosine"], COLORS["widened"])
    cosine.set(title="Cosine between two streams, mean over pairs")
    cosine.set_ylim(min(-0.05, *table["cosine"]), 1.05)
    _draw_over_depth(number, table["effective_streams"], COLORS["widened"])
    number.set(title="Effective number of streams")
    number.set_ylim(0.9, stream_rms.shape[1] + 0.1)
    for stream, values in enumerate(stream_rms.T):
        color = _require_matplotlib().get_cmap(STREAM_COLORS)(stream)
        _draw_over_depth(size, values, color, f"stream {stream}")
    size.set(title="Size of each stream, root mean square")
    if stream_rms.max() > 4 * stream_rms.min() > 0:
        _make_logarithmic(size)
    size.legend(frameon=False, fontsize=7, ncols=2)
    for axes in (spread, cosine, number, size):
        _finish_depth(axes, sites)
    return figure


def plot_distances(sites: Sequence[str], table: Mapping[str, Sequence[float]]) -> Figure:
    """Where H_res stands between the identity and uniform mixing, how alive it is, and the gating factors."""
    figure = _require_matplotlib().figure(figsize=(12, 3.9), layout="constrained")
    identity, breach, gates = figure.subplots(1, 3)
    _draw_over_depth(identity, table["distance_identity"], COLORS["widened"], "|H_res - I|")
    identity.set(title="H_res: distance from the identity")
    identity.set_ylim(bottom=0)
    _draw_over_depth(breach, table["distance_doubly_stochastic"], COLORS["accent"], "distance from doubly stochastic")
    _draw_over_depth(breach, table["h_res_liveness"], COLORS["widened"], "liveness, max h (1 - h)")
    breach.set(title="H_res: breach of the rule, liveness")
    _make_logarithmic(breach)
    breach.legend(frameon=False, fontsize=8)
    for name, color in GATE_COLORS.items():
        _draw_over_depth(gates, table[f"alpha_{name}"], color, name)
    gates.set(title="Gating factors alpha")
    gates.legend(frameon=False)
    for axes in (identity, breach, gates):
        _finish_depth(axes, sites)
    return figure


def plot_token_movement(sites: Sequence[str], movement: np.ndarray) -> Figure:
    """By how much each token's maps differ from the text's mean maps. movement [T, L]"""
    figure = _require_matplotlib().figure(figsize=(12, 1.6 + min(4.5, 0.09 * len(sites) + 1.2)), layout="constrained")
    axes = figure.subplots()
    # a few tokens, mostly the first, move far more than all others
    top = float(np.quantile(movement, 0.995)) or 1.0
    image = axes.imshow(movement.T, aspect="auto", cmap=MAP_COLORS, vmin=0, vmax=top, interpolation="nearest")
    axes.set(title="Distance of a token's maps from the mean over the text", xlabel="token")
    step = max(1, -(-len(sites) // 20))
    axes.set_yticks(range(0, len(sites), step), [shorten_site(site) for site in sites[::step]], fontsize=7)
    figure.colorbar(image, ax=axes, extend="max", pad=0.01)
    return figure


def plot_difference(hidden: Sequence[float], base_losses: np.ndarray, losses: np.ndarray) -> Figure:
    """What differs from the base model: the mean stream by depth, and the loss of each token.

    Args:
        hidden: relative difference of the mean over streams from the base's hidden state, after each layer.
        base_losses, losses: nats, [T - 1].
    """
    figure = _require_matplotlib().figure(figsize=(12, 4.2), layout="constrained")
    depth, tokens = figure.subplots(1, 2)
    _draw_over_depth(depth, hidden, COLORS["widened"])
    depth.set(
        title="Mean stream against the base's hidden state", xlabel="layers passed", ylabel="|difference| / |base|"
    )
    depth.set_ylim(bottom=0)
    tokens.scatter(base_losses, losses, s=9, color=COLORS["widened"], alpha=0.5, linewidths=0)
    top = max(float(base_losses.max()), float(losses.max()))
    tokens.plot([0, top], [0, top], color=COLORS["base"], linewidth=1)
    tokens.set(title="Loss of each token", xlabel="base, nats", ylabel="this model, nats")
    for axes in (depth, tokens):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]],
    colors: Mapping[str, str],
    title: str,
    log_scale: Collection[str] = (),
    xlabel: str = "step",
) -> Figure:
    """Several models, several seeds: in each panel a thin line a seed, and the mean over seeds on top of them.

    Args:
        panels: by the panel's name, by model: a curve of (x, y) for each seed.
        colors: by model.
        title: headline of the figure.
        log_scale: panels whose y axis is logarithmic.
        xlabel: what x is.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _require_matplotlib().figure(figsize=(4.6 * columns, 3.4 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, models) in zip(grid.flat, panels.items(), strict=False):
        for model, curves in models.items():
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=colors[model], alpha=0.3, linewidth=0.8)
            shortest = min(map(len, curves))
            mean = np.mean([np.array(curve[:shortest]) for curve in curves], 0)
            axes.plot(mean[:, 0], mean[:, 1], color=colors[model], linewidth=1.8, label=model)
        axes.set(title=name, xlabel=xlabel)
        if name in log_scale:
            _make_logarithmic(axes)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def shorten_site(site: str) -> str:
    """ "layers.3.attn_hc" -> "3 attn" """
    *_, layer, name = f".{site}".split(".")
    return f"{layer} {name.removesuffix('_hc')}".strip()


def _matrix_scale(matrices: Sequence[np.ndarray]) -> dict[str, Any]:
    """0 to 1 for doubly stochastic matrices, by square roots, so that small entries can be told apart.

    Symmetric about 0 for others, so that nothing is cut off.
    """
    from matplotlib.colors import PowerNorm

    low, high = min(float(m.min()) for m in matrices), max(float(m.max()) for m in matrices)
    if low >= -1e-3 and high <= 1 + 1e-3:
        return {"cmap": MAP_COLORS, "norm": PowerNorm(0.5, 0.0, 1.0)}
    reach = max(abs(low), abs(high))
    return {"cmap": SIGNED_COLORS, "vmin": -reach, "vmax": reach}


def _draw_over_depth(axes: Any, values: Sequence[float], color: Any, label: str | None = None) -> None:
    axes.plot(range(len(values)), values, color=color, label=label, marker="o", markersize=2.5, linewidth=1.2)


def _frame_gains(axes: Any, values: Sequence[float]) -> None:
    """Around 1 and never so close that rounding looks like growth; logarithmic where gains span more than a decade."""
    low, high = min(values), max(values)
    axes.axhline(1, color="black", linewidth=0.6, alpha=0.6)
    if low > 0 and high / low > 10:
        _make_logarithmic(axes)
    else:
        axes.set_ylim(min(0.9, low - 0.05), max(1.1, high + 0.05))


def _make_logarithmic(axes: Any) -> None:
    """Make the y axis of what has been drawn logarithmic, and say so; its ticks are written as one writes numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.dataLim.intervaly
    axes.set_yscale("log")
    axes.set_ylabel("logarithmic scale", fontsize=8)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finish_depth(axes: Any, sites: Sequence[str]) -> None:
    _label_depth(axes, sites)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _label_depth(axes: Any, sites: Sequence[str]) -> None:
    """A tick at the first site of each layer, as many as can be read."""
    layers = [site.split(".")[-2] if "." in site else site for site in sites]
    firsts = [index for index, layer in enumerate(layers) if index == 0 or layers[index - 1] != layer]
    firsts = firsts[:: -(-len(firsts) // 16)]
    axes.set_xticks(firsts, [layers[index] for index in firsts], fontsize=8)
    axes.set_xlabel("layer")


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[~np.eye(len(matrix), dtype=bool)]


def _entries(matrix: np.ndarray) -> list[tuple[tuple[int, int], float]]:
    return [((i, j), float(value)) for i, row in enumerate(matrix) for j, value in enumerate(row)]


def _require_matplotlib() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Figures need matplotlib. Install it with: pip install "mhc-hf[plot]"') from error
    # files only: a figure must not depend on there being a screen
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
