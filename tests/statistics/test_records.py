"""Statistics of two texts put together."""

import pytest
import torch
from conftest import capture_quietly
from reference_moments import assert_moments, reference
from tiny_models import random_windows

from mlpreplace.statistics import with_effects
from mlpreplace.statistics.records import MOMENTS, combine


def test_merged_statistics_are_those_of_all_tokens(llama):
    """Two captures without an overlap, and their sum against the stored activations of both."""
    windows = random_windows(16)
    blocks, first = capture_quietly(llama, windows[:8], moments=MOMENTS)
    _, second = capture_quietly(llama, windows[8:], moments=MOMENTS)
    both = combine(first, second)
    fitting = torch.cat([windows[:6], windows[8:14]])
    for block in blocks:
        assert both[block].tokens == fitting.numel()
        assert_moments(both[block], reference(llama, block, fitting))
        for part in ("train", "validation"):
            a, b, ab = (getattr(s[block], part) for s in (first, second, both))
            assert torch.equal(ab.x, torch.cat([a.x, b.x])) and torch.equal(ab.y, torch.cat([a.y, b.y]))
            assert ab.tokens == a.tokens + b.tokens
        assert first[block].tokens == windows[:6].numel()  # neither is changed
        assert_moments(first[block], reference(llama, block, windows[:6]))


def test_a_sample_of_one_alone_stays(llama, windows):
    blocks, first = capture_quietly(llama, windows)
    _, second = capture_quietly(llama, random_windows(4, seed=1), sample_windows=0, validation_windows=0)
    for both in (combine(first, second), combine(second, first)):
        assert both[blocks[0]].train is first[blocks[0]].train and both[blocks[0]].validation is first[blocks[0]].validation


def test_samples_of_different_lengths_are_not_merged(llama, windows):
    _, first = capture_quietly(llama, windows)
    _, second = capture_quietly(llama, windows[:, :8])
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp are of windows of different lengths, 12 and 8"):
        combine(first, second)


def test_effects_do_not_add_up(llama, windows):
    blocks, first = capture_quietly(llama, windows)
    felt = with_effects(first, {blocks[0]: torch.ones(blocks[0].intermediate_size)})
    with pytest.raises(ValueError, match="effects, which do not add up"):
        combine(felt, first)


@pytest.mark.parametrize("change", ["blocks", "moments"])
def test_statistics_of_different_things_are_not_merged(change, llama, windows):
    blocks, first = capture_quietly(llama, windows)
    _, second = capture_quietly(llama, windows, moments=("input",))
    if change == "blocks":
        second = {blocks[0]: first[blocks[0]]}
    with pytest.raises(ValueError, match=f"different {change}"):
        combine(first, second)
