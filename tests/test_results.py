"""The common columns say what was removed and what it cost."""

import pytest
from conftest import capture_quietly, random_windows

from mlpreplace import NarrowMLP, Training, compare, fit, perplexity_ratio, splice
from mlpreplace.results import result_rows

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
