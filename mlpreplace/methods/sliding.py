"""Which neighbours to merge, or to drop: every start is tried and the best by a score is kept.

Starts slide over all layers of a stack, and neighbours never cross from one stack into another (arXiv 2501.06126).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby

from torch import nn

from ..models.blocks import Block
from ..models.layers import find_layers, layer_parameters
from ..planning.allocate import allocate
from ..replacements.families import Replacement
from ..replacements.splice import Plan, removed_parameters, sparsity_of
from ..replacements.whole_layers import Removed, without_layers
from ..statistics.groups import only
from ..statistics.moments import Statistics
from ..statistics.unit_similarity import Units
from .merging import merge_mlps

Start = tuple[str, int]  # stack and first layer of k neighbours
Score = Callable[[Mapping[Start, Plan]], Mapping[Start, float]]  # of plans, the lower the better
Make = Callable[[Sequence[Block]], Plan]  # what is done to k neighbours


def drop_mlps(blocks: Sequence[Block]) -> Plan:
    """The plan without ``blocks``."""
    return {block: Replacement(Removed(), block) for block in blocks}


def drop_layers(model: nn.Module, layers: Sequence[Block]) -> Plan:
    """The plan without whole ``layers``, blocks from :func:`~mlpreplace.models.layers.find_layers`."""
    return without_layers(model, [block.layer for block in layers])


def layers_worth(model: nn.Module, plan: Plan) -> int:
    """How many whole layers, at least one, hold most nearly as many parameters as ``plan`` saves.

    Raises ValueError where whole layers cannot be removed, see :func:`~mlpreplace.models.layers.find_layers`.
    """
    weights = layer_parameters(model)
    return max(1, round(removed_parameters(plan) / (sum(weights) / len(weights))))


def neighbours(blocks: Sequence[Block], k: int, every: int = 1) -> dict[Start, list[Block]]:
    """Every k neighbours among ``blocks``, none across stacks; with ``every`` only starts so many layers apart.

    Raises ValueError unless 1 ≤ k ≤ layers and 1 ≤ every.
    """
    if every < 1:
        raise ValueError(f"Expected every ≥ 1, got {every}.")
    stacks = [list(of_stack) for _, of_stack in groupby(blocks, key=lambda block: block.stack)]
    longest = max(map(len, stacks), default=0)
    if not 1 <= k <= longest:
        raise ValueError(f"There are no {k} neighbours: expected 1 ≤ k ≤ {longest}, the layers of a stack.")
    found = [stack[i : i + k] for stack in stacks for i in range(0, len(stack) - k + 1, every)]
    return {(chosen[0].stack, chosen[0].layer): chosen for chosen in found}


def slide(blocks: Sequence[Block], k: int, make: Make, score: Score, *, every: int = 1) -> tuple[Plan, list[dict]]:
    """The best of the plans that ``make`` makes of every k neighbours among ``blocks``; of equal ones the first.

    Args:
        blocks: in order of depth; those of one stack, or of several for the best neighbours in any of them.
        make: ``partial(merge_mlps, units=units)``; :func:`merge_mlps` for the unmatched control; :func:`drop_mlps` with k − 1, or
            ``partial(drop_layers, model)`` with :func:`layers_worth` layers, for as many parameters.
        score: {start: plan} → {start: score}, the lower the better, on validation data, never on held-out data.
            ``{s: m.mean_kl for s, m in compare(model, plans, windows).items()}`` for a causal language model;
            :func:`~mlpreplace.planning.losses` for any model.
        every: tries only starts so many layers apart.

    Returns:
        The best plan, and one record a start: stack, start, layers (k), score, best. All plans are held at a time: one MLP
        each when merged.

    Raises:
        ValueError: a k that no stack has room for, scores that are all NaN, what ``make`` raises.
    """
    plans = {start: make(chosen) for start, chosen in neighbours(blocks, k, every).items()}
    scores = {start: float(value) for start, value in score(plans).items()}
    usable = [start for start in plans if not math.isnan(scores[start])]
    if not usable:
        raise ValueError(f"Every score is NaN, of all {len(plans)} starts of {k} neighbours.")
    best = min(usable, key=scores.__getitem__)
    about = {start: {"stack": start[0], "start": start[1], "layers": k} for start in plans}
    return plans[best], [{**about[start], "score": scores[start], "best": start == best} for start in plans]


def rivals(
    model: nn.Module,
    blocks: Sequence[Block],
    k: int,
    units: Units,
    stats: Statistics,
    score: Score,
    *,
    whole_layers: bool = True,
    every: int = 1,
    cached: bool = False,
) -> tuple[dict[str, Plan], list[dict]]:
    """k MLPs merged into one, and what else saves as many parameters.

    Args:
        blocks: MLP blocks of one stack, in order of depth; ``units`` to match them by, ``stats`` to narrow them by.
        whole_layers: whether as many parameters are dropped with whole layers, too; False where layers cannot be removed (an
            encoder-decoder).
        score, every, cached: as :func:`slide` and :func:`~mlpreplace.methods.merge_mlps` take them.

    Returns:
        Plans, of the best start each: "merged", "unpermuted" (averaged as they stand), "deleted" (k − 1 MLPs with nothing in
        their place), "dropped" (whole layers), and "replaced" (every block narrowed to one width). And the records of all
        starts, with a method.

    Raises:
        ValueError: what :func:`slide` raises; statistics or units of other blocks.
    """
    if missing := [block.name for block in blocks if block not in stats]:
        raise ValueError(f"{missing[0]} is not in the statistics: capture it first.")
    plans, records = {}, []

    def best(method: str, among: Sequence[Block], size: int, make: Make) -> None:
        plans[method], tried = slide(among, size, make, score, every=every)
        records.extend({"method": method, **record} for record in tried)

    best("merged", blocks, k, partial(merge_mlps, units=units, cached=cached))
    best("unpermuted", blocks, k, merge_mlps)
    best("deleted", blocks, k - 1, drop_mlps)
    if whole_layers:
        best("dropped", find_layers(model), layers_worth(model, plans["merged"]), partial(drop_layers, model))
    plans["replaced"] = allocate(model, only(stats, blocks), sparsity_of(model, plans["merged"]), "uniform")
    return plans, records
