"""The search: no plan it returns is worse or larger than its start, and it finds what single-block damages hide."""

import copy
import dataclasses
from functools import lru_cache
from importlib import import_module

import pytest
import torch
from conftest import capture_quietly
from tiny_models import CAUSAL, INTERMEDIATE, build, random_windows

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, TwoLayerMLP, compare, fit
from mlpreplace.fitting.fit import fit_all
from mlpreplace.planning.damage import local_damage
from mlpreplace.planning.knapsack import knapsack
from mlpreplace.planning.search import search

WINDOWS = random_windows(5, 12, seed=6)
WIDTHS = [NarrowMLP(width) for width in range(6, INTERMEDIATE, 6)]
COLUMNS = ["round", "kl", "moved", "best_kl", "tokens"]


@pytest.fixture
def trust_region(monkeypatch):
    """Sets the radius of the trust region for a test."""
    return lambda radius: monkeypatch.setattr(import_module("mlpreplace.planning.search"), "RADIUS", radius)


def candidates_of(model, mlp=WIDTHS, attention=()):
    mlps, stats = capture_quietly(model, random_windows())
    candidates = fit_all(mlps, stats, mlp, progress=False)
    if attention:
        blocks, stats = capture_quietly(model, random_windows(), "attention", moments=("input",))
        candidates |= fit_all(blocks, stats, attention, progress=False)
    return candidates


def savings_of(candidates):
    return {block: [block.n_params - r.n_params for r in fitted] for block, fitted in candidates.items()}


def start_of(candidates, share: float, damages=None):
    """The knapsack's plan that saves ``share`` of what the candidates can save."""
    savings = savings_of(candidates)
    choice = knapsack(savings, damages or local_damage(candidates), share * sum(max(s) for s in savings.values()))
    return {block: candidates[block][i] for block, i in choice.items()}


def saved(plan) -> int:
    return sum(block.n_params - r.n_params for block, r in plan.items())


def kl(model, plan, windows=WINDOWS) -> float:
    return compare(model, {"plan": plan}, windows, progress=False)["plan"].mean_kl


@lru_cache
def misled():
    """(model, candidates, start): all is taken from layer 0, and layer 1 is where the model needs nothing."""
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 0.02
    candidates = candidates_of(model)
    first = next(iter(candidates))
    return model, candidates, {first: candidates[first][1]}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[block] is b[block] for block in a)


@pytest.mark.parametrize(("share", "radius"), [(0.3, 1), (0.7, 1 / 4)])
@pytest.mark.parametrize("name", CAUSAL)
def test_it_saves_no_less_and_diverges_no_more_than_its_start(name, share, radius, trust_region):
    """Families mixed, attention among them; from a start so bad that gradients may point nowhere."""
    model = build(name)
    sized = [TwoLayerMLP(24), TwoLayerMLP(40)] if name == "mixtral" else [NarrowMLP(12), NarrowMLP(24), NarrowMLP(36)]
    candidates = candidates_of(model, [*sized, Linear(), Mean()], [LowRank(4), Linear()])
    upside_down = {block: [1 / d for d in damages] for block, damages in local_damage(candidates).items()}
    start = start_of(candidates, share, upside_down)
    trust_region(radius)
    plan, history = search(model, start, candidates, WINDOWS, rounds=3, progress=False)
    assert saved(plan) >= saved(start)
    assert all(any(r is c for c in candidates[block]) for block, r in plan.items())
    assert history[-1]["best_kl"] == pytest.approx(kl(model, plan), rel=1e-4, abs=1e-7)
    assert same(plan, start) or kl(model, plan) < kl(model, start)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("radius", [1 / 8, 1 / 4])
def test_it_recovers_from_a_misleading_start(radius, trust_region):
    """Reports that make what the model does not need look precious send the knapsack elsewhere; the search comes back."""
    model, candidates, _ = misled()
    blocks = list(candidates)
    candidates = {block: copy.deepcopy(fitted) for block, fitted in candidates.items()}
    assert list(start_of(candidates, 0.25)) == [blocks[1]]
    for r in (r for block in blocks[1:] for r in candidates[block]):
        errors = dataclasses.replace(r.report.validation, damage=1e5 * r.report.validation.damage)
        r.report = dataclasses.replace(r.report, validation=errors)
    start = start_of(candidates, 0.25)
    assert list(start) == [blocks[0]]
    trust_region(radius)
    plan, _ = search(model, start, candidates, WINDOWS, rounds=20, progress=False)
    assert saved(plan) >= saved(start)
    assert list(plan) == [blocks[1]]
    assert kl(model, plan) < 0.01 * kl(model, start)


def test_a_proposal_that_measures_worse_is_refused(monkeypatch, trust_region):
    """Prices turned upside down propose the most harmful change there is."""
    model, candidates, _ = misled()
    start = start_of(candidates, 0.5)

    def worst(savings, prices, target, **options):
        return knapsack(savings, {block: [-price for price in of_block] for block, of_block in prices.items()}, target, **options)

    monkeypatch.setattr(import_module("mlpreplace.planning.search"), "knapsack", worst)
    trust_region(1 / 4)
    plan, history = search(model, start, candidates, WINDOWS, rounds=3, progress=False)
    assert same(plan, start)
    (record,) = history  # and the search ends
    assert record["moved"] > 0 and record["kl"] > 1.1 * record["best_kl"]
    assert record["best_kl"] == pytest.approx(kl(model, start), rel=1e-4)


def test_replaced_attention_may_return(trust_region):
    """What a dense attention block would give in a replaced one's place is priced as well."""
    model = build("llama")
    for layer, scale in zip(model.model.layers, (0.2, 0.2, 0.01), strict=True):  # in the last one attention is not needed
        layer.self_attn.o_proj.weight.data *= scale
    blocks, stats = capture_quietly(model, random_windows(), "attention", moments=("input",))
    candidates = fit_all(blocks, stats, [Mean()], progress=False)
    trust_region(1)
    plan, _ = search(model, {blocks[0]: candidates[blocks[0]][0]}, candidates, WINDOWS, progress=False)
    assert list(plan) == [blocks[2]]


@pytest.mark.parametrize("radius", [1 / 8, 1 / 4])
def test_the_history_tells_every_proposal(radius, trust_region):
    model, candidates, start = misled()
    trust_region(radius)
    plan, history = search(model, start, candidates, WINDOWS, rounds=3, progress=False)
    assert [list(record) for record in history] == [COLUMNS] * len(history)
    assert [record["round"] for record in history] == list(range(len(history)))
    best = [record["best_kl"] for record in history]
    assert best == sorted(best, reverse=True)
    tokens = [record["tokens"] for record in history]
    assert tokens == sorted(tokens) and tokens[0] == WINDOWS.numel() * (7 + 2 * (history[0]["moved"] > 0))
    assert not same(plan, start) and best[-1] < best[0] < kl(model, start)
    assert search(model, start, candidates, WINDOWS, rounds=0) == (start, [])


def test_prices_are_what_small_changes_do(monkeypatch):
    """A candidate next to the present one is priced at the change in KL per predicted token that it makes."""
    model = build("llama")
    blocks, stats = capture_quietly(model, random_windows())
    plan, candidates = {}, {}
    for i, block in enumerate(blocks):
        present, shifted = (fit(block, stats, NarrowMLP(18)) for _ in range(2))
        noise = torch.randn(present.body.down.weight.shape, generator=torch.Generator().manual_seed(i))
        shifted.body.down.weight.data += 1e-3 * noise
        plan[block], candidates[block] = present, [present, shifted]
    asked = []

    def keep(savings, prices, target, **options):
        asked.append(prices)
        return knapsack(savings, prices, target, **options)

    monkeypatch.setattr(import_module("mlpreplace.planning.search"), "knapsack", keep)
    search(model, plan, candidates, WINDOWS, rounds=1, batch_size=2, progress=False)
    (prices,) = asked
    before = kl(model, plan)
    for block in blocks:
        stays, moves = prices[block]  # the dense block, which saves so much less, is not near
        assert stays == 0
        after = kl(model, plan | {block: candidates[block][1]})
        assert moves == pytest.approx(after - before, rel=0.1, abs=2e-6)
        assert abs(after - before) > 2e-5


@pytest.mark.parametrize("radius", [1 / 8, 1 / 4])
def test_only_candidates_near_the_present_one_are_chosen(radius, trust_region):
    model, candidates, start = misled()
    trust_region(radius)
    plan, history = search(model, start, candidates, WINDOWS, rounds=1, progress=False)
    assert not same(plan, start)
    for block in candidates:
        before, after = (block.n_params - p[block].n_params if block in p else 0 for p in (start, plan))
        assert abs(after - before) <= radius * block.n_params + 1
    assert len(history) == 1


def test_it_is_deterministic_and_training_mode_does_not_matter(trust_region):
    """GPT-2 drops a tenth of its activations in training mode, also where a dense block is priced."""
    model = build("gpt2")
    candidates = candidates_of(model)
    start = start_of(candidates, 0.5)
    trust_region(1 / 2)
    options = dict(rounds=2, progress=False)
    plan, history = search(model, start, candidates, WINDOWS, **options)
    again, history_again = search(model.train(), start, candidates, WINDOWS, **options)
    assert same(plan, again) and history == history_again
    assert all(module.training for module in model.modules())


def test_a_cached_search_is_not_searched_again(results, monkeypatch):
    model, candidates, start = misled()
    options = dict(rounds=2, cached=True, progress=False)
    plan, history = search(model, start, candidates, WINDOWS, **options)
    assert len(list(results.glob("search-*.safetensors"))) == 1

    def fail(*args, **options):
        raise AssertionError("searched again")

    monkeypatch.setattr(import_module("mlpreplace.planning.search"), "probe", fail)
    again, history_again = search(model, start, candidates, WINDOWS, **options)
    assert same(plan, again) and history == history_again
    with pytest.raises(AssertionError, match="searched again"):
        search(model, start, candidates, WINDOWS, **options | {"rounds": 1})
    with pytest.raises(AssertionError, match="searched again"):
        search(model, start_of(candidates, 0.3), candidates, WINDOWS, **options)


def test_a_plan_that_is_not_made_of_candidates_is_refused():
    model, candidates, start = misled()
    (block,) = start
    _, stats = capture_quietly(model, random_windows())
    with pytest.raises(ValueError, match=rf"NarrowMLP\(width=12\) for {block.name} is none of the candidates"):
        search(model, start | {block: fit(block, stats, NarrowMLP(12))}, candidates, WINDOWS)
    fewer = {b: fitted for b, fitted in candidates.items() if b != block}
    with pytest.raises(ValueError, match=f"for {block.name} is none of the candidates"):
        search(model, start, fewer, WINDOWS)


def test_candidates_need_no_reports():
    model = build("llama")
    blocks, stats = capture_quietly(model, random_windows())
    candidates = {block: fit_all([block], stats, WIDTHS, samples=(), progress=False)[block] for block in blocks}
    start = {blocks[0]: candidates[blocks[0]][0]}
    plan, _ = search(model, start, candidates, WINDOWS, progress=False)
    assert saved(plan) >= saved(start) and kl(model, plan) < kl(model, start)


def test_what_belongs_to_another_model_is_refused():
    model, candidates, start = misled()
    with pytest.raises(ValueError, match="another model"):
        search(build("gpt2"), start, candidates, WINDOWS, progress=False)
    with pytest.raises(ValueError, match="longer than the model's context"):
        search(model, start, candidates, random_windows(2, 100), progress=False)
