"""Figures of whole models show every row they were given, where its numbers say."""

import numpy as np
import pandas as pd
from drawing import DOMAINS, closed, labels, measured, pairs, points, titles  # noqa: F401

from mlpreplace.reporting.plots import healing_curves, kept_by_layer, megabytes, pareto, quantization, readable, speed
from mlpreplace.reporting.plots.full_replacement import CEILING
from mlpreplace.reporting.plots.looks import ALLOCATION_LOOKS


def test_the_frontier_draws_every_method_in_every_domain():
    rows = measured(["dense", *ALLOCATION_LOOKS], (0.125, 0.25))
    figure = pareto(rows)
    assert titles(figure) == [readable(domain) for domain in DOMAINS]
    for panel, domain in zip(figure.axes, DOMAINS, strict=True):
        part = rows[(rows["domain"] == domain) & (rows["method"] != "dense")]
        assert pairs(part["sparsity"], part["perplexity_ratio"]) <= points(panel)


def test_what_leaves_the_frontier_is_written_there():
    rows = measured(["dense", "uidl", "subfit"])
    rows.loc[(rows["method"] == "uidl") & (rows["domain"] == DOMAINS[1]), ["perplexity_ratio", "ci_low", "ci_high"]] = 432.1
    first, second = pareto(rows).axes
    assert not any("above" in t.get_text() for t in first.texts) and first.get_ylim()[1] == CEILING
    assert [" ".join(t.get_text().split()) for t in second.texts][-1] == "above ×10, at most: UIDL ×432"


def test_kept_has_a_panel_a_method():
    rows = pd.DataFrame(
        [
            {"method": m, "layer": layer, "sparsity": s, "kept": 1 - s * layer}
            for m in ("greedy", "recipe")
            for layer in range(3)
            for s in (0.125, 0.25)
        ]
    )
    figure = kept_by_layer(rows)
    assert titles(figure) == ["greedy", "recipe"]
    assert labels(figure.axes[1].get_yticklabels()) == ["12.5 %", "25 %"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["sparsity", "sparsity", "parameters kept"]
    assert figure.axes[0].collections[0].get_array().reshape(2, 3)[1].tolist() == [1, 0.75, 0.5]


def test_speed_is_drawn_beside_its_ideal():
    rows = pd.DataFrame({"sparsity_achieved": [0.5, 0.0, 0.25]})  # a line connects them in order
    for i, phase in enumerate(("prefill", "decode")):
        rows[f"{phase}_speedup"] = [1.5 + i, 1.0, 1.2 + i]
        rows[f"{phase}_low"], rows[f"{phase}_high"] = 0.9 * rows[f"{phase}_speedup"], 1.1 * rows[f"{phase}_speedup"]
        rows[f"{phase}_ideal"] = [2.0 + i, 1.0, 1.25 + i]
    for axes, phase in zip(speed(rows).axes, ("prefill", "decode"), strict=True):
        x, y, ideal = rows["sparsity_achieved"], rows[f"{phase}_speedup"], rows[f"{phase}_ideal"]
        assert pairs(x, y) | pairs(x, ideal) <= points(axes)
        assert axes.containers[0].lines[0].get_xdata().tolist() == [0, 0.25, 0.5]
        shares = [f"{100 * y[i] / ideal[i]:.0f} % of ideal" for i in (2, 0)]
        assert [text.get_text() for text in axes.texts] == ["ideal", *shares, "dense"]


def test_quantization_shows_four_models_and_the_product_of_both_factors():
    rows = pd.DataFrame(
        [
            {"method": name, "quantized": q, "replaced": r, "parameter_mb": mb, "perplexity": ppl, "prefill_speedup": ppl / 10}
            for name, q, r, mb, ppl in (
                ("both, at once", True, True, 40, 26), ("dense", False, False, 200, 10),
                ("int8", True, False, 50, 11), ("replaced", False, True, 160, 20),
            )
        ]
    )  # fmt: skip
    for column, low, high in (("perplexity", "ci_low", "ci_high"), ("prefill_speedup", "prefill_low", "prefill_high")):
        rows[low], rows[high] = 0.9 * rows[column], 1.1 * rows[column]
    for axes, column, scale in zip(quantization(rows).axes, ("perplexity", "prefill_speedup"), (1, 10), strict=True):
        assert pairs(rows["parameter_mb"], rows[column]) <= points(axes)
        (hollow,) = [line for line in axes.lines if line.get_fillstyle() == "none"]
        assert pairs(*hollow.get_data()) == {(50 * 160 / 200, 11 * 20 / 10 / scale)}
        names = axes.get_legend_handles_labels()[1]
        assert sorted(names) == ["both, at once", "dense", "int8", "product of both factors", "replaced"]
    figure = quantization(rows[~rows["quantized"]])
    assert labels(figure.legends[0].texts) == ["dense", "replaced"]
    assert figure.get_suptitle() == "int8 was not measured on this device"


def test_healing_is_drawn_from_its_start_on_and_what_is_kept_has_a_ring():
    columns = {"sparsity": [0.1, 0.1, 0.1, 0.2, 0.2], "steps": [2, 2, 2, 1, 1], "tokens": [0, 8, 16, 0, 16]}
    rows = pd.DataFrame(columns | {"kl": [0.3, 0.1, 0.2, 0.4, 0.5]})
    axes = healing_curves(rows).axes[0]
    assert points(axes) == pairs(rows["tokens"], rows["kl"])
    rings = [tuple(np.ravel(line.get_data())) for line in axes.lines if line.get_fillstyle() == "none"]
    assert rings == [(8, 0.1), (0, 0.4)]


def test_nothing_is_smaller_and_better_than_the_steps():
    found = {"int8": [(130, 1.02, 0.0), (100, 1.4, 0.25)], "as loaded": [(500, 1.0, 0.0), (400, 1.3, 0.25)]}
    rows = pd.DataFrame(
        [
            {"form": form, "megabytes": mb, "perplexity_ratio": ratio, "sparsity": s, "domain": domain}
            for domain in DOMAINS
            for form, points_of in found.items()
            for mb, ratio, s in points_of
        ]
    )
    rows["ci_low"], rows["ci_high"] = 0.9 * rows["perplexity_ratio"], 1.1 * rows["perplexity_ratio"]
    for axes in megabytes(rows).axes:
        steps = axes.lines[0]
        assert pairs(*steps.get_data(orig=True)) == {(100, 1.4), (130, 1.02), (500, 1.0)}
        assert {(400, 1.3)} < points(axes)
        assert [t.get_text() for t in axes.texts] == ["25 %"] * 2
