"""Figures of whole models show every row they were given, where its numbers say."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mlpreplace import METHODS
from mlpreplace.plotting import (
    ablation,
    additivity,
    calibration_texts,
    damage_prediction,
    kept_by_layer,
    pareto,
    redundancy,
    selection_map,
    speed_by_method,
    tasks_by_method,
)
from mlpreplace.plotting.models import BASELINE_LOOKS, CEILING, METHOD_LOOKS

DOMAINS = ("bundled/wiki", "bundled/speeches")


@pytest.fixture(autouse=True)
def closed():
    with plt.rc_context():
        yield
    plt.close("all")


def measured(methods, sparsities=(0.25,)) -> pd.DataFrame:
    rows = []
    for d, domain in enumerate(DOMAINS):
        for m, method in enumerate(methods):
            for s in sparsities:
                ratio = 1.0 if method == "dense" else 1.1 + 0.2 * m + d + s
                ends = {"ci_low": 0.95 * ratio, "ci_high": 1.05 * ratio}
                about = {"method": method, "sparsity": s, "sparsity_achieved": s, "domain": domain, "perplexity": 15 * ratio}
                rows.append({**about, "perplexity_ratio": ratio, **ends, "tokens": 1000})
    return pd.DataFrame(rows)


def points(axes) -> set[tuple[float, float]]:
    return {(round(float(x), 6), round(float(y), 6)) for line in axes.lines for x, y in np.column_stack(line.get_data())}


def test_the_frontier_draws_every_method_in_every_domain():
    rows = measured(["dense", *METHOD_LOOKS], (0.125, 0.25))
    panels = pareto(rows).axes
    assert [p.get_title() or p.get_title("left") for p in panels] == list(DOMAINS)
    for panel, domain in zip(panels, DOMAINS, strict=True):
        part = rows[(rows["domain"] == domain) & (rows["method"] != "dense")]
        expected = {(round(x, 6), round(y, 6)) for x, y in zip(part["sparsity"], part["perplexity_ratio"], strict=True)}
        assert expected <= points(panel)


def test_what_leaves_the_frontier_is_written_there():
    rows = measured(["dense", "uidl", "subfit"])
    rows.loc[(rows["method"] == "uidl") & (rows["domain"] == DOMAINS[1]), ["perplexity_ratio", "ci_low", "ci_high"]] = 432.1
    first, second = pareto(rows).axes
    assert not any("above" in t.get_text() for t in first.texts) and first.get_ylim()[1] == CEILING
    assert [" ".join(t.get_text().split()) for t in second.texts][-1] == "above ×10, at most: uidl ×432"


@pytest.mark.parametrize("methods", [METHOD_LOOKS, METHODS], ids=["allocations", "comparison"])
def test_methods_differ_without_colour(methods):
    looks = [BASELINE_LOOKS[name] for name in methods]
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == len(looks) == len({look["color"] for look in looks})


def test_pairs_are_drawn_as_a_ratio_and_sets_against_their_sum():
    pairs = pd.DataFrame({"layer_a": [0, 0, 1], "layer_b": [1, 2, 2], "label": "NarrowMLP(width=8)", "kl": [2.0, 3.0, 1.0]})
    pairs["kl_sum"] = [1.0, 3.0, 2.0]
    sets = pd.DataFrame({"label": ["a", "a", "b"], "blocks": [2, 4, 4], "kl": [0.1, 0.5, 0.2], "kl_sum": [0.1, 0.3, 0.2]})
    left, right, *_ = additivity(pairs, sets).axes
    assert {t.get_text() for t in left.texts} == {"2.00", "1.00", "0.50"}
    assert {(0.1, 0.1), (0.3, 0.5), (0.2, 0.2)} <= points(right)


@pytest.mark.parametrize("columns", [["local_error"], ["local_error", "damage", "second_order"], ["damage", "validation_kl"]])
def test_a_panel_an_estimate(columns):
    rows = pd.DataFrame({"family": ["Mean", "NarrowMLP", "NarrowMLP"], "layer": [0, 0, 1], "kl": [0.3, 0.1, 0.2]})
    for column in columns:
        rows[column] = [3.0, 1.0, 2.0]
    panels = [axes for axes in damage_prediction(rows).axes if axes.get_visible()]
    assert len(panels) == len(columns)
    assert all(any("rank correlation 1.00" in t.get_text() for t in axes.texts) for axes in panels)


def test_calibration_texts_have_a_line_each():
    rows = measured(["wiki", "mixture"]).assign(split="heldout")
    seen = rows.assign(split="validation")
    every = pd.concat([rows, seen]).assign(log_damage=lambda r: np.log(r["perplexity_ratio"]))
    axes = calibration_texts(every).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["wiki", "mixture"]
    assert {round(x, 6) for x, _ in points(axes)} >= set(rows["perplexity_ratio"].round(6))


def test_recipes_are_named_with_what_they_add():
    rows = measured(["uniform", "search"]).assign(note=lambda r: r["method"].map({"uniform": "", "search": "from greedy"}))
    axes = ablation(rows).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["uniform", "search: from greedy"]
    assert {f"{r:.2f}" for r in rows["perplexity_ratio"]} == {t.get_text() for t in axes.texts}


def test_kept_has_a_panel_a_method():
    rows = pd.DataFrame(
        [
            {"method": m, "layer": layer, "sparsity": s, "kept": 1 - s * layer}
            for m in ("greedy", "search")
            for layer in range(3)
            for s in (0.125, 0.25)
        ]
    )
    first, second, _ = kept_by_layer(rows).axes
    assert [a.get_title() or a.get_title("left") for a in (first, second)] == ["greedy", "search"]
    assert first.collections[0].get_array().reshape(2, 3)[1].tolist() == [1, 0.75, 0.5]


def test_the_selection_map_shows_attention_above_mlp():
    rows = pd.DataFrame(
        [
            {"method": method, "layer": layer, "kind": kind, "kept": 0.1 * layer + (kind == "mlp")}
            for method in ("subfit", "uidl")
            for layer in range(3)
            for kind in ("mlp", "attention")
        ]
    )
    first, second, _ = selection_map(rows).axes
    assert [a.get_title() or a.get_title("left") for a in (first, second)] == ["subfit", "uidl"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["attention", "MLP"]
    assert first.collections[0].get_array().reshape(2, 3).tolist() == [[0, 0.1, 0.2], [1, 1.1, 1.2]]


def test_speed_has_a_line_a_method():
    rows = pd.DataFrame({"method": ["subfit", "allocated"], "kv_cache_fraction": [0.7, 0.9]})
    for i, phase in enumerate(("prefill", "decode")):
        rows[f"{phase}_speedup"] = [1.1 + i, 1.2 + i]
        rows[f"{phase}_low"], rows[f"{phase}_high"], rows[f"{phase}_ideal"] = 1.0, 3.0, [1.25 + i, 1.3 + i]
    prefill, decode, cache = speed_by_method(rows).axes
    assert {(1.1, 1), (1.2, 0), (1.25, 1), (1.3, 0)} <= points(prefill)
    assert {(2.1, 1), (2.2, 0), (2.25, 1), (2.3, 0)} <= points(decode)
    assert {(0.7, 1), (0.9, 0)} <= points(cache)
    assert [label.get_text() for label in prefill.get_yticklabels()] == ["subfit", "allocated"]


def test_tasks_have_a_line_a_method_and_healed_ones_are_hollow():
    methods = ["subfit", "subfit + healing", "allocated"]
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
