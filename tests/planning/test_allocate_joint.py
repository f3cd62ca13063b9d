"""The joint knapsack over MLP and attention blocks, whose errors may be felt together."""

from importlib import import_module

import pytest
import torch
from conftest import capture_quietly
from tiny_models import random_windows

from mlpreplace import LowRank, Mean, NarrowMLP, allocate
from mlpreplace.fitting.fit import fit_all
from mlpreplace.models.parameters import block_parameters
from mlpreplace.planning.allocate import ATTENTION_PRICES
from mlpreplace.planning.candidates import savings_of
from mlpreplace.planning.damage import SecondOrder, local_damage
from mlpreplace.planning.knapsack import knapsack
from mlpreplace.replacements.splice import sparsity_of

WINDOWS = random_windows(4, seed=9)


@pytest.fixture
def both_kinds(captured):
    """A model with candidates for its MLP and attention blocks, and the statistics of the MLPs."""
    model, blocks, stats = captured
    attention, of_attention = capture_quietly(model, random_windows(), "attention", moments=("input",))
    candidates = fit_all(blocks, stats, [NarrowMLP(12), NarrowMLP(24), NarrowMLP(36)], progress=False)
    return model, stats, candidates | fit_all(attention, of_attention, [Mean(), LowRank(4)], progress=False)


@pytest.mark.parametrize("given", ["damages", "windows"])
def test_joint_is_the_knapsack_that_costs_least_together(given, both_kinds, monkeypatch):
    """Planted are attention blocks that err at one token, so that each price of attention is the best for some."""
    model, stats, candidates = both_kinds
    savings, target, best = savings_of(candidates), 0.4 * block_parameters(model), []
    for seed in range(12):
        random, felt = torch.Generator().manual_seed(seed), {}
        for n, (block, of_block) in enumerate(savings.items()):
            at = torch.zeros(len(savings))
            at[n if block.kind == "mlp" else -1] = 1 if block.kind == "mlp" else 0.7
            noise = 0.5 + torch.rand(len(of_block), generator=random)
            felt[block] = torch.outer(noise * torch.tensor(of_block).sqrt(), at)
        damages = SecondOrder(felt, predicted=1)
        monkeypatch.setattr(import_module("mlpreplace.planning.allocate"), "second_order_damage", lambda *_, d=damages, **__: d)
        asked = {"damages": damages} if given == "damages" else {"windows": WINDOWS}
        choices = []
        for price in ATTENTION_PRICES:
            priced = {b: [d * (price if b.kind == "attention" else 1) for d in of_block] for b, of_block in damages.items()}
            choices.append(knapsack(savings, priced, target))
        together = [damages.together(choice) for choice in choices]
        best.append(together.index(min(together)))
        plan = allocate(model, stats, 0.4, "joint", candidates=candidates, **asked)
        assert plan == {b: candidates[b][i] for b, i in choices[best[-1]].items()} and sparsity_of(model, plan) >= 0.4
    assert set(best) == set(range(len(ATTENTION_PRICES)))


def test_attention_that_errs_at_one_token_is_left_where_its_price_says_so(both_kinds):
    """Alone each attention block is cheaper than an MLP; together they are not, and no knapsack of single damages can see it."""
    model, stats, candidates = both_kinds
    felt = {}
    for n, (block, of_block) in enumerate(savings_of(candidates).items()):
        at = torch.zeros(len(candidates))
        at[n if block.kind == "mlp" else -1] = 1 if block.kind == "mlp" else 0.9
        felt[block] = torch.outer(torch.tensor(of_block, dtype=torch.float32).sqrt(), at)
    damages = SecondOrder(felt, predicted=1)
    replaced = {
        strategy: [b.kind for b in allocate(model, stats, 0.38, strategy, candidates=candidates, damages=damages)]
        for strategy in ("milp", "joint")
    }
    assert replaced["joint"].count("attention") < replaced["milp"].count("attention")


def test_without_attention_there_is_no_price_to_find(both_kinds):
    model, stats, candidates = both_kinds
    mlps = {b: fitted for b, fitted in candidates.items() if b.kind == "mlp"}
    options = dict(candidates=mlps, windows=random_windows(4), progress=False)
    assert allocate(model, stats, 0.2, "joint", **options) == allocate(model, stats, 0.2, "milp", **options)


@pytest.mark.parametrize("strategy", ["greedy", "milp", "joint", "search"])
def test_a_candidate_that_is_not_finite_is_in_no_plan(strategy, both_kinds):
    """Whether the damages are computed here, or are of the candidates when they were whole."""
    model, stats, candidates = both_kinds
    broken = next(b for b in candidates if b.kind == "attention")
    damages = local_damage(candidates)
    candidates[broken][0].body.bias.data[3] = float("nan")
    options = dict(candidates=candidates, windows=random_windows(4), progress=False)
    with pytest.raises(ValueError, match=rf"not finite for {broken.name}"):
        allocate(model, stats, 0.5, strategy, **options)
    if strategy == "joint":  # which takes none that were said
        return
    damages[broken] = [0.0] * len(damages[broken])  # so that it is taken
    if strategy == "search":  # the others have no reason to look
        with pytest.raises(ValueError, match="not finite"):
            allocate(model, stats, 0.5, strategy, damages=damages, **options)
