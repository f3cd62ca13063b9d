"""Figures of single damages and of their sums show every row they were given, where its numbers say."""

import pandas as pd
import pytest
from drawing import closed, labels, pairs, points, titles  # noqa: F401

from mlpreplace.reporting.plots import additivity, damage_prediction, sensitivity, sensitivity_of_models


def test_sensitivity_has_a_panel_a_family_and_a_line_a_size():
    rows = pd.DataFrame({"layer": [0, 1] * 3, "family": ["Mean"] * 2 + ["LowRank"] * 4, "kl": [0.5, 0.4, 0.3, 0.2, 0.6, 0.7]})
    rows["label"] = ["Mean()"] * 2 + ["LowRank(rank=8)"] * 2 + ["LowRank(rank=4)"] * 2
    figure = sensitivity(rows.assign(kl_low=0.9 * rows["kl"], kl_high=1.1 * rows["kl"]))
    assert titles(figure) == ["Mean", "LowRank"]
    for axes, (_, part) in zip(figure.axes, rows.groupby("family", sort=False), strict=True):
        assert points(axes) == pairs(part["layer"], part["kl"])
    mean, low_rank = (axes.get_legend() for axes in figure.axes)
    assert mean is None and labels(low_rank.get_texts()) == ["rank=8", "rank=4"]


@pytest.mark.parametrize("columns", [["local_error"], ["local_error", "damage", "second_order"], ["damage", "validation_kl"]])
def test_a_panel_an_estimate(columns):
    rows = pd.DataFrame({"family": ["Mean", "NarrowMLP", "NarrowMLP"], "layer": [0, 0, 1], "kl": [0.3, 0.1, 0.2]})
    for column in columns:
        rows[column] = [3.0, 1.0, 2.0]
    panels = [axes for axes in damage_prediction(rows).axes if axes.get_visible()]
    assert len(panels) == len(columns)
    assert all(any("rank correlation 1.00" in t.get_text() for t in axes.texts) for axes in panels)


def test_pairs_are_drawn_as_a_ratio_and_sets_against_their_sum():
    pairs = pd.DataFrame({"layer_a": [0, 0, 1], "layer_b": [1, 2, 2], "label": "NarrowMLP(width=8)", "kl": [2.0, 3.0, 1.0]})
    pairs["kl_sum"] = [1.0, 3.0, 2.0]
    sets = pd.DataFrame({"label": ["a", "a", "b"], "blocks": [2, 4, 4], "kl": [0.1, 0.5, 0.2], "kl_sum": [0.1, 0.3, 0.2]})
    left, right, *_ = additivity(pairs, sets).axes
    assert {t.get_text() for t in left.texts} == {"2.00", "1.00", "0.50"}
    assert {(0.1, 0.1), (0.3, 0.5), (0.2, 0.2)} <= points(right)


def test_models_stand_beside_each_other_with_a_line_a_size():
    rows = pd.DataFrame(
        {"model": m, "layer": layer, "family": "NarrowMLP", "share_of_block": s, "kl": 0.1 * (layer + 1) * s}
        for m, layers in (("one", 3), ("other", 5))
        for layer in range(layers)
        for s in (0.25, 0.75)
    )
    owned = rows[rows["share_of_block"] == 0.25].assign(top_share=lambda r: r["layer"] / 10)
    figure = sensitivity_of_models(rows, owned)
    assert labels(figure.legends[0].get_texts()) == ["NarrowMLP 25%", "NarrowMLP 75%"]
    for axes, bars, (_, part) in zip(figure.axes[:2], figure.axes[2:], rows.groupby("model"), strict=True):
        assert points(axes) == pairs(part["layer"], part["kl"])
        assert [bar.get_height() for bar in bars.patches] == [n / 10 for n in range(part["layer"].max() + 1)]
