"""Figures of methods side by side show every row they were given, where its numbers say."""

import numpy as np
import pandas as pd
from drawing import closed, labels, points, titles  # noqa: F401

from mlpreplace.reporting.plots import redundancy, selection_map, speed_by_method, tasks_by_method


def test_the_selection_map_shows_attention_above_mlp():
    rows = pd.DataFrame(
        [
            {"method": method, "layer": layer, "kind": kind, "kept": 0.1 * layer + (kind == "mlp")}
            for method in ("subfit", "uidl")
            for layer in range(3)
            for kind in ("mlp", "attention")
        ]
    )
    figure = selection_map(rows)
    assert titles(figure) == ["SubFit-style", "UIDL"]
    first = figure.axes[0]
    assert labels(first.get_yticklabels()) == ["attention", "MLP"]
    assert first.collections[0].get_array().reshape(2, 3).tolist() == [[0, 0.1, 0.2], [1, 1.1, 1.2]]


def test_speed_has_a_line_a_method():
    rows = pd.DataFrame({"method": ["subfit", "recipe"], "kv_cache_fraction": [0.7, 0.9]})
    for i, phase in enumerate(("prefill", "decode")):
        rows[f"{phase}_speedup"] = [1.1 + i, 1.2 + i]
        rows[f"{phase}_low"], rows[f"{phase}_high"], rows[f"{phase}_ideal"] = 1.0, 3.0, [1.25 + i, 1.3 + i]
    prefill, decode, cache = speed_by_method(rows).axes
    assert {(1.1, 1), (1.2, 0), (1.25, 1), (1.3, 0)} <= points(prefill)
    assert {(2.1, 1), (2.2, 0), (2.25, 1), (2.3, 0)} <= points(decode)
    assert {(0.7, 1), (0.9, 0)} <= points(cache)
    assert labels(prefill.get_yticklabels()) == ["SubFit-style", "recipe"]


def test_tasks_have_a_line_a_method_and_healed_ones_are_hollow():
    methods = ["subfit", "subfit + healing", "recipe"]
    kept = {"average": [0.3, 0.5, 0.7], "bundled/piqa": [0.2, 0.4, 0.6], "bundled/siqa": [np.nan] * 3}
    rows = pd.DataFrame(
        [
            {"method": m, "task": task, "accuracy_retained": value, "accuracy_retained_se": 0.1}
            for task, values in kept.items()
            for m, value in zip(methods, values, strict=True)
        ]
    )
    axes = tasks_by_method(rows).axes[0]
    assert {(0.3, 2), (0.5, 1), (0.7, 0), (0.2, 2), (0.4, 1), (0.6, 0)} <= points(axes)
    hollow = {
        tuple(np.ravel(line.get_xydata()))
        for line in axes.lines
        if line.get_fillstyle() == "none" and len(line.get_xydata()) == 1
    }
    assert hollow == {(0.5, 1.0)}


def test_redundancy_draws_attention_and_mlp_in_every_panel():
    rows = pd.DataFrame({"layer": [0, 1, 0, 1], "kind": ["attention"] * 2 + ["mlp"] * 2})
    for i, column in enumerate(("magnitude", "rotation", "damage_per_million"), 1):
        rows[column] = [0.1 * i, 0.2 * i, 0.3 * i, 0.4 * i]
    for i, axes in enumerate(redundancy(rows).axes, 1):
        assert points(axes) == {(x, round(0.1 * i * v, 6)) for x, v in ((0, 1), (1, 2), (0, 3), (1, 4))}
