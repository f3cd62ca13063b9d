"""What fit() and fit_all() return and report, and the tidy rows of it."""

import pytest
import torch
from conftest import capture_quietly, sample_of, statistics_of
from tiny_models import HIDDEN, INTERMEDIATE, build, random_windows
from torch.utils._python_dispatch import TorchDispatchMode

from mlpreplace import Linear, LowRank, Mean, MixtureOfExperts, NarrowMLP, NarrowPlusLinear, Training, find_blocks, fit
from mlpreplace.fitting.fit import fit_all, unfitted
from mlpreplace.replacements.families import ladder
from mlpreplace.replacements.narrow_attention import NarrowAttention
from mlpreplace.reporting.tables import loss_rows, report_rows
from mlpreplace.statistics.moments import sample

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
    for pairs, errors in ((stats[blocks[1]].train, report.train), (stats[blocks[1]].validation, report.validation)):
        error = (small(pairs.x) - pairs.y).double().square().sum(-1).flatten()
        energy = pairs.y.double().square().sum(-1).flatten()
        relative = error / energy
        q25, median, q75 = relative.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        damage = (error / pairs.residual_energy.flatten()).mean()
        g, y = (t.double().flatten(0, 1) for t in (small(pairs.x), pairs.y))
        cosine = 1 - ((g * y).sum(1) / (g.norm(dim=1) * y.norm(dim=1))).mean()
        expected = [relative.mean(), median, q25, q75, error.sum() / energy.sum(), damage, cosine]
        got = [errors.mean, errors.median, errors.q25, errors.q75, errors.pooled, errors.damage, errors.cosine]
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


def test_rows_of_further_splits_measure_them(captured):
    model, blocks, stats = captured
    heldout = sample(model, blocks, random_windows(3, seed=5), progress=False)
    fitted = fit_all(blocks, stats, FAMILIES, progress=False)
    rows = report_rows(fitted, heldout=heldout)
    assert {row["split"] for row in rows} == {"train", "validation", "heldout"}
    row = next(r for r in rows if (r["layer"], r["family"], r["split"]) == (2, "NarrowMLP", "heldout"))
    s = heldout[blocks[2]]
    error = (fitted[blocks[2]][3](s.x) - s.y).square().sum(-1) / s.y.square().sum(-1)
    assert row["mean"] == pytest.approx(error.mean().item(), rel=1e-4)


def test_rows_tell_training_and_active_parameters(captured):
    _, blocks, stats = captured
    how = Training(epochs=2, batch_tokens=8, check_tokens=24)
    fitted = fit_all(blocks[:1], stats, [NarrowMLP(24), MixtureOfExperts(8)], training=how, progress=False)
    fitted[blocks[0]].append(fit(blocks[0], stats, Mean()))
    narrow, experts, mean = (r for r in report_rows(fitted) if r["split"] == "validation")
    assert (narrow["trained"], mean["trained"], mean["improved"]) == ("mse", None, None)
    assert narrow["active_share_of_block"] == narrow["share_of_block"]
    assert experts["active_share_of_block"] < 0.3 * experts["share_of_block"]
    training = fitted[blocks[0]][0].report.training
    assert narrow["fit_seconds"] > training.seconds
    curves = [r for r in loss_rows(fitted) if r["family"] == "NarrowMLP"]
    assert [r["validation_loss"] for r in curves] == training.validation_curve
    assert [r["curve_tokens"] for r in curves] == [0, 24, 48]
    assert not any(r["family"] == "Mean" for r in loss_rows(fitted))


# ranked


@pytest.mark.parametrize("training", [None, Training(epochs=1, batch_tokens=8)])
def test_candidates_come_ranked_by_validation_error(training, captured):
    _, blocks, stats = captured
    families = [LowRank(16), NarrowMLP(11), Linear()]
    ranked = fit(blocks[1], stats, families, training=training)
    damages = [r.report.validation.damage for r in ranked]
    assert damages == sorted(damages)
    assert {r.family for r in ranked} == set(families)
    best = fit(blocks[1], stats, ranked[0].family, training=training)
    assert best.report.validation == ranked[0].report.validation


def test_a_ladder_of_one_share_can_be_ranked(captured):
    _, blocks, stats = captured
    ranked = fit(blocks[1], stats, ladder(blocks[1], [0.2], [LowRank, NarrowMLP]))
    assert len(ranked) == 2


def test_candidates_of_unequal_size_are_not_ranked(captured):
    _, blocks, stats = captured
    with pytest.raises(ValueError, match=r"equal size.*NarrowMLP\(width=11\): 1,056, NarrowMLP\(width=24\): 2,304"):
        fit(blocks[1], stats, [NarrowMLP(11), NarrowMLP(24)])


@pytest.mark.parametrize("lacking", ["windows", "samples"])
def test_a_ranking_needs_a_validation_error(lacking, llama, windows):
    blocks, stats = capture_quietly(llama, windows, validation_windows=0 if lacking == "windows" else 2)
    options = {"samples": ("train",)} if lacking == "samples" else {}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp: ranking goes by validation error"):
        fit(blocks[1], stats, [LowRank(16), NarrowMLP(11)], **options)


def test_no_candidate_at_all(captured):
    _, blocks, stats = captured
    with pytest.raises(ValueError, match="no family"):
        fit(blocks[1], stats, [])


def test_fit_all_names_every_block_that_was_not_captured(captured):
    _, blocks, stats = captured
    with pytest.raises(ValueError, match=r"layers\.0\.mlp, model\.layers\.2\.mlp"):
        fit_all(blocks, {blocks[1]: stats[blocks[1]]}, [Mean()])


def test_an_error_in_one_fit_reaches_the_caller_and_threads_return(captured):
    _, blocks, stats = captured
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match=r"width=0 does not fit model\.layers\.\d\.mlp"):
            fit_all(blocks, stats, [NarrowMLP(0)], progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"selection": "magnitude"},
            "Unknown selection .magnitude.; expected one of auto, energy, fluctuation, leverage, .*, random",
        ),
        ({"ridge": -1.0}, "ridge ≥ 0, got -1.0"),
        ({"ridge": float("nan")}, "ridge ≥ 0, got nan"),
        ({"samples": ("heldout",)}, "Unknown samples .'heldout'.; expected some of train, validation"),
    ],
)
def test_options_that_make_no_sense(change, message, captured):
    _, blocks, stats = captured
    with pytest.raises(ValueError, match=message):
        fit(blocks[1], stats, NarrowMLP(24), **change)


class Written(TorchDispatchMode):
    """The memory that operations wrote into; to see some of it as another shape writes nothing."""

    def __init__(self):
        super().__init__()
        self.places: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, seen_only = function(*args, **(kwargs or {})), [r.alias_info is not None for r in function._schema.returns]
        in_place = function._schema.is_mutable
        if isinstance(result, torch.Tensor) and (in_place or not any(seen_only)) and "empty" not in str(function):
            self.places.add(result.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_fitted_yet_are_not_written(dtype):
    """Memory that nothing wrote into is not taken: a plan of an 8B model is made before its first fit."""
    model = build("llama").to(dtype)
    mlp, attention = find_blocks(model)[0], find_blocks(model, "attention")[0]
    pairs = [(mlp, NarrowMLP(24)), (mlp, NarrowPlusLinear(12, 4)), (attention, LowRank(4)), (attention, NarrowAttention(2, 2, 4))]
    for block, family in pairs:
        with Written() as written:
            replacement = unfitted(family, block)
        assert {p.dtype for p in replacement.parameters()} == {dtype}
        matrices = [p for p in replacement.parameters() if p.dim() == 2]
        assert matrices and not written.places & {p.untyped_storage().data_ptr() for p in matrices}, family
