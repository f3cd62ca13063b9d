"""Block-wise training where memory or disk is short: parts of a minibatch, pairs on the device, checkpoints now and then."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import capture_quietly
from tiny_models import build, random_windows

from mlpreplace import ConvMLP, NarrowMLP, Training, fit
from mlpreplace.fitting import pairs, state
from mlpreplace.fitting.pairs import Pairs
from mlpreplace.fitting.training import train

HOW = Training(epochs=6, batch_tokens=48, check_tokens=96, learning_rate=1e-3)


@pytest.fixture(scope="module")
def case():
    """(blocks, statistics) of the tiny Llama with every window sampled, the last tokens of some windows not real."""
    windows = random_windows(24)
    mask = torch.ones_like(windows)
    for i, row in enumerate(mask):
        row[i % 12 + 1 :] = 0
    options = dict(sample_windows=None, validation_windows=8, moments=("input", "hidden", "cross"))
    return capture_quietly(build("llama"), windows, mask=mask, **options)


def full(body, most: int) -> list[int]:
    """Let ``body`` have no room for more than ``most`` items; the list of what it was asked for."""
    asked = []

    def enter(module, args):
        asked.append(len(args[0]))
        if asked[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    body.register_forward_pre_hook(enter)
    return asked


@pytest.mark.parametrize(("family", "whole_windows", "most"), [(NarrowMLP(16), False, 20), (ConvMLP(16), True, 1)])
def test_a_training_without_room_for_a_minibatch_runs_it_in_parts(case, family, whole_windows, most):
    """Of tokens, or of windows with unequal numbers of real tokens, which the parts weigh by."""
    blocks, stats = case
    s, one = stats[blocks[1]], copy.deepcopy(fit(blocks[1], stats, family).body)
    other = copy.deepcopy(one)
    options = dict(whole_windows=whole_windows, progress=False)
    expected = train(one, s.train, s.validation, HOW, **options)
    asked = full(other, most)
    with pytest.warns(UserWarning, match=f"going on with [0-9]+ {'window' if whole_windows else 'token'}s at a time"):
        found = train(other, s.train, s.validation, HOW, **options)
    assert found.improved
    for curve in ("train_curve", "validation_curve"):
        assert getattr(found, curve) == pytest.approx(getattr(expected, curve), rel=1e-4)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)
    failed = [i for i, number in enumerate(asked) if number > most]
    assert failed and failed[-1] < len(asked) / 2, "the smaller number stays"


@pytest.mark.parametrize("whole_windows", [False, True])
def test_pairs_move_to_a_device_with_room_once(case, whole_windows, monkeypatch):
    blocks, stats = case
    sample, device = stats[blocks[1]].train, torch.device("meta")
    needed = 2 * (sample.x.nbytes + sample.y.nbytes) if whole_windows else 2 * 2 * int(sample.mask.sum()) * 32 * 4
    for free, expected in ((needed, "meta"), (needed - 1, "cpu"), (None, "cpu")):
        monkeypatch.setattr(pairs, "free_bytes", lambda asked, free=free: free if asked == device else None)
        made = Pairs(sample, "mse", whole_windows, torch.empty((), device=device))
        tensors = [made.x, made.y, *([made.mask] if whole_windows else [])]
        assert {t.device.type for t in tensors} == {expected}
        assert made.energy.device == device


# checkpoints by the time that they take


class Clock:
    """Time that passes as it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(state, "time", clock)
    return clock


def checkpoints(clock, seconds: float, nbytes: float) -> tuple[state.Checkpoints, list[float]]:
    """Checkpoints of a training, each of which takes ``seconds``; and when they were begun."""
    written = []

    def save(entry):
        written.append(clock.now)
        clock.now += seconds

    return state.Checkpoints(object(), SimpleNamespace(save=save, nbytes=nbytes)), written


def test_writing_costs_a_few_per_cent_of_the_time(clock):
    kept, written = checkpoints(clock, seconds=10, nbytes=1e9)
    while clock.now < 10_000:
        clock.now += 7  # of steps, up to a check
        kept.save()
    assert 0.02 * clock.now < 10 * len(written) < 0.05 * clock.now
    assert all(b - a >= 10 * (state.PAUSE + 1) for a, b in zip(written, written[1:], strict=False))


def test_the_first_one_comes_early_where_it_is_small_and_later_where_it_is_large(clock):
    for nbytes, expected in ((1e4, 0.01), (100e9, 2500.0)):
        clock.now = 0.0
        kept, written = checkpoints(clock, seconds=1, nbytes=nbytes)
        while not written:
            clock.now = round(clock.now + 0.01, 2)
            kept.save()
        assert written == [pytest.approx(expected)]


def test_a_tiny_training_leaves_its_first_checkpoint_at_once(case, results):
    blocks, stats = case
    seen = []

    class Seen(Exception):
        pass

    def save(training, entry):
        seen.append(training.step)
        raise Seen

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Seen):
        patch.setattr(state.TrainingState, "save", save)
        fit(blocks[1], stats, NarrowMLP(16), training=Training(epochs=60, batch_tokens=16), cached=True, progress=False)
    assert seen


def test_what_a_checkpoint_takes_is_known_before_it_is_written(case, results, monkeypatch):
    blocks, stats = case
    sizes, save = [], state.TrainingState.save

    def measured(training, entry):
        save(training, entry)
        sizes.append((training.nbytes, entry.path.stat().st_size))

    monkeypatch.setattr(state, "PAUSE", 0)
    monkeypatch.setattr(state.TrainingState, "save", measured)
    fit(blocks[1], stats, NarrowMLP(40), training=HOW, cached=True, progress=False)
    expected, found = sizes[0]
    assert expected == pytest.approx(found, rel=0.2)
