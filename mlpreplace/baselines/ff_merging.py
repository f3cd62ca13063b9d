"""Adjacent MLPs merged into one: hidden units are matched by correlation, weights averaged, and k layers share the result.

Source: "Merging Feed-Forward Sublayers for Compressed Transformers" (arXiv 2501.06126). Units are matched to those of the
anchor, the first layer of a window, by what they give before the activation: the permutation of most correlation, and of a
gated block the one permutation for which gate and up correlate most together. Each layer keeps its own norm. k − 1 MLPs are
saved and no FLOPs: a shared MLP runs in every layer. Windows slide over all starts, never from one stack into another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from ..allocate import allocate
from ..blocks import Block, MLPWeights
from ..capture import Statistics
from ..layers import Removed, Tuned, find_layers, layer_parameters, without_layers
from ..replacements import Family, GatedMLP, Replacement
from ..reports import FitReport
from ..similarity import Units, match
from ..splice import removed_parameters, sparsity
from .calibration import Plan

Start = tuple[str, int]  # stack and first layer of a window
Score = Callable[[Mapping[Start, Plan]], Mapping[Start, float]]  # of plans, the lower the better


@dataclass(frozen=True)
class Merged(Family):
    """One MLP of the block's own form and size that ``layers`` of a stack share. Its parameters count once for all of them."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # from json

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """A block by itself merges with none."""
        return Tuned()

    def n_params(self, block: Block) -> int:
        weights = block.weights()
        return sum(t.numel() for t in vars(weights).values() if t is not None)

    def build(self, block: Block) -> nn.Module:
        return GatedMLP(block, block.intermediate_size)


def permuted(weights: MLPWeights, order: Tensor) -> MLPWeights:
    """The same MLP with its hidden units in another order: rows of gate and up, columns of down."""
    order = order.to(weights.up.device)
    of_units = {name: getattr(weights, name) for name in ("up", "gate", "up_bias", "gate_bias")}
    rows = {name: None if t is None else t[order] for name, t in of_units.items()}
    return MLPWeights(down=weights.down[:, order], down_bias=weights.down_bias, **rows)


def merge_mlps(blocks: Sequence[Block], units: Units | None = None, *, cached: bool = False) -> Plan:
    """The plan in which ``blocks`` share one MLP: the average of theirs, each with its units in the order of the first's.

    Args:
        blocks: two or more MLP blocks of one stack and of equal form; usually neighbours.
        units: of these blocks, from :func:`~mlpreplace.similarity.capture_units`; None averages weights as they stand, the
            control that shows what matching is worth.
        cached: keep the permutations on disk, and take them from there.

    Returns:
        {block: replacement}, all replacements with the same ``body``: ``splice``, ``heal``, ``tune``, ``save`` and ``load``
        keep it one, and it counts once.

    Raises:
        ValueError: fewer than two blocks; blocks of different stacks, widths or forms, or without neurons; units that were not
            captured.
    """
    anchor, *others = _mergeable(blocks)
    matches = [None if units is None else match(units, anchor, block, cached=cached) for block in others]
    aligned = [b.weights() if m is None else permuted(b.weights(), m.order) for b, m in zip(others, matches, strict=True)]
    family = Merged(tuple(block.layer for block in blocks))
    plan = {block: Replacement(family, block) for block in blocks}
    body = plan[anchor].body
    body.load_state_dict(_average([anchor.weights(), *aligned]))
    for replacement in plan.values():
        replacement.body = body
    if units is not None:
        plan[anchor].report = FitReport(units.tokens(anchor), sum(m.seconds for m in matches), None, None)
    return plan


def _average(weights: Sequence[MLPWeights]) -> dict[str, Tensor]:
    """State dict of the GatedMLP that is the mean of all, taken in float64."""
    names = {"gate": "gate.weight", "up": "up.weight", "down": "down.weight"}
    names |= {"gate_bias": "gate.bias", "up_bias": "up.bias", "down_bias": "down.bias"}
    columns = {name: [getattr(w, field) for w in weights] for field, name in names.items()}
    return {
        name: sum(t.to(ts[0].device, torch.float64) for t in ts) / len(ts) for name, ts in columns.items() if ts[0] is not None
    }


def _mergeable(blocks: Sequence[Block]) -> list[Block]:
    if not 2 <= len(set(blocks)) == len(blocks):
        raise ValueError(f"Expected two or more different blocks to merge, got {[block.name for block in blocks]}.")
    anchor, *others = blocks
    for block in others:
        if block.stack != anchor.stack:
            raise ValueError(f"{anchor.name} and {block.name} are of different stacks, which are merged apart.")
        if (own := _form(block)) != (first := _form(anchor)):
            raise ValueError(f"Only MLPs of equal form merge: {anchor.name} has {first}, {block.name} {own}.")
    return [anchor, *others]


def _form(block: Block) -> str:
    """What must agree: sizes, gate and biases, activation, precision."""
    held = {name: tuple(t.shape) for name, t in vars(block.weights()).items() if t is not None}
    return f"{held}, {block.activation}, {block.dtype}"


def drop_mlps(blocks: Sequence[Block]) -> Plan:
    """The plan without ``blocks``: what k − 1 MLPs less are worth when they are not merged but gone."""
    return {block: Replacement(Removed(), block) for block in blocks}


def windows_of(blocks: Sequence[Block], k: int, every: int = 1) -> dict[Start, list[Block]]:
    """Every k neighbours among ``blocks``, in their order, none across stacks; with ``every`` only so many starts apart. Raises
    ValueError unless 1 ≤ k ≤ layers and 1 ≤ every.
    """
    if every < 1:
        raise ValueError(f"Expected every ≥ 1, got {every}.")
    stacks = [list(of_stack) for _, of_stack in groupby(blocks, key=lambda block: block.stack)]
    longest = max(map(len, stacks), default=0)
    if not 1 <= k <= longest:
        raise ValueError(f"A window of {k} layers does not fit: expected 1 ≤ k ≤ {longest}, the layers of a stack.")
    found = [stack[i : i + k] for stack in stacks for i in range(0, len(stack) - k + 1, every)]
    return {(window[0].stack, window[0].layer): window for window in found}


def slide(
    blocks: Sequence[Block], k: int, make: Callable[[Sequence[Block]], Plan], score: Score, *, every: int = 1
) -> tuple[Plan, list[dict]]:
    """The best of the plans that ``make`` makes of every k neighbours among ``blocks``; of equal ones the first.

    Args:
        blocks: in order of depth; those of one stack, or of several for the best window in any of them.
        make: ``partial(merge_mlps, units=units)``, :func:`merge_mlps` for the unmatched control, :func:`drop_mlps` with k − 1
            for as many parameters, ``partial(drop_layers, model)``.
        score: {start: plan} → {start: score}, the lower the better, on validation data, never on held-out data.
            ``{s: m.mean_kl for s, m in compare(model, plans, windows).items()}`` for a causal language model;
            :func:`~mlpreplace.tune.losses` for any model.
        every: tries only starts so many layers apart.

    Returns:
        The best plan, and one record a window: stack, start, layers (k), score, best. All plans are held at a time: one MLP
        each when merged.

    Raises:
        ValueError: a k that no stack has room for, scores that are all NaN, what ``make`` raises.
    """
    plans = {start: make(window) for start, window in windows_of(blocks, k, every).items()}
    scores = {start: float(value) for start, value in score(plans).items()}
    usable = [start for start in plans if not math.isnan(scores[start])]
    if not usable:
        raise ValueError(f"Every score is NaN, of {len(plans)} windows of {k} layers.")
    best = min(usable, key=scores.__getitem__)
    about = {start: {"stack": start[0], "start": start[1], "layers": k} for start in plans}
    return plans[best], [{**about[start], "score": scores[start], "best": start == best} for start in plans]


def layers_worth(model: nn.Module, plan: Plan) -> int:
    """How many whole layers, at least one, hold most nearly what ``plan`` saves: layers are no small change.

    Raises ValueError where whole layers cannot be removed, see :func:`~mlpreplace.layers.find_layers`.
    """
    weights = layer_parameters(model)
    return max(1, round(removed_parameters(plan) / (sum(weights) / len(weights))))


def drop_layers(model: nn.Module, layers: Sequence[Block]) -> Plan:
    """The plan without whole ``layers``, blocks from :func:`~mlpreplace.layers.find_layers`.

    Where ``plan`` is merged, ``slide(find_layers(model), layers_worth(model, plan), partial(drop_layers, model), score)`` drops
    as many parameters.
    """
    return without_layers(model, [block.layer for block in layers])


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
        blocks: MLP blocks in order of depth, of one stack.
        units: of ``blocks``, to match them by.
        stats: of ``blocks``, to narrow them by.
        score, every: as :func:`slide` takes them.
        whole_layers: whether as many parameters are dropped with whole layers; False for k − 1 MLPs, and where layers cannot
            be removed (an encoder-decoder).
        cached: keep the permutations on disk.

    Returns:
        Plans, the best window each: "merged", "unpermuted" (averaged as they stand), "dropped", and "replaced" (every block
        narrowed to one width). And the records of all windows, with a method.

    Raises:
        ValueError: what :func:`slide` raises; statistics or units of other blocks.
    """
    if missing := [block.name for block in blocks if block not in stats]:
        raise ValueError(f"{missing[0]} is not in the statistics: capture it first.")
    plans, records = {}, []

    def best(method: str, among: Sequence[Block], size: int, make: Callable[[Sequence[Block]], Plan]) -> None:
        plans[method], tried = slide(among, size, make, score, every=every)
        records.extend({"method": method, **record} for record in tried)

    best("merged", blocks, k, partial(merge_mlps, units=units, cached=cached))
    best("unpermuted", blocks, k, merge_mlps)
    if whole_layers:
        best("dropped", find_layers(model), layers_worth(model, plans["merged"]), partial(drop_layers, model))
    else:
        best("dropped", blocks, k - 1, drop_mlps)
    of_blocks = {block: stats[block] for block in blocks}
    plans["replaced"] = allocate(model, of_blocks, sparsity(model, plans["merged"]), "uniform")
    return plans, records
