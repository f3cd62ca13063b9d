"""SubFit-style removal: scores, selection, and what a removed submodule leaves behind."""

from dataclasses import replace

import pytest
import torch
from layer_blocks import LAYERS, calibrated, deep
from tiny_models import CAUSAL, HIDDEN, random_windows

from mlpreplace import LowRank, capture, compare, find_blocks, fit, spliced
from mlpreplace.methods.calibration import Calibration
from mlpreplace.methods.registry import METHODS
from mlpreplace.methods.subfit import OF_STREAM, lowest_first, scores, share_basis, subfit
from mlpreplace.replacements.splice import removed_parameters, sparsity_of
from mlpreplace.statistics.residual_stream import StreamStatistics

TARGETS = (0.125, 0.25, 0.375)


@pytest.fixture(scope="module")
def calibration():
    return calibrated(deep("llama"), methods=["subfit"])


def bypass(block) -> LowRank:
    return LowRank.nearest(block, 0.1 * block.n_params)


def saving(block) -> int:
    return block.n_params - bypass(block).n_params(block)


def known(calibration, magnitude, rotation):
    """The same statistics with scores that are made up, {block name: value}."""
    nothing = torch.zeros(LAYERS + 1, LAYERS + 1)
    return Calibration(StreamStatistics(1, nothing, nothing, magnitude, rotation), blocks=calibration.blocks)


def test_the_lowest_scores_go_wherever_they_are(calibration):
    model, blocks = deep("llama"), list(calibration.blocks)
    g = torch.Generator().manual_seed(0)
    for score in ("magnitude", "rotation", "both"):
        m, r = ({b.name: v for b, v in zip(blocks, torch.rand(len(blocks), generator=g).tolist(), strict=True)} for _ in range(2))
        value = {"magnitude": m, "rotation": r, "both": {name: (m[name] * r[name]) ** 0.5 for name in m}}[score]
        assert scores(known(calibration, m, r).stream, score) == pytest.approx(value)
        plan = subfit(model, known(calibration, m, r), 0.4, score=score)
        assert 0.4 <= sparsity_of(model, plan) < 0.4 + 0.11  # an MLP of six layers' is 8 %
        per_parameter = {b: value[b.name] / saving(b) for b in blocks}
        *sure, last = sorted(plan, key=per_parameter.get)
        assert not [b for b in blocks if b not in plan and per_parameter[b] < per_parameter[sure[-1]]]
        assert {b.kind for b in blocks} == {"mlp", "attention"}


def test_the_validation_windows_choose_the_score(calibration):
    model, windows = deep("llama"), calibration.validation
    found = {None: subfit(model, calibration, 0.3)} | {s: subfit(model, calibration, 0.3, score=s) for s in OF_STREAM}
    divergences = {score: m.mean_kl for score, m in compare(model, found, windows).items()}
    assert divergences.pop(None) == min(divergences.values()) < max(divergences.values())


def test_scores_per_parameter(calibration):
    model, blocks = deep("llama"), list(reversed(calibration.blocks))
    calibration = Calibration(calibration.stream, blocks={b: calibration.blocks[b] for b in blocks})  # attention first
    even = {b.name: 1.0 for b in blocks}
    large = [b for b in blocks if b.n_params == max(b.n_params for b in blocks)]
    first = next(iter(subfit(model, known(calibration, even, even), 0.2)))
    assert first in large and blocks[0] not in large


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("score", ["both", "magnitude", "rotation", "bypass"])
def test_what_is_added_counts(calibration, score, target):
    model = deep("llama")
    plan = subfit(model, calibration, target, score=score)
    for block, replacement in plan.items():
        assert replacement.family == bypass(block)
        again = fit(block, calibration.blocks, replacement.family)
        assert all(torch.equal(a, b) for a, b in zip(replacement.parameters(), again.parameters(), strict=True))
    removed = sum(b.n_params for b in plan) - sum(p.numel() for r in plan.values() for p in r.parameters())
    assert sparsity_of(model, plan) == pytest.approx(removed / sum(b.n_params for b in calibration.blocks))
    assert sparsity_of(model, plan) >= target


def test_bypass_error_goes_by_what_was_measured(calibration):
    model = deep("llama")
    plan = subfit(model, calibration, 0.25, score="bypass")
    damage = {b: fit(b, calibration.blocks, bypass(b)).report.validation.damage for b in calibration.blocks}
    order = sorted(damage, key=lambda b: damage[b] / saving(b))
    assert set(order[: len(plan) - 1]) <= set(plan)


def test_the_end_is_the_one_that_exceeds_the_target_least():
    order, savings = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, {"a": 5, "b": 10, "c": 4, "d": 4, "e": 2}
    assert lowest_first(order, savings, 4) == ["c"]  # of two savings of 4 the lower score
    assert lowest_first(order, savings, 9) == ["a", "c"]
    assert lowest_first(order, savings, 17) == ["a", "b", "e"]
    assert lowest_first(order, savings, 18) == ["a", "b", "c"]
    assert lowest_first(order, savings, 20) == ["a", "b", "c", "e"]  # e in the place of d, which would make 23
    large_first = {"a": 10, "b": 4, "c": 4}
    assert lowest_first({k: order[k] for k in large_first}, large_first, 6) == ["b", "c"]  # 8 in the place of 10
    assert lowest_first({k: order[k] for k in large_first}, large_first, 9) == ["a"]  # which b and c do not reach
    assert lowest_first(order, savings | {"a": -1}, 17) == ["b", "c", "d"]
    with pytest.raises(ValueError, match="save 25 parameters, 26 are asked for"):
        lowest_first(order, savings, 26)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_removed_attention_keeps_no_cache_entry(name):
    model, ids = deep(name), random_windows(2, 9)
    plan = subfit(model, calibrated(model, methods=["subfit"]), 0.5)
    gone = sorted(b.layer for b in plan if b.kind == "attention")
    with spliced(model, plan), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert gone and [i for i, layer in enumerate(cache.layers[:LAYERS]) if layer.keys.numel() == 0] == gone


def test_errors(calibration):
    model = deep("llama")
    with pytest.raises(ValueError, match="Unknown score 'norm'; expected one of both, magnitude, rotation, bypass"):
        subfit(model, calibration, 0.25, score="norm")
    with pytest.raises(ValueError, match="0 < sparsity < 1, got 0"):
        subfit(model, calibration, 0)
    with pytest.raises(ValueError, match="All submodules together save"):
        subfit(model, calibration, 0.95)
    with pytest.raises(ValueError, match="No attention block was captured"):
        subfit(
            model, Calibration(calibration.stream, blocks={b: s for b, s in calibration.blocks.items() if b.kind == "mlp"}), 0.25
        )
    with pytest.raises(ValueError, match="stream was not captured"):
        subfit(model, Calibration(blocks=calibration.blocks), 0.25)
    with pytest.raises(ValueError, match="of another model"):
        subfit(deep("gpt2"), Calibration(calibrated(deep("gpt2"), methods=["subfit"]).stream, blocks=calibration.blocks), 0.25)


def test_a_shared_basis_counts_once_and_finds_what_all_read(calibration):
    """MLPs that are linear maps through the same four directions are replaced without loss."""
    model = deep("llama")
    blocks = find_blocks(model)
    g = torch.Generator().manual_seed(0)
    through = torch.randn(4, HIDDEN, generator=g, dtype=torch.float64)
    s = capture(model, blocks, random_windows(14, 16, seed=1), progress=False)[blocks[0]]
    stats = {}
    for block in blocks:  # which all read the same input
        a = (torch.randn(HIDDEN, 4, generator=g, dtype=torch.float64) @ through).T  # [hidden, hidden], y = x a
        stats[block] = replace(s, xy=s.xx @ a, sum_y=s.sum_x @ a)
    plan = share_basis(stats, blocks, 4, ridge=1e-12)
    assert len({id(r.body[0]) for r in plan.values()}) == 1
    saved = sum(b.n_params for b in blocks) - 4 * HIDDEN - len(blocks) * 5 * HIDDEN
    assert removed_parameters(plan) == saved
    for block, r in plan.items():
        a = torch.linalg.lstsq(s.xx, stats[block].xy).solution
        weight = (r.body[1].weight @ r.body[0].weight).T
        torch.testing.assert_close(weight, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_with_a_shared_basis_ranks_are_higher(target, calibration):
    model = deep("llama")
    own, shared = (METHODS[name](model, calibration, target) for name in ("subfit", "subfit_shared"))
    ranks = [{r.family.rank for b, r in plan.items() if b.kind == "mlp"} for plan in (own, shared)]
    assert max(ranks[1]) > 1.5 * max(ranks[0]) and sparsity_of(model, shared) >= target


def test_the_shared_basis_is_paid_for(calibration):
    """What is asked for a little above what a plan removes is reached by another one."""
    model = deep("llama")
    removed = sparsity_of(model, METHODS["subfit_shared"](model, calibration, 0.25))
    assert sparsity_of(model, METHODS["subfit_shared"](model, calibration, removed + 1e-6)) > removed
