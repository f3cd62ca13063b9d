"""Which block gets which replacement under a parameter budget.

A candidate saves parameters and does damage. If the damages of blocks add up, the best plan solves a multiple-choice knapsack: at
most one candidate a block, least damage for a given number of parameters removed. If they do not, "joint" chooses among a few
knapsacks by the damage of all blocks together, and "search" measures whole plans.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from math import ceil
from numbers import Real

from torch import Tensor, nn

from ..models.blocks import Block
from ..models.forward import check_gradients
from ..models.inputs import check_windows
from ..models.parameters import block_parameters
from ..replacements.families import Family, LowRank, NarrowMLP, TwoLayerMLP
from ..replacements.splice import Plan
from ..statistics.moments import Statistics
from .candidates import Candidates, Choice, candidate_families, fitted_plan, fitted_to, savings_of
from .damage import SecondOrder, local_damage, second_order_damage
from .knapsack import Damages, greedy, knapsack
from .search import search

STRATEGIES = ("uniform", "heuristic", "greedy", "milp", "joint", "search")
ATTENTION_PRICES = (1, 1.5, 2)  # factors on the damage of attention blocks
WIDTH_STEPS = 16  # of the candidates by default
PROTECTED = 10  # the heuristic leaves one layer in so many dense at each end


def _is_inner(model: nn.Module, block: Block) -> bool:
    """Whether the block stands in none of the layers that the heuristic leaves dense."""
    layers = len(model.get_submodule(block.stack))
    ends = ceil(layers / PROTECTED)
    return ends <= block.layer < layers - ends


def _uniform(blocks: list[Block], target: float, family: type[Family]) -> dict[Block, Family]:
    """The largest size that saves ``target``, the same in all replaced blocks.

    NarrowMLP (of experts, TwoLayerMLP) replaces all ``blocks``. LowRank, which cannot be large, replaces as few evenly spaced
    blocks as can save enough.
    """
    if family is NarrowMLP:
        family = NarrowMLP if all(b.has_neurons for b in blocks) else TwoLayerMLP
        chosen, most = blocks, min(map(family.most, blocks))
    elif family is LowRank:
        each = blocks[0].n_params - LowRank(1).n_params(blocks[0])
        n = min(len(blocks), max(1, ceil(target / each)))
        chosen = [blocks[(2 * i + 1) * len(blocks) // (2 * n)] for i in range(n)]  # the middles of n equal parts
        most = LowRank.most(blocks[0])
    else:
        raise ValueError(f"A uniform plan takes NarrowMLP or LowRank, got {family.__name__}.")

    def too_large(size: int) -> bool:
        return sum(b.n_params - family(size).n_params(b) for b in chosen) < target

    size = bisect_left(range(1, most + 1), True, key=too_large)  # as many sizes are not too large
    if size == 0:
        raise ValueError(f"Uniform {family.__name__} cannot save {target:,.0f} parameters in {len(blocks)} MLP blocks.")
    return {b: family(size) for b in chosen}


def _joint(savings: Mapping[Block, list[int]], damages: SecondOrder, target: float) -> dict[Block, int]:
    """The choice of least damage together among exact knapsacks in which damages of attention blocks are multiplied by a price.

    Replaced attention blocks cost more together than the sum of their damages, the more so the more is removed. At 12.5, 25 and
    37.5 % sparsity of a Llama with 135M parameters the choice of least damage together was that of least measured KL, too. A
    search that goes by damage together alone finds plans that measure worse.
    """
    alone, choices = dict(damages), []
    for price in ATTENTION_PRICES:
        priced = {b: [price * d for d in of_block] if b.kind == "attention" else of_block for b, of_block in alone.items()}
        choices.append(knapsack(savings, priced, target))
    return min(choices, key=damages.together)


def choose(
    model: nn.Module,
    stats: Statistics,
    sparsity: float,
    strategy: str = "greedy",
    *,
    family: type[Family] = NarrowMLP,
    candidates: Candidates | None = None,
    damages: Damages | None = None,
    windows: Tensor | None = None,
    cached: bool = False,
    progress: bool = True,
) -> Choice:
    """What :func:`allocate` would fit: {block: family at a size}, or the replacement itself where that was the candidate.

    Arguments and errors are those of :func:`allocate`, for all strategies but "search".
    """
    if strategy == "search":
        raise ValueError('strategy="search" goes on from fitted candidates: allocate(…, "search") returns its plan.')
    if windows is not None:
        check_windows(windows, model, least=2)
    target = _target(model, sparsity, strategy, windows)
    if strategy == "joint" and not (isinstance(damages, SecondOrder) or (damages is None and windows is not None)):
        raise ValueError('strategy="joint" asks what blocks cost together: pass windows=, or damages=second_order_damage(…).')
    if strategy in ("uniform", "heuristic"):
        blocks = [b for b in stats if b.kind == "mlp" and (strategy == "uniform" or _is_inner(model, b))]
        if not blocks:
            inner = " outside a tenth of the layers, at least one, at each end" if strategy == "heuristic" else ""
            raise ValueError(f"strategy={strategy!r} replaces MLP blocks{inner}: the statistics hold none.")
        return _uniform(blocks, target, family)
    if candidates is None:
        candidates = _narrow(stats)
    savings = savings_of(candidates)
    most = sum(max([0, *s]) for s in savings.values())
    if most < target:
        raise ValueError(
            f"sparsity={sparsity} asks to remove {target:,.0f} parameters, the candidates can save {most:,}: offer smaller ones."
        )
    if damages is None and windows is None:
        damages = local_damage(candidates, stats, cached=cached)
    elif damages is None:
        damages = second_order_damage(model, candidates, windows, stats, cached=cached, progress=progress)
    elif {b: len(d) for b, d in damages.items()} != {b: len(f) for b, f in candidates.items()}:
        raise ValueError(
            "damages must hold one number for each of candidates, block by block: compute them of the same candidates."
        )
    choice = {"greedy": greedy, "joint": _joint}.get(strategy, knapsack)(savings, damages, target)
    return {block: candidates[block][i] for block, i in choice.items()}


def _target(model: nn.Module, sparsity: float, strategy: str, windows: Tensor | None) -> float:
    """Parameters to remove. Raises ValueError for what no strategy could work with."""
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; expected one of {STRATEGIES}.")
    if not isinstance(sparsity, Real) or not 0 < sparsity < 1:
        raise ValueError(f"Expected 0 < sparsity < 1, got {sparsity!r}.")
    if strategy == "search" and windows is None:
        raise ValueError('strategy="search" measures plans: pass windows=, validation windows for instance.')
    return sparsity * block_parameters(model)


def _narrow(stats: Statistics) -> dict[Block, list[Family]]:
    return candidate_families([b for b in stats if b.kind == "mlp"], width_steps=WIDTH_STEPS, linear_sizes=())


def allocate(
    model: nn.Module,
    stats: Statistics,
    sparsity: float,
    strategy: str = "greedy",
    *,
    family: type[Family] = NarrowMLP,
    candidates: Candidates | None = None,
    damages: Damages | None = None,
    windows: Tensor | None = None,
    rounds: int = 2,
    cached: bool = False,
    progress: bool = True,
) -> Plan:
    """A fitted plan that removes at least ``sparsity`` of the parameters of all attention and MLP blocks.

    Candidates are priced one block at a time, and what is chosen by the prices is fitted afterwards. So memory holds the plan and
    the statistics of as many layers as :func:`~mlpreplace.capture` was allowed. Only "search" holds all candidates.

    Args:
        stats: statistics of the blocks that may be replaced.
        strategy:
            - "uniform": every MLP block alike.
            - "heuristic": the same, with a tenth of the layers, rounded up, left dense at each end.
            - "greedy": least damage per parameter first.
            - "milp": the exact knapsack.
            - "joint": exact knapsacks with attention at several prices, the one of least second-order damage together.
            - "search": from the exact knapsack on, see :func:`~mlpreplace.planning.search`.
        family: what "uniform" and "heuristic" use, NarrowMLP or LowRank.
        candidates: {block: families at sizes, or fitted replacements} to choose from, blocks of any kind; by default NarrowMLP
            at 15 widths in MLP blocks. :func:`~mlpreplace.planning.candidate_families` lists more.
        damages: what each of ``candidates`` costs. By default :func:`~mlpreplace.planning.second_order_damage` on ``windows``,
            which predicts best; without windows :func:`~mlpreplace.planning.local_damage`, which is free.
        windows: token ids [windows, seq_len], never held-out ones. "search" needs them to measure KL on.
        rounds: of the search, at most.
        cached: keep prices and fits on disk, and take them from there.

    Raises:
        ValueError: unknown strategy, damages that are not one finite number for each candidate, a sparsity outside (0, 1) or
            beyond what the candidates can save, nothing to measure plans on, windows the model cannot read or of a single token,
            a call under torch.inference_mode() where gradients are needed, a uniform plan of another family or without a block.
    """
    of_windows = strategy not in ("uniform", "heuristic") and (damages is None or strategy == "search")
    if windows is not None and of_windows:
        check_windows(windows, model, least=2)
        check_gradients(model)
    options = dict(family=family, damages=damages, windows=windows, cached=cached, progress=progress)
    if strategy != "search":
        chosen = choose(model, stats, sparsity, strategy, candidates=candidates, **options)
        return fitted_plan(stats, chosen, cached=cached, progress=False)
    _target(model, sparsity, strategy, windows)
    candidates = _narrow(stats) if candidates is None else candidates
    if damages is None:  # of families: what attends is priced before it is fitted
        options["damages"] = second_order_damage(model, candidates, windows, stats, cached=cached, progress=progress)
    wanted = {(b, i): c for b, of_block in candidates.items() for i, c in enumerate(of_block)}
    every = fitted_to(stats, wanted, samples=(), cached=cached)
    candidates = {b: [every[b, i] for i in range(len(of_block))] for b, of_block in candidates.items()}
    plan = choose(model, stats, sparsity, "milp", candidates=candidates, **options)
    return search(model, plan, candidates, windows, rounds=rounds, progress=progress).plan
