"""Allocation that accounts for interaction: candidates are priced with the whole plan in place, not block by block.

Damages of single blocks add up only while they are small. Later two replacements together may cost more than the sum, and a plan
that minimises the sum is not the best. Each round here prices all candidates at the present plan by two backward passes, solves
the knapsack within a trust region, and keeps the proposal only if its measured KL is lower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..evaluation.perplexity import compare
from ..models.blocks import Block
from ..models.forward import check_gradients, eval_mode
from ..models.inputs import check_batch_size, check_windows
from ..replacements.families import Replacement
from ..replacements.splice import Improved, Plan
from ..runtime.cache import cached
from ..runtime.memory import halving
from ..statistics.gradients import OBJECTIVES, probe
from ..statistics.gradients import WINDOWS as PROBED_WINDOWS
from .candidates import Candidates
from .knapsack import knapsack

RADIUS = 1 / 8  # of the trust region: by which share of a block's parameters its saving may change in one round
Option = Replacement | None  # None: the block stays as it is


@cached("search")
def search(
    model: nn.Module,
    plan: Plan,
    candidates: Candidates,
    windows: Tensor,
    *,
    rounds: int = 2,
    batch_size: int | None = None,
    progress: bool = True,
) -> Improved:
    """A plan of lower KL divergence that saves as much as ``plan`` does, by sequential linear programming.

    The price of a candidate that changes its block's output by δ is E gᵀδ + κ/2 E (fᵀδ)². g is the gradient of KL at the present
    plan. f is the gradient of −log p(next tokens), the tokens drawn from the model with the present plan, so that E ffᵀ is its
    Fisher information (see :func:`~mlpreplace.planning.second_order_damage`). Far from the dense model the curvature of KL is
    smaller: κ ≤ 1 is such that the prices of making all blocks dense again add up to what that changes, −KL.

    Args:
        plan: where to start, made of ``candidates``.
        candidates: {block: fitted replacements}, MLP and attention blocks alike.
        windows: token ids [windows, seq_len] that KL is measured on: validation windows, never held-out ones.
        rounds: at most; each costs two backward passes over ``windows`` and a forward pass. In a round, the parameters that a
            block saves may change by an eighth of its own.
        batch_size: windows in one pass, 2 by default. Where memory runs out, a round prices again with half as many.
        cached: keep the result on disk and take it from there.

    Returns:
        The best plan measured, and one record a round: round, kl (of the proposal), moved (blocks that changed), best_kl (so far,
        both in nats per token), tokens (forwarded so far, a backward pass counted as two).

    Raises:
        ValueError: a replacement in ``plan`` that is no candidate, candidates for another model, windows the model cannot
            read or of a single token, prices that are not finite, a call under torch.inference_mode().
    """
    check_windows(windows, model, least=2)
    check_batch_size(batch_size)
    check_gradients(model)
    options: dict[Block, list[Option]] = {block: [None, *fitted] for block, fitted in candidates.items()}
    chosen = _chosen(plan, options)
    savings = {b: [0 if o is None else b.n_params - o.n_params for o in of_block] for b, of_block in options.items()}
    target = sum(savings[block][i] for block, i in chosen.items())
    history, tokens, batch_size = [], 0, batch_size or PROBED_WINDOWS
    for number in range(rounds):
        near = _near(savings, chosen)
        at_present = partial(_priced, model, options, chosen, near, windows, number, progress)
        present_kl, prices = halving(at_present, batch_size)
        saved = {b: [savings[b][i] for i in of_block] for b, of_block in near.items()}
        picked = knapsack(saved, prices, target, exactly_one=True)
        proposal = {block: near[block][i] for block, i in picked.items()}
        moved, kl = sum(proposal[b] != chosen[b] for b in proposal), present_kl
        if moved:
            proposed = _plan(options, proposal)
            kl = compare(model, {"": proposed}, windows, batch_size=batch_size, progress=progress)[""].mean_kl
        tokens += windows.numel() * (7 + 2 * bool(moved))  # dense, two times forward and back; the proposal, and dense again
        improved = kl < present_kl
        best = kl if improved else present_kl
        history.append({"round": number, "kl": kl, "moved": moved, "best_kl": best, "tokens": tokens})
        if not improved:
            break
        chosen = proposal
    return Improved(_plan(options, chosen), history)


def _chosen(plan: Plan, options: Mapping[Block, Sequence[Option]]) -> dict[Block, int]:
    """{block: position of what ``plan`` holds among its options}"""
    chosen = dict.fromkeys(options, 0)
    for block, replacement in plan.items():
        where = [i for i, option in enumerate(options.get(block, ())) if option is replacement]
        if not where:
            raise ValueError(
                f"The plan's {replacement.family} for {block.name} is none of the candidates: "
                "start from a plan that holds the very replacements of candidates."
            )
        chosen[block] = where[0]
    return chosen


def _priced(
    model: nn.Module, options, chosen, near, windows: Tensor, seed: int, progress: bool, batch_size: int
) -> tuple[float, dict[Block, list[float]]]:
    """KL of the present plan in nats per token, and the prices of the options ``near`` it."""
    plan, how = _plan(options, chosen), dict(seed=seed, batch_size=batch_size, progress=progress)
    passes = [probe(model, plan, options, windows, objective, **how) for objective in OBJECTIVES]
    with eval_mode(model):
        present_kl, terms = _terms(zip(*passes, strict=True), options, chosen, near, windows)
    curvature = _curvature(present_kl, [terms[block][0] for block, i in chosen.items() if i])
    return present_kl, {b: [terms[b][i][0] + curvature * terms[b][i][1] for i in of_block] for b, of_block in near.items()}


def _plan(options: Mapping[Block, Sequence[Option]], chosen: Mapping[Block, int]) -> Plan:
    return {block: options[block][i] for block, i in chosen.items() if options[block][i] is not None}


def _near(savings: Mapping[Block, Sequence[int]], chosen: Mapping[Block, int]) -> dict[Block, list[int]]:
    """Options whose saving differs from the present one's by no more than RADIUS of the block's parameters."""
    return {
        block: [i for i, s in enumerate(of_block) if abs(s - of_block[chosen[block]]) <= RADIUS * block.n_params + 1]
        for block, of_block in savings.items()
    }


def _curvature(present_kl: float, back: Sequence[tuple[float, float]]) -> float:
    """κ, from the two terms of making each replaced block dense again."""
    slope, bend = (sum(terms) for terms in zip(*back, strict=True)) if back else (0.0, 0.0)
    return min(max(-(present_kl + slope) / bend, 0.0), 1.0) if bend > 0 else 1.0


@torch.no_grad()
def _terms(passes, options, chosen, near, windows: Tensor) -> tuple[float, dict[Block, dict[int, tuple[float, float]]]]:
    """KL of the present plan in nats per token, and {block: {option: (E gᵀδ, ½ E (fᵀδ)²)}} for the dense block (0) and the
    options near the present one.
    """
    loss = 0.0
    sums = {block: {i: [0.0, 0.0] for i in {0, *of_block}} for block, of_block in near.items()}
    for (of_batch, probes), (_, drawn) in passes:
        loss += of_batch
        while probes:  # each is freed before the next batch runs
            block, p = probes.popitem()
            f = drawn.pop(block).gradient
            for i, terms in sums[block].items():
                if i == chosen[block]:
                    continue
                option = options[block][i]
                changed = p.dense(block) if option is None else p.replaced(block, option)
                delta = changed.float() - p.y.float()  # [windows, seq_len, hidden]
                terms[0] += (delta * p.gradient).sum().item()
                terms[1] += 0.5 * (delta * f).sum(-1).square().sum().item()
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return loss / predicted, {b: {i: (g / predicted, f / predicted) for i, (g, f) in s.items()} for b, s in sums.items()}
