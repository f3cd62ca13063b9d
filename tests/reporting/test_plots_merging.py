"""Figures of merging show every row they were given, where its numbers say."""

import numpy as np
import pandas as pd
from drawing import closed, pairs, points, titles  # noqa: F401

from mlpreplace.reporting.plots import merging, similarity_maps, start_of_window
from mlpreplace.reporting.plots.looks import MERGING_LOOKS
from mlpreplace.reporting.plots.merging import RATIO


def scores(task: str, measure: str, tuned=(False, True)) -> pd.DataFrame:
    about = {"task": task, "measure": measure}
    rows = [{**about, "method": "dense", "saved": 0.0, "tuned": False, "score": 1.0, "ci_low": 0.9, "ci_high": 1.1}]
    for m, method in enumerate(MERGING_LOOKS):
        for saved in (0.25, 0.5):
            for after in tuned:
                score = 1.2 + saved + 0.1 * m - 0.05 * after
                ends = {"ci_low": score - 0.1, "ci_high": score + 0.1}
                rows.append({**about, "method": method, "saved": saved, "tuned": after, "score": score, **ends})
    return pd.DataFrame(rows)


def test_merging_has_a_column_a_task_and_a_row_before_and_after_tuning():
    rows = pd.concat([scores("language", RATIO), scores("vision", "accuracy")], ignore_index=True)
    panels = np.array(merging(rows).axes).reshape(2, 2)
    for column, task in zip(panels.T, ("language", "vision"), strict=True):
        for axes, tuned in zip(column, (False, True), strict=True):
            part = rows[(rows["task"] == task) & (rows["tuned"] == tuned) & (rows["method"] != "dense")]
            assert pairs(part["saved"], part["score"]) <= points(axes)
    assert [axes.get_yscale() for axes in panels[0]] == ["log", "linear"]


def test_what_was_tuned_on_stands_above_the_panel():
    rows = pd.concat([scores("language", RATIO).assign(tuned_on=16_384), scores("vision", "accuracy")], ignore_index=True)
    assert {"language\ntuned on 16,384 tokens", "vision\ntuned"} <= set(titles(merging(rows)))


def test_what_was_not_tuned_has_no_lower_panel():
    upper, lower = merging(scores("language", RATIO, tuned=(False,))).axes
    assert upper.get_visible() and not lower.get_visible()


def test_a_map_a_stack():
    layers = [(a, b) for a in range(3) for b in range(3)]
    rows = pd.DataFrame([{"stack": s, "layer_a": a, "layer_b": b, "cka": 1 / (1 + abs(a - b))} for s in "xy" for a, b in layers])
    figure = similarity_maps(rows)
    assert titles(figure) == ["x", "y"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["layer", "", "linear CKA"]
    assert figure.axes[0].collections[0].get_array().reshape(3, 3)[0].tolist() == [1, 1 / 2, 1 / 3]


def test_windows_are_drawn_by_their_start_and_the_best_has_a_ring():
    rows = pd.DataFrame({"stack": "x", "method": ["merged"] * 3 + ["dropped"] * 2, "start": [0, 1, 2, 0, 1]})
    rows["score"], rows["best"] = [0.5, 0.2, 0.4, 0.9, 0.8], [False, True, False, False, True]
    (axes,) = start_of_window(rows).axes
    assert {(0, 0.5), (1, 0.2), (2, 0.4), (0, 0.9), (1, 0.8)} == points(axes)
    (rings,) = [line for line in axes.lines if line.get_fillstyle() == "none" and line.get_markersize() == 8]
    assert set(map(tuple, rings.get_xydata())) == {(1, 0.2), (1, 0.8)}
