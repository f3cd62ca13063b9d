"""Block-wise training: it improves on the closed form or returns it, repeats itself to the bit, and survives being killed."""

import importlib
import json
import os
import signal
import time

import pytest
import torch
from conftest import capture_quietly, sample_of
from forked import SERVER
from tiny_models import build, random_windows

from mlpreplace import ConvMLP, LowRank, NarrowMLP, Training, TwoLayerMLP, fit
from mlpreplace.fitting import state
from mlpreplace.fitting.errors import sample_errors
from mlpreplace.fitting.fit import fit_all
from mlpreplace.fitting.training import learning_rate_at

FAST = dict(epochs=3, batch_tokens=16, check_tokens=64, learning_rate=5e-3)
PAIRS = dict(sample_windows=None, validation_windows=8)


@pytest.fixture(scope="module")
def pairs():
    """(blocks, statistics) of the tiny Llama with every window sampled."""
    return capture_quietly(build("llama"), random_windows(40), moments=("input", "hidden", "cross"), **PAIRS)


def weights(replacement) -> dict[str, torch.Tensor]:
    return replacement.body.state_dict()


def same(one, other) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def reference(replacement, sample, loss: str, energy: float) -> float:
    """The objective, token by token in float64."""
    g, y = replacement(sample.x).double()[sample.mask], sample.y.double()[sample.mask]
    mse = ((g - y) ** 2).sum(-1).mean() / energy
    cosine = 1 - ((g * y).sum(-1) / (g.norm(dim=-1) * y.norm(dim=-1))).mean()
    return {"mse": mse, "cosine": cosine, "both": mse + cosine}[loss].item()


@pytest.mark.parametrize("loss", ["mse", "cosine", "both"])
def test_training_improves_on_its_start(loss, pairs):
    blocks, stats = pairs
    s = stats[blocks[1]]
    energy = s.train.y.double().square().sum(-1).mean().item()
    start = fit(blocks[1], stats, NarrowMLP(16))
    small = fit(blocks[1], stats, NarrowMLP(16), training=Training(loss, **FAST))
    curve = small.report.training.validation_curve
    assert curve[0] == pytest.approx(reference(start, s.validation, loss, energy), rel=1e-4)
    assert min(curve) == pytest.approx(reference(small, s.validation, loss, energy), rel=1e-4)
    assert min(curve) < 0.98 * curve[0]
    assert small.report.training.improved and small.report.training.stopped == "finished"
    first = s.train.head(5)  # 60 tokens of the 64 between two checks; the other 4 are of the next window
    assert small.report.training.train_curve[0] == pytest.approx(reference(start, first, loss, energy), rel=0.1)
    assert small.report.training.curve_tokens[0] == 0
    assert not any(p.requires_grad for p in small.parameters())


def test_the_squared_error_is_that_of_the_report(pairs):
    """Of the training sample's energy; on the training sample itself that is the pooled error."""
    blocks, stats = pairs
    start = fit(blocks[0], stats, NarrowMLP(16))
    small = fit(blocks[0], stats, NarrowMLP(16), training=Training(**FAST | {"check_tokens": 10**6}))
    everything = sample_errors(start, stats[blocks[0]].train)
    assert small.report.training.train_curve[0] == pytest.approx(everything.pooled, rel=1e-4)
    assert start.report.train == sample_errors(start, stats[blocks[0]].train.head(8))
    assert small.report.validation.pooled < start.report.validation.pooled


@pytest.mark.parametrize(("rate", "stopped"), [(30.0, "early"), (1e30, "diverged")])
def test_a_training_that_does_not_help_returns_its_start(rate, stopped, pairs):
    blocks, stats = pairs
    how = Training(**FAST | {"learning_rate": rate, "patience": 2})
    small = fit(blocks[1], stats, NarrowMLP(16), training=how)
    report = small.report.training
    assert (report.improved, report.best_check, report.stopped) == (False, 0, stopped)
    assert same(small, fit(blocks[1], stats, NarrowMLP(16)))


def test_the_best_check_is_kept_when_later_ones_are_worse(pairs):
    """Few pairs, many epochs, a rate that stays high: the validation loss turns upwards."""
    blocks, _ = pairs
    few = capture_quietly(build("llama"), random_windows(10), **PAIRS)[1]
    how = Training(epochs=200, batch_tokens=8, check_tokens=64, learning_rate=3e-2, patience=4)
    report = fit(blocks[1], few, TwoLayerMLP(60), training=how).report.training
    assert report.stopped == "early"
    assert len(report.validation_curve) - 1 - report.best_check == how.patience
    assert report.steps * 8 == report.curve_tokens[-1] < 200 * 24


def test_same_seed_same_bits(pairs):
    blocks, stats = pairs
    how = Training(**FAST)
    one = fit(blocks[1], stats, NarrowMLP(16), training=how, seed=3)
    torch.manual_seed(99)  # nothing hangs on the global generator
    again, other = (fit(blocks[1], stats, NarrowMLP(16), training=how, seed=seed) for seed in (3, 4))
    assert same(one, again) and not same(one, other)
    assert one.report.training.validation_curve == again.report.training.validation_curve


def test_padding_teaches_nothing():
    model, windows = build("llama"), random_windows(20)
    mask = torch.ones_like(windows)
    mask[::2, 7:] = 0
    blocks, stats = capture_quietly(model, windows, mask=mask, sample_windows=None, validation_windows=4)
    clean = fit(blocks[1], stats, NarrowMLP(16), training=Training(**FAST))
    for sample in (stats[blocks[1]].train, stats[blocks[1]].validation):
        sample.x[~sample.mask], sample.y[~sample.mask] = 1e3, -1e3
    assert same(clean, fit(blocks[1], stats, NarrowMLP(16), training=Training(**FAST)))


@pytest.mark.parametrize("part", ["train", "validation"])
def test_padding_before_the_text_is_refused_where_a_family_looks_back(part, llama, windows):
    blocks, stats = capture_quietly(llama, windows, sample_windows=None)
    getattr(stats[blocks[1]], part).mask[0, :3] = False
    assert fit(blocks[1], stats, NarrowMLP(16), training=Training(**FAST)).report.training
    with pytest.raises(ValueError, match=r"layers\.1\.mlp: ConvMLP.*pad calibration windows on the right"):
        fit(blocks[1], stats, ConvMLP(16), training=Training(**FAST))


def test_a_half_precision_block_is_trained_in_single_precision():
    """bfloat16 keeps 8 bits: a step a thousandth the size of a weight would be lost in it."""
    model = build("llama").to(torch.bfloat16)
    blocks, stats = capture_quietly(model, random_windows(40), **PAIRS)
    how = Training(**FAST | {"learning_rate": 1e-4})
    small, start = fit(blocks[1], stats, NarrowMLP(16), training=how), fit(blocks[1], stats, NarrowMLP(16))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.report.training.improved
    curve = small.report.training.validation_curve
    assert len(set(curve)) == len(curve)
    assert small.report.validation.pooled <= start.report.validation.pooled * 1.01


def test_the_learning_rate_warms_up_and_decays():
    how = Training(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate_at(how.learning_rate, how.warmup, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == 1 and rates[-1] < 0.001
    assert learning_rate_at(1.0, 0, 0, 10) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "huber"}, "Unknown loss 'huber'; expected one of mse, cosine, both"),
        ({"epochs": 0}, "epochs > 0, got 0"),
        ({"learning_rate": -1}, "learning_rate > 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate > 0"),
        ({"batch_tokens": 0}, "batch_tokens > 0"),
        ({"patience": 0}, "patience > 0"),
        ({"warmup": 1}, "warmup < 1, got 1"),
    ],
)
def test_options_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        Training(**change)


@pytest.mark.parametrize("missing", ["sample_windows", "validation_windows"])
def test_training_needs_pairs(missing, llama, windows):
    blocks, stats = capture_quietly(llama, windows, **PAIRS | {"validation_windows": 2, missing: 0})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp.*sample_windows=None, validation_windows=4"):
        fit(blocks[1], stats, NarrowMLP(16), training=Training(**FAST))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["train", "validation"])
def test_pairs_that_are_not_finite_are_refused(bad, part, llama, windows):
    blocks, stats = capture_quietly(llama, windows, sample_windows=None)
    getattr(stats[blocks[1]], part).y[0, 3, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        fit(blocks[1], stats, NarrowMLP(16), training=Training(**FAST))


def test_one_token_is_enough_for_a_batch_and_none_is_not(llama, windows):
    blocks, stats = capture_quietly(llama, windows, sample_windows=None)
    s = stats[blocks[1]]
    s.train = sample_of(s.train.x[0, :1], s.train.y[0, :1])
    assert fit(blocks[1], stats, NarrowMLP(16), training=Training(**FAST)).report.training.steps == FAST["epochs"]
    s.train.mask[:] = False
    with pytest.raises(ValueError, match="real tokens"):
        fit(blocks[1], stats, NarrowMLP(16), training=Training(**FAST))


# interrupted and started again


def test_a_cached_training_runs_once(pairs, results, monkeypatch):
    blocks, stats = pairs
    how = Training(**FAST)
    first = fit(blocks[1], stats, NarrowMLP(16), training=how, cached=True)
    assert same(first, fit(blocks[1], stats, NarrowMLP(16), training=how))
    assert len(list(results.iterdir())) == 1, "the checkpoint goes when the result is there"
    monkeypatch.setattr(importlib.import_module("mlpreplace.fitting.fit"), "train", lambda *a, **k: pytest.fail("trained again"))
    again = fit(blocks[1], stats, NarrowMLP(16), training=how, cached=True)
    assert same(first, again) and again.report == first.report
    for change in ({"seed": 1}, {"training": Training(epochs=4)}, {"ridge": 0.1}, {"selection": "random"}):
        with pytest.raises(pytest.fail.Exception):
            fit(blocks[1], stats, NarrowMLP(16), **{"training": how, "cached": True} | change)
    with pytest.raises(pytest.fail.Exception):
        fit(blocks[1], {blocks[1]: stats[blocks[0]]}, NarrowMLP(16), training=how, cached=True)


@pytest.mark.parametrize("checks", [1, 2, 5])
def test_an_interrupted_training_goes_on_where_it_was(checks, pairs, results, monkeypatch):
    blocks, stats = pairs
    how = Training(**FAST)
    whole = fit(blocks[1], stats, NarrowMLP(16), training=how)
    monkeypatch.setattr(state, "PAUSE", 0)  # a checkpoint at every check
    save, seen = state.TrainingState.save, []

    def interrupted(training, entry):
        save(training, entry)
        seen.append(training.step)
        if len(seen) == checks:
            raise KeyboardInterrupt

    monkeypatch.setattr(state.TrainingState, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(blocks[1], stats, NarrowMLP(16), training=how, cached=True)
    resumed = fit(blocks[1], stats, NarrowMLP(16), training=how, cached=True)
    assert seen == sorted(set(seen)), "no check was repeated"
    assert same(whole, resumed)
    for name in ("curve_tokens", "train_curve", "validation_curve", "steps", "stopped"):
        assert getattr(whole.report.training, name) == getattr(resumed.report.training, name)


def trained(cache, path) -> None:
    """One training, cached in ``cache``; its curve and weights are written to ``path``."""
    os.environ["MLPREPLACE_CACHE"] = str(cache)
    torch.set_num_threads(1)
    blocks, stats = capture_quietly(build("llama"), random_windows(40), **PAIRS)
    how = Training(epochs=60, batch_tokens=16, check_tokens=64, patience=10**6)
    small = fit(blocks[1], stats, NarrowMLP(16), training=how, cached=True)
    path.write_text(json.dumps([small.report.training.validation_curve, small.body.down.weight.tolist()]))


def test_a_training_that_was_killed_ends_the_same(results, tmp_path):
    """SIGKILL, twice, in the middle; then the run that is left alone."""

    def start(cache, name):
        process = SERVER.Process(target=trained, args=(cache, tmp_path / name))
        process.start()
        return process

    undisturbed = start(tmp_path / "other", "undisturbed")
    for _ in range(2):
        process, before = start(results.parent, "killed"), checkpoint_time(results)
        while process.is_alive() and checkpoint_time(results) == before:
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was to be killed in the middle"
        assert checkpoint_time(results)
    survivor = start(results.parent, "survivor")
    for process in (undisturbed, survivor):
        process.join(timeout=120)
    assert (tmp_path / "undisturbed").read_text() == (tmp_path / "survivor").read_text()
    assert not (tmp_path / "killed").exists()


def checkpoint_time(results) -> int:
    return max((p.stat().st_mtime_ns for p in results.glob("fit-checkpoint-*.safetensors")), default=0)


# side by side


def test_side_by_side_changes_nothing(pairs):
    blocks, stats = pairs
    families, options = [NarrowMLP(16), LowRank(4)], {"training": Training(**FAST), "progress": False}
    threads = torch.get_num_threads()
    one, two = (fit_all(blocks, stats, families, n_jobs=n, **options) for n in (1, 3))
    assert torch.get_num_threads() == threads
    for block in blocks:
        assert [r.family for r in one[block]] == families
        assert all(r.block_name == block.name for r in one[block])
        assert all(same(a, b) for a, b in zip(one[block], two[block], strict=True))
