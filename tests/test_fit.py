"""What fit() and fit_all() return and report, and the tidy rows of it."""

import pytest
import torch
from conftest import HIDDEN, INTERMEDIATE, capture_quietly, sample_of, statistics_of

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, find_blocks, fit, fit_all, report_rows

FAMILIES = [Mean(), Linear(), LowRank(4), NarrowMLP(24)]


def test_a_block_that_was_not_captured_is_named(llama, windows, captured):
    _, blocks, stats = captured
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp is not in the statistics"):
        fit(blocks[2], {blocks[0]: stats[blocks[0]]}, Linear())


def test_the_report_holds_the_errors_of_the_samples(captured):
    _, blocks, stats = captured
    small = fit(blocks[1], stats, NarrowMLP(24))
    report = small.report
    assert report.tokens == stats[blocks[1]].tokens == 72
    assert report.seconds > 0
    for sample, errors in ((stats[blocks[1]].train, report.train), (stats[blocks[1]].validation, report.validation)):
        error = (small(sample.x) - sample.y).double().square().sum(-1).flatten()
        energy = sample.y.double().square().sum(-1).flatten()
        relative = error / energy
        q25, median, q75 = relative.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        damage = (error / sample.residual_energy.flatten()).mean()
        expected = [relative.mean(), median, q25, q75, error.sum() / energy.sum(), damage]
        got = [errors.mean, errors.median, errors.q25, errors.q75, errors.pooled, errors.damage]
        assert got == pytest.approx([float(e) for e in expected], rel=1e-4)


def test_padding_is_in_no_error(llama):
    """A block that doubles its input, and outputs of padding that no map of the input has."""
    block = find_blocks(llama)[1]
    x = torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stats = statistics_of(x, 2 * x)
    stats.validation = sample_of(x[:20], 2 * x[:20])
    stats.validation.y[:, 10:] = 1e6
    stats.validation.mask[:, 10:] = False
    assert fit(block, {block: stats}, Linear(), ridge=1e-10).report.validation.pooled < 1e-9


def test_without_validation_windows_there_is_no_validation_error(llama, windows):
    blocks, stats = capture_quietly(llama, windows, validation_windows=0)
    report = fit(blocks[0], stats, Mean()).report
    assert report.validation is None
    assert report.train is not None


def test_fit_all_is_every_fit_in_order(captured):
    _, blocks, stats = captured
    fitted = fit_all(blocks[:2], stats, FAMILIES, progress=False)
    assert list(fitted) == blocks[:2]
    for b, replacements in fitted.items():
        assert [r.family for r in replacements] == FAMILIES
        assert all(r.block_name == b.name for r in replacements)
        alone = fit(b, stats, FAMILIES[1])
        assert torch.equal(alone.body.weight, replacements[1].body.weight)


def test_report_rows_are_tidy(captured):
    _, blocks, stats = captured
    fitted = fit_all(blocks, stats, FAMILIES, progress=False)
    rows = report_rows(fitted)
    assert len(rows) == len(blocks) * len(FAMILIES) * 2
    keys = {(row["layer"], row["label"], row["split"]) for row in rows}
    assert len(keys) == len(rows)
    row = next(r for r in rows if (r["layer"], r["family"], r["split"]) == (1, "NarrowMLP", "validation"))
    small = fitted[blocks[1]][3]
    assert row["median"] == small.report.validation.median
    assert row["share_of_block"] == pytest.approx(24 / INTERMEDIATE)
