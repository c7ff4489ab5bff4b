"""Figures draw what they are given, at every size that a model may have."""

import numpy as np
import pytest

from mhc_hf import plotting

COLUMNS = (
    "forward_gain backward_gain log_column_sum composite_forward_gain composite_backward_gain composite_log_column_sum "
    "spread cosine effective_streams distance_identity distance_doubly_stochastic h_res_liveness alpha_pre alpha_post "
    "alpha_res"
).split()


def names(count):
    return [f"layers.{k // 2}.{('attn', 'ffn')[k % 2]}_hc" for k in range(count)]


def table(count):
    generator = np.random.default_rng(0)
    return {name: (1 + 0.1 * generator.random(count)).tolist() for name in COLUMNS}


@pytest.mark.parametrize(("count", "n"), [(1, 2), (6, 4), (100, 8)])
def test_every_site_gets_a_heat_map_of_its_own(count, n):
    matrices = {name: np.full((n, n), 1 / n) + k for k, name in enumerate(names(count))}
    figure = plotting.plot_matrices({name: m - k for k, (name, m) in enumerate(matrices.items())}, "title")
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == names(count)
    assert {image.get_clim() for axes in drawn for image in axes.images} == {(0.0, 1.0)}
    assert all(axes.images[0].get_array().shape == (n, n) for axes in drawn)


def test_matrices_with_negative_entries_get_a_scale_about_zero():
    figure = plotting.plot_matrices({"one": np.array([[1.0, -3.0], [0.0, 2.0]])}, "title")
    assert figure.axes[0].images[0].get_clim() == (-3.0, 3.0)


@pytest.mark.parametrize("count", [1, 2, 100])
def test_gains_are_drawn_as_they_are_and_in_their_direction_s_color(count):
    values = table(count)
    single, composite, _ = plotting.plot_gains(names(count), values).axes
    for axes, prefix in ((single, ""), (composite, "composite_")):
        lines = {line.get_label(): line for line in axes.get_lines()}
        for direction, color in plotting.DIRECTION_COLORS.items():
            assert lines[direction].get_ydata().tolist() == values[f"{prefix}{direction}_gain"]
            assert lines[direction].get_color() == color
    assert len(single.get_xticks()) <= 16


def test_gains_over_decades_are_drawn_on_a_logarithmic_axis():
    values = table(4) | {"composite_forward_gain": [1.0, 10.0, 100.0, 3000.0]}
    single, composite, _ = plotting.plot_gains(names(4), values).axes
    assert composite.get_yscale() == "log" and single.get_yscale() == "linear"


@pytest.mark.parametrize(("count", "n"), [(1, 2), (100, 8)])
def test_the_other_figures_take_any_depth_and_any_n(count, n, tmp_path):
    maps = (np.full((count, n), 0.5), np.zeros((count, n)))
    for index, figure in enumerate(
        (
            plotting.plot_reads_and_writes(names(count), maps, maps),
            plotting.plot_similarity(names(count), table(count), np.ones((count, n))),
            plotting.plot_distances(names(count), table(count)),
            plotting.plot_token_movement(names(count), np.ones((5, count))),
            plotting.plot_difference([0.1] * count, np.ones(4), np.ones(4)),
        )
    ):
        plotting.save_figure(figure, tmp_path / f"{index}.png")
        assert (tmp_path / f"{index}.png").stat().st_size > 1000


def test_curves_show_each_seed_and_their_mean():
    curves = {"a": [[(0, 1.0), (1, 2.0)], [(0, 3.0), (1, 4.0)]]}
    (axes,) = plotting.plot_curves({"loss": curves}, {"a": "#000000"}, "title").axes
    *seeds, mean = axes.get_lines()
    assert len(seeds) == 2 and mean.get_ydata().tolist() == [2.0, 3.0]
