"""Figures: numbers in, figures out. Knows nothing of models; needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# colour-blind safe, the same meaning in every figure
COLORS = {"base": "#7f7f7f", "widened": "#0072b2", "accent": "#d55e00"}
MAP_COLORS = "viridis"


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
