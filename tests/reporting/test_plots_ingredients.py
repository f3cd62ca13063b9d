"""Ratios of what differs by one thing, a line each, where its numbers say."""

import numpy as np
import pandas as pd
from drawing import DOMAINS, closed, labels, measured, points, titles  # noqa: F401

from mlpreplace.reporting.plots import ablation, calibration_texts, ingredients, readable


def test_calibration_texts_have_a_line_each():
    rows = measured(["wiki", "mixture"]).assign(split="heldout")
    seen = rows.assign(split="validation")
    every = pd.concat([rows, seen]).assign(log_damage=lambda r: np.log(r["perplexity_ratio"]))
    axes = calibration_texts(every).axes[0]
    assert labels(axes.get_yticklabels()) == ["wiki", "mixture"]
    assert {round(x, 6) for x, _ in points(axes)} >= set(rows["perplexity_ratio"].round(6))


def test_recipes_are_named_with_what_they_add():
    rows = measured(["uniform", "recipe"]).assign(note=lambda r: r["method"].map({"uniform": "", "recipe": "from greedy"}))
    axes = ablation(rows).axes[0]
    assert labels(axes.get_yticklabels()) == ["one width everywhere", "recipe: from greedy"]
    assert {f"{r:.2f}" for r in rows["perplexity_ratio"]} == {t.get_text() for t in axes.texts}


def test_a_domain_more_is_drawn_too():
    rows = measured(["uniform", "recipe"]).assign(note="")
    rows = pd.concat([rows, rows[rows["domain"] == DOMAINS[0]].assign(domain="another", perplexity_ratio=1.7)])
    axes = ablation(rows).axes[0]
    assert {(1.7, 2), (1.7, 1)} <= points(axes)


def test_ingredients_stand_in_lists_with_every_draw_and_their_mean():
    mean = pd.concat([measured(["uniform", "recipe"]).assign(panel="added"), measured(["without"]).assign(panel="taken away")])
    draws = [mean.assign(draw=i, perplexity_ratio=mean["perplexity_ratio"] + 0.1 * (i - 0.5)) for i in range(2)]
    rows = pd.concat([mean.assign(draw=None), *draws])
    figure = ingredients(rows)
    assert titles(figure) == ["added", "taken away"]
    for axes, (_, part) in zip(figure.axes, rows.groupby("panel"), strict=True):
        assert labels(axes.get_yticklabels()) == [readable(method) for method in part["method"].unique()]
        assert {round(x, 6) for x, _ in points(axes)} >= set(part["perplexity_ratio"].round(6))
        assert {t.get_text() for t in axes.texts} == {f"{r:.3f}" for r in part[part["draw"].isna()]["perplexity_ratio"]}
