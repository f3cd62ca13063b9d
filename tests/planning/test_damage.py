"""What a candidate costs: the second-order estimate against its own definition and against measured KL."""

from functools import lru_cache
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import capture_quietly
from tiny_models import CAUSAL, INTERMEDIATE, build, random_windows
from torch import nn

from mlpreplace import LowRank, NarrowMLP, capture, compare, find_blocks, fit
from mlpreplace.fitting.fit import fit_all
from mlpreplace.planning.damage import local_damage, measured_damage, second_order_damage
from mlpreplace.replacements import NarrowAttention

WINDOWS = random_windows(4, 10, seed=2)


class Off(nn.Module):
    """A block that errs by ``scale`` times a direction of its own at every token."""

    def __init__(self, block, scale: float):
        super().__init__()
        self.modules_of_block, self.scale = block.modules, scale

    def forward(self, x):
        y = x
        for module in self.modules_of_block:
            y = module(y)
        return y + self.scale * torch.sin(torch.arange(y.shape[-1]) + x[..., :1])


@lru_cache
def case():
    """(model, blocks, candidates) of the tiny Llama."""
    model = build("llama")
    blocks, stats = capture_quietly(model, random_windows())
    return model, blocks, fit_all(blocks, stats, [NarrowMLP(12), NarrowMLP(36), NarrowMLP(INTERMEDIATE)], progress=False)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_second_order_damage_is_quadratic_in_the_error(name):
    model = build(name)
    candidates = {block: [Off(block, scale) for scale in (0, 0.01, 0.02, -0.04)] for block in find_blocks(model)}
    damages = second_order_damage(model, candidates, WINDOWS, seed=5, progress=False)
    for none, once, twice, opposite in damages.values():
        assert none == pytest.approx(0, abs=1e-9)
        assert once > 0
        assert (twice / once, opposite / once) == pytest.approx((4, 16), rel=1e-3)


def test_errors_of_two_blocks_are_felt_together():
    """(a + b)² + (a − b)² = 2a² + 2b², and an error twice in one place is one error of twice the size."""
    model = build("llama")
    blocks = find_blocks(model)
    candidates = {block: [Off(block, scale) for scale in (0.01, -0.01, 0.02)] for block in blocks}
    damages = second_order_damage(model, candidates, WINDOWS, progress=False)
    a, b, *_ = blocks
    assert damages.together({a: 0}) == pytest.approx(damages[a][0])
    both, against = damages.together({a: 0, b: 0}), damages.together({a: 0, b: 1})
    assert both + against == pytest.approx(2 * (damages[a][0] + damages[b][0]), rel=1e-4)
    assert abs(both - against) > 1e-3 * both
    assert damages.together({a: 2, b: 2}) == pytest.approx(4 * both, rel=1e-3)


def test_cached_damages_are_not_computed_again(results, monkeypatch):
    model, _, candidates = case()
    damages = second_order_damage(model, candidates, WINDOWS, cached=True, progress=False)

    def fail(*args, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(import_module("mlpreplace.planning.damage"), "fisher_gradients", fail)
    assert second_order_damage(model, candidates, WINDOWS, cached=True, progress=False) == damages
    with pytest.raises(AssertionError, match="again"):
        second_order_damage(model, candidates, WINDOWS, seed=1, cached=True, progress=False)


def test_a_replica_does_no_damage():
    model, blocks, candidates = case()
    damages = second_order_damage(model, candidates, WINDOWS, progress=False)
    for block in blocks:
        narrow, wide, replica = damages[block]
        assert narrow > wide > 1e5 * abs(replica)


def test_for_two_tokens_and_small_errors_it_is_the_measured_divergence():
    """One token is predicted, so no product of two tokens' errors is left out: what remains is the sampling error, known from
    a few seeds, and the divergence's third order.
    """
    model, blocks, _ = case()
    windows = random_windows(3000, 2, seed=8)
    _, stats = capture_quietly(model, random_windows())
    candidates = fit_all(blocks, stats, [NarrowMLP(INTERMEDIATE)], progress=False)
    for i, (replica,) in enumerate(candidates.values()):
        noise = torch.randn(replica.body.down.weight.shape, generator=torch.Generator().manual_seed(i))
        replica.body.down.weight.data += 0.03 * noise * replica.body.down.weight.std()
    seeds = [second_order_damage(model, candidates, windows, seed=s, batch_size=500, progress=False) for s in range(8)]
    measured = compare(model, {b: {b: r} for b, (r,) in candidates.items()}, windows, batch_size=500, progress=False)
    for block in blocks:
        estimates = np.array([damages[block][0] for damages in seeds])
        uncertainty = estimates.std(ddof=1) / len(seeds) ** 0.5
        assert uncertainty < 0.1 * estimates.mean()
        assert abs(estimates.mean() - measured[block].mean_kl) < 4 * uncertainty + 0.02 * estimates.mean()


def test_measured_damage_is_the_divergence_of_a_candidate_alone():
    model, blocks, candidates = case()
    damages = measured_damage(model, candidates, WINDOWS, progress=False)
    for block in blocks:
        for small, damage in zip(candidates[block], damages[block], strict=True):
            alone = compare(model, {"alone": {block: small}}, WINDOWS, progress=False)["alone"]
            assert damage == pytest.approx(alone.mean_kl, rel=1e-4, abs=1e-7)
        assert damages[block][0] > damages[block][1]


def test_local_damage_is_that_of_the_reports():
    _, _, candidates = case()
    for block, damages in local_damage(candidates).items():
        assert damages == [r.report.validation.damage for r in candidates[block]]
        assert damages[0] > damages[1]


def test_stored_local_damages_are_those_of_the_same_reports(results):
    """Fits to the same windows have the same weights, whatever they were validated on."""
    model = build("llama")
    for seed in (1, 2):
        blocks, stats = capture_quietly(model, torch.cat([random_windows(6), random_windows(2, seed=seed)]))
        candidates = fit_all(blocks, stats, [NarrowMLP(12)], progress=False)
        assert local_damage(candidates, cached=True) == local_damage(candidates)


@pytest.mark.parametrize("budget", [None, 0])
def test_what_was_fitted_before_is_priced_whatever_the_budget(llama, budget):
    (mlp, *_), (attention, *_) = find_blocks(llama), find_blocks(llama, "attention")
    fitted = fit(attention, capture(llama, [attention], WINDOWS, validation_windows=2, progress=False), LowRank(4))
    groups = capture(llama, find_blocks(llama), WINDOWS, validation_windows=2, memory_budget=budget, progress=False)
    damages = local_damage({mlp: [NarrowMLP(12)], attention: [fitted]}, groups)
    assert damages[attention] == [fitted.report.validation.damage]


def test_a_family_without_statistics_is_refused_before_the_pass(llama):
    model, blocks, stats = llama, *capture_quietly(llama, random_windows())
    attention = find_blocks(model, "attention")[0]
    candidates = {blocks[0]: [NarrowMLP(12)], attention: [NarrowAttention(4, 4, 8, 6)]}
    with pytest.raises(ValueError, match=f"Not in the statistics: {attention.name}"):
        second_order_damage(model, candidates, WINDOWS, stats, progress=False)


def test_local_damage_does_not_know_scores(llama):
    block, narrower = find_blocks(llama, "attention")[0], NarrowAttention(4, 4, 8, 6)
    stats = capture(llama, [block], WINDOWS, validation_windows=2, progress=False)
    with pytest.raises(ValueError, match="key_dim=6.*second_order_damage"):
        local_damage({block: [narrower]}, stats)


def test_local_damage_needs_validation_errors():
    model = build("llama")
    blocks, stats = capture_quietly(model, random_windows(), validation_windows=0)
    candidates = fit_all(blocks, stats, [NarrowMLP(12)], progress=False)
    with pytest.raises(ValueError, match=f"{blocks[0].name}: no validation error.*validation_windows=4"):
        local_damage(candidates)


def test_candidates_for_another_model_are_refused():
    _, blocks, _ = case()
    with pytest.raises(ValueError, match="no module model.layers.*another model"):
        second_order_damage(build("gpt2"), {block: [] for block in blocks}, WINDOWS, progress=False)
