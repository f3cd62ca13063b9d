"""A cached capture is the capture, and is used for nothing else."""

import pytest
import torch
from conftest import capture_quietly, fail_after
from tiny_models import random_windows

from mlpreplace.statistics.records import SUMS


def forbid_forward(monkeypatch) -> None:
    """Not by a forward of the model's own, which would be in the key."""
    monkeypatch.setattr(torch.nn.functional, "embedding", fail_after(0, None, AssertionError("the model ran")))


def assert_identical(statistics, again) -> None:
    assert statistics.keys() == again.keys()
    for block, s in statistics.items():
        assert s.tokens == again[block].tokens
        for name in SUMS:
            first, second = getattr(s, name), getattr(again[block], name)
            assert first is second is None or torch.equal(first, second)
        for part in ("train", "validation"):
            for first, second in zip(vars(getattr(s, part)).values(), vars(getattr(again[block], part)).values(), strict=True):
                assert first is second is None or (torch.equal(first, second) and first.dtype == second.dtype)


@pytest.mark.parametrize("options", [{}, {"moments": ("input",)}])
def test_a_cached_capture_is_the_capture_and_runs_no_model(options, llama, windows, results, monkeypatch):
    _, plain = capture_quietly(llama, windows, **options)
    _, first = capture_quietly(llama, windows, cached=True, **options)
    forbid_forward(monkeypatch)
    _, second = capture_quietly(llama, windows, cached=True, **options)
    assert_identical(plain, first)
    assert_identical(plain, second)


@pytest.mark.parametrize(
    "change",
    ["weights", "windows", "mask", "moments", "validation_windows", "sample_windows"],
)
def test_a_cached_capture_is_not_used_for_something_else(change, llama, windows, results, monkeypatch):
    capture_quietly(llama, windows, cached=True)
    options = {
        "mask": {"mask": torch.ones_like(windows)},
        "moments": {"moments": ("input",)},
        "validation_windows": {"validation_windows": 3},
        "sample_windows": {"sample_windows": 1},
    }.get(change, {})
    if change == "weights":
        llama.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    if change == "windows":
        windows = random_windows(seed=1)
    forbid_forward(monkeypatch)
    with pytest.raises(AssertionError, match="the model ran"):
        capture_quietly(llama, windows, cached=True, **options)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_cache_file_is_computed_anew(damage, llama, windows, results, monkeypatch):
    _, first = capture_quietly(llama, windows, cached=True)
    (file,) = results.iterdir()
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"\xff" * 100}[damage])
    _, again = capture_quietly(llama, windows, cached=True)
    assert_identical(first, again)
    forbid_forward(monkeypatch)
    assert_identical(first, capture_quietly(llama, windows, cached=True)[1])
