"""Merging feed-forward sublayers (arXiv 2501.06126): hidden units matched, weights averaged, k layers share the result.

Units are matched to those of the anchor, the first layer, by what they give before the activation: the permutation of largest
correlation, and of a gated block the one for which gate and up correlate most together. Each layer keeps its own norm. k − 1
MLPs are saved and no FLOPs: a shared MLP runs in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.blocks import Block
from ..models.weights import MLPWeights
from ..replacements.families import Replacement
from ..replacements.records import FitReport
from ..replacements.splice import Plan
from ..replacements.whole_layers import Merged
from ..statistics.unit_similarity import Units, match


def merge_mlps(blocks: Sequence[Block], units: Units | None = None, *, cached: bool = False) -> Plan:
    """The plan in which ``blocks`` share one MLP: the average of theirs, each with its units in the order of the first's.

    Args:
        blocks: two or more MLP blocks of one stack and of equal form; usually neighbours.
        units: of these blocks, from :func:`~mlpreplace.statistics.capture_units`; None averages weights as they stand, the
            control that shows what matching is worth.
        cached: keep the permutations on disk, and take them from there.

    Returns:
        {block: replacement}, all replacements with the same ``body``: ``splice``, ``heal``, ``tune``, ``save`` and ``load``
        keep it one, and it counts once.

    Raises:
        ValueError: fewer than two blocks; blocks of different stacks, widths or forms, or without neurons; units that were not
            captured.
    """
    _check_mergeable(blocks)
    anchor, *others = blocks
    matches = [None if units is None else match(units, anchor, block, cached=cached) for block in others]
    aligned = [b.weights() if m is None else b.weights().of(m.order) for b, m in zip(others, matches, strict=True)]
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
    """State dict of the MLP that is the mean of all, taken in float64."""
    states = [w.state() for w in weights]
    return {
        name: sum(state[name].to(own.device, torch.float64) for state in states) / len(states) for name, own in states[0].items()
    }


def _check_mergeable(blocks: Sequence[Block]) -> None:
    if not 2 <= len(set(blocks)) == len(blocks):
        raise ValueError(f"Expected two or more different blocks to merge, got {[block.name for block in blocks]}.")
    anchor, *others = blocks
    for block in others:
        if block.stack != anchor.stack:
            raise ValueError(f"{anchor.name} and {block.name} are of different stacks, which are merged apart.")
        if (own := _form(block)) != (first := _form(anchor)):
            raise ValueError(f"Only MLPs of equal form merge: {anchor.name} has {first}, {block.name} {own}.")


def _form(block: Block) -> str:
    """What must agree: sizes, gate and biases, activation, precision."""
    held = {name: tuple(t.shape) for name, t in vars(block.weights()).items() if t is not None}
    return f"{held}, {block.activation}, {block.dtype}"
