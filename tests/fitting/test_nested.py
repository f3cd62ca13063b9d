"""The projection that all levels of a nested MLP share: solved for the sum of their errors, each over its own least."""

import pytest
import torch
from conftest import activations, capture_quietly
from tiny_models import INTERMEDIATE, build, random_windows
from torch.testing import assert_close

from mlpreplace import NarrowMLP, capture, find_blocks, fit, load_windows
from mlpreplace.fitting.errors import sample_errors
from mlpreplace.planning.nest import narrowed
from mlpreplace.replacements.nested import NestedMLP

TINY = 1e-10  # a ridge that only keeps the solver defined
LEVELS = ((0.1, 40), (0.2, 24), (0.4, 12))
WITH_DENSE = ((0, INTERMEDIATE), *LEVELS)


def errors(model, block, windows, bodies) -> list[float]:
    """Squared output error of each module on ``windows``, over that of a block of zeros."""
    a = activations(model, block, windows)
    return [((body(a["x"].float()).double() - a["y"]).square().sum() / a["y"].square().sum()).item() for body in bodies]


@pytest.mark.parametrize("selection", ["energy", "leverage", "obs"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_level_is_the_closed_form_of_its_narrow_mlp(name, selection):
    model = build(name)
    blocks, stats = capture_quietly(model, random_windows(16))
    for b in blocks:
        nested, alone = (fit(b, stats, f, selection=selection).body for f in (NestedMLP(((0.2, 24),)), NarrowMLP(24)))
        order = [int((alone.up.weight == row).all(1).nonzero()) for row in nested.up]
        assert sorted(order) == list(range(24))
        assert_close(nested.down, alone.down.weight[:, order], rtol=1e-4, atol=1e-5)
        if alone.down.bias is not None:
            assert_close(nested.down_bias[0], alone.down.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_neurons_stand_in_order_of_importance(name):
    """Every level has the neurons that a NarrowMLP of its width would keep."""
    model = build(name)
    blocks, stats = capture_quietly(model, random_windows(16))
    for b in blocks:
        up = fit(b, stats, NestedMLP(LEVELS)).body.up
        for _, k in LEVELS:
            kept = fit(b, stats, NarrowMLP(k)).body.up.weight
            assert {tuple(row.tolist()) for row in up[:k]} == {tuple(row.tolist()) for row in kept}


@pytest.mark.parametrize("levels", [LEVELS, WITH_DENSE], ids=["narrow", "with dense"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_sharing_costs_less_than_cutting_the_widest_fit_off(name, levels):
    """On the fitting tokens, relative to fits of each level alone, which are the least there is."""
    model, windows = build(name), random_windows(24)
    blocks, stats = capture_quietly(model, windows)
    narrow = [k for _, k in LEVELS]
    for b in blocks:
        r = fit(b, stats, NestedMLP(levels), ridge=TINY)
        shared = errors(model, b, windows[:22], [r.body for r in (narrowed({b: r}, s)[b] for s, _ in LEVELS)])
        alone = [fit(b, stats, NestedMLP(((0.1, k),)), ridge=TINY) for k in narrow]
        least = errors(model, b, windows[:22], [one.body for one in alone])
        cut = [narrowed({b: alone[0]}, 0.1)[b].body for _ in narrow]
        for body, k in zip(cut, narrow, strict=True):
            body.down.weight[:, k:] = 0
            if body.down.bias is not None:  # what the cut neurons gave in the mean
                h = activations(model, b, windows[:22])["x"].float()
                body.down.bias += alone[0].body.down[:, k:] @ cut[0].neurons(h).mean(0)[k:]
        cut = errors(model, b, windows[:22], cut)
        assert all(a < s * (1 + 1e-6) for a, s in zip(least, shared, strict=True))
        assert sum(s / a for s, a in zip(shared, least, strict=True)) < sum(c / a for c, a in zip(cut, least, strict=True))
        assert max(s / a for s, a in zip(shared, least, strict=True)) < max(c / a for c, a in zip(cut, least, strict=True))
        assert cut[0] == pytest.approx(least[0], rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_shared_projection_is_where_the_weighted_errors_are_least(name):
    """No step away from it lowers Σ e_k / e_k alone on the fitting tokens."""
    model, windows = build(name), random_windows(24)
    blocks, stats = capture_quietly(model, windows)
    b = blocks[1]
    r = fit(b, stats, NestedMLP(LEVELS), ridge=TINY)
    least = errors(model, b, windows[:22], [fit(b, stats, NestedMLP(((0.1, k),)), ridge=TINY).body for _, k in LEVELS])

    def objective() -> float:
        bodies = [narrowed({b: r}, s)[b].body for s, _ in LEVELS]
        return sum(e / a for e, a in zip(errors(model, b, windows[:22], bodies), least, strict=True))

    here, down = objective(), r.body.down.clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        r.body.down.copy_(down + 1e-2 * down.std() * torch.randn(down.shape, generator=generator))
        assert objective() > here


@pytest.mark.bundled
def test_sharing_costs_little_on_unseen_text(bundled):
    """Validation error of each level over that of a fit of its own, within a quarter; unweighted, the widest has 1.6 times."""
    model, tokenizer = bundled
    block = find_blocks(model)[5]
    windows = load_windows("bundled/wiki", tokenizer, split="calibration", seq_len=256, n_windows=10)
    stats = capture(model, [block], windows, moments=["hidden"], validation_windows=2, progress=False)
    levels = ((0.125, 1280), (0.25, 1024), (0.375, 768))
    plan = {block: fit(block, stats, NestedMLP(levels), samples=())}
    for s, k in levels:
        alone = fit(block, stats, NarrowMLP(k), samples=["validation"]).report.validation.damage
        assert sample_errors(narrowed(plan, s)[block], stats[block].validation).damage < 1.25 * alone
