"""Errors of many sizes from one factorisation are those of fits of every size."""

import pytest
import torch
from conftest import capture_quietly
from tiny_models import INTERMEDIATE, build, random_windows

from mlpreplace import ConvMLP, LowRank, Mean, NarrowMLP, NarrowPlusLinear, find_blocks, fit
from mlpreplace.fitting.candidate_errors import candidate_errors
from mlpreplace.fitting.neurons import ClosedForm

TINY_RIDGE = 1e-9  # the fit of one width has a ridge of its own, so that only without one the errors are the same
WIDTHS = [NarrowMLP(width) for width in (8, INTERMEDIATE, 24, 40)]


def case(name: str = "llama"):
    """(block, its statistics, inputs, outputs) in float64, where nothing is rounded that matters."""
    model = build(name).double()
    blocks = find_blocks(model)
    _, stats = capture_quietly(model, random_windows(40), moments=("input", "hidden", "cross"))
    block = blocks[1]
    s = stats[block]
    return block, s, s.validation.x, s.validation.y


def own_errors(block, s, x, y, candidates, how):
    fits = dict(ridge=how.ridge, selection=how.selection, seed=how.seed, samples=())
    return [fit(block, {block: s}, family, **fits)(x) - y for family in candidates]


@pytest.mark.parametrize("selection", ["energy", "leverage", "random", "obs"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_narrow_errors_are_those_of_the_fits(name, selection):
    block, s, x, y = case(name)
    how = ClosedForm(TINY_RIDGE, selection, seed=3)
    found = dict(candidate_errors(block, WIDTHS, s, x, y, how))
    assert sorted(found) == list(range(len(WIDTHS)))
    for i, expected in enumerate(own_errors(block, s, x, y, WIDTHS, how)):
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)


def test_other_families_and_fitted_replacements_too(gpt2):
    block, s, x, y = case()
    candidates = [Mean(), LowRank(3), NarrowPlusLinear(16, 4), LowRank(12), NarrowMLP(24), ConvMLP(16)]
    own = own_errors(block, s, x, y, candidates, ClosedForm(TINY_RIDGE))
    fitted = fit(block, {block: s}, NarrowMLP(12), samples=())
    found = dict(candidate_errors(block, [fitted, *candidates], s, x, y, ClosedForm(TINY_RIDGE)))
    for i, expected in enumerate([fitted(x) - y, *own]):
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)


def test_the_ridge_of_one_factor_changes_errors_little():
    """With the ridge of fits, errors of narrow widths differ by a few per cent of their size."""
    block, s, x, y = case()
    how = ClosedForm()
    found = dict(candidate_errors(block, WIDTHS, s, x, y, how))
    for i, expected in enumerate(own_errors(block, s, x, y, WIDTHS, how)):
        assert (found[i] - expected).norm() <= 0.1 * expected.norm() + 1e-9


def test_families_need_statistics():
    block, _, x, y = case()
    with pytest.raises(ValueError, match=r"NarrowMLP\(width=8\) is to be fitted"):
        list(candidate_errors(block, WIDTHS, None, x, y))


def test_a_size_that_does_not_fit_is_refused():
    block, s, x, y = case()
    for family in (NarrowMLP(INTERMEDIATE + 1), LowRank(1000)):
        with pytest.raises(ValueError, match="does not fit"):
            list(candidate_errors(block, [family], s, x, y))
