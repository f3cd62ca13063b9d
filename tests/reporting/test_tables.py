"""The common columns say what was removed and what it cost."""

import numpy as np
import pytest
from conftest import capture_quietly
from tiny_models import random_windows

from mlpreplace import NarrowMLP, Training, compare, fit, splice
from mlpreplace.evaluation.perplexity import Estimate, Measurement, perplexity_ratio
from mlpreplace.methods.sliding import drop_mlps
from mlpreplace.reporting.tables import matched_rows, result_rows, score_rows

COMMON = {
    "method", "sparsity", "sparsity_achieved", "params_removed_of_total", "domain", "perplexity", "perplexity_ratio",
    "ci_low", "ci_high", "tokens",
}  # fmt: skip


@pytest.fixture
def plans(captured):
    _, blocks, stats = captured
    return {("dense", 0.0): {}, ("narrow", 0.2): {b: fit(b, stats, NarrowMLP(16)) for b in blocks}}


def test_rows_hold_what_was_removed_and_measured(captured, plans):
    model = captured[0]
    measured = compare(model, plans, random_windows(6, seed=3), progress=False)
    dense, narrow = result_rows(model, plans, measured, "somewhere")
    assert set(dense) == set(narrow) and set(narrow) >= COMMON
    assert (dense["perplexity_ratio"], dense["sparsity_achieved"], dense["kl"], dense["blocks_replaced"]) == (1, 0, 0, 0)

    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, splice(model, plans["narrow", 0.2])))
    assert narrow["params_removed_of_total"] == pytest.approx((before - after) / before)
    assert narrow["sparsity_achieved"] > narrow["params_removed_of_total"] > 0
    assert narrow["perplexity_ratio"] == perplexity_ratio(measured["narrow", 0.2], measured["dense", 0.0]).value
    assert narrow["ci_low"] <= narrow["perplexity_ratio"] <= narrow["ci_high"]
    assert (narrow["domain"], narrow["sparsity"], narrow["tokens"]) == ("somewhere", 0.2, 6 * 11)


def test_training_counts_as_fitting(llama):
    how = Training(epochs=1, batch_tokens=8)
    blocks, stats = capture_quietly(llama, random_windows(), sample_windows=None)
    plans = {
        ("dense", 0.0): {},
        ("trained", 0.2): {blocks[0]: fit(blocks[0], stats, NarrowMLP(16), training=how, progress=False)},
    }
    measured = compare(llama, plans, random_windows(2), progress=False)
    report = plans["trained", 0.2][blocks[0]].report
    dense, trained = result_rows(llama, plans, measured, "somewhere")
    assert dense["fit_seconds"] == 0 < report.training.seconds
    assert trained["fit_seconds"] == report.seconds + report.training.seconds


def test_there_is_one_dense_model(captured, plans):
    model = captured[0]
    measured = compare(model, plans, random_windows(2), progress=False)
    with pytest.raises(ValueError, match="one empty plan"):
        result_rows(model, {("narrow", 0.2): plans["narrow", 0.2]}, measured, "somewhere")


def test_methods_are_set_beside_another_at_the_sparsity_that_they_reached():
    """At a sparsity that it was measured at by its own losses, between two by the line between them, beyond them not at all."""
    of_window = np.array([90.0, 110.0, 100.0])

    def losses(*cost):
        return Measurement(of_window + np.array(cost), np.full(3, 50))

    measured = {
        ("dense", 0.0): (0.0, losses(0, 0, 0)),
        ("ours", 0.19): (0.2, losses(2, 4, 3)),
        ("ours", 0.4): (0.4, losses(10, 20, 15)),
        ("same", 0.2): (0.2, losses(4, 8, 3)),
        ("between", 0.2): (0.25, losses(4, 9, 2)),
        ("less", 0.2): (0.1, losses(1, 2, 1.5)),
        ("more", 0.4): (0.41, losses(10, 20, 15)),
    }
    rows = [
        {"method": m, "sparsity": s, "sparsity_achieved": reached, "domain": domain}
        for domain in ("somewhere", "elsewhere")
        for (m, s), (reached, _) in measured.items()
    ]
    labelled = {(*label, d): found for label, (_, found) in measured.items() for d in ("somewhere", "elsewhere")}
    found = matched_rows(rows, labelled, "ours")
    assert [{k: r[k] for k in rows[0]} for r in found] == rows
    of = {r["method"]: r for r in found[: len(measured)] if r["sparsity"] != 0.4 or r["method"] == "more"}
    expected = {"dense": losses(0, 0, 0), "ours": losses(2, 4, 3), "same": losses(2, 4, 3)}
    expected |= {"between": losses(4, 8, 6), "less": losses(1, 2, 1.5)}
    for m, other in expected.items():
        ratio = perplexity_ratio(labelled[m, of[m]["sparsity"], "somewhere"], other)
        got = [of[m][f"matched_{end}"] for end in ("ratio", "low", "high")]
        assert got == pytest.approx([ratio.value, ratio.low, ratio.high], rel=1e-12)
    assert of["less"]["matched_low"] == pytest.approx(1) and of["same"]["matched_ratio"] > 1
    assert [of["more"][f"matched_{end}"] for end in ("ratio", "low", "high")] == [None] * 3


def test_rows_of_scores_hold_what_was_to_be_saved_and_what_was(captured):
    model, blocks, _ = captured
    saved = 1 / len(blocks)
    plans = {("dense", 0.0, False): {}, ("dropped", saved, True): drop_mlps(blocks[:1])}
    scores = {key: Estimate(0.9, 0.8, 1.0, 7) for key in plans}
    about = {"task": "vision", "domain": "somewhere", "measure": "accuracy"}
    dense, dropped = score_rows(model, blocks, plans, scores, **about)
    assert dense | about == dense and set(dense) == set(dropped)
    assert (dense["sparsity"], dense["sparsity_achieved"]) == (0, 0) and (dense["score"], dense["tokens"]) == (0.9, 7)
    assert dropped["sparsity"] == pytest.approx(dropped["sparsity_achieved"])  # blocks of equal size
    of_total = blocks[0].n_params / sum(p.numel() for p in model.parameters())
    assert dropped["params_removed_of_total"] == pytest.approx(of_total)
    assert (dropped["method"], dropped["saved"], dropped["tuned"]) == ("dropped", saved, True)
    with pytest.raises(KeyError):
        score_rows(model, blocks, plans, {}, **about)
