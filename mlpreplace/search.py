"""Allocation that knows of interaction: damages are priced with the whole plan in place, not block by block.

Damages of single blocks add up while they are small. Later they do not, and a plan that trusts the sum overspends where
blocks were each other's insurance. Each round here prices all candidates at the present plan by two backward passes
(:mod:`~mlpreplace.probe`), solves the knapsack within a trust region, and keeps a proposal only if its measured KL is lower.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import Block
from .cache import Entry, fingerprint
from .damage import Candidates
from .evaluate import compare
from .knapsack import knapsack
from .models import eval_mode
from .probe import OBJECTIVES, probe
from .replacements import Replacement

Option = Replacement | None  # None: the block stays as it is


def search(
    model: nn.Module,
    plan: Mapping[Block, Replacement],
    candidates: Candidates,
    windows: Tensor,
    *,
    rounds: int = 2,
    radii: Sequence[float] = (1 / 8,),
    batch_size: int = 2,
    cached: bool = False,
    progress: bool = True,
) -> tuple[dict[Block, Replacement], list[dict]]:
    """A plan of lower KL divergence that saves as much as ``plan`` does, by sequential linear programming.

    With δ what a candidate changes in its block's output, the price of choosing it is E gᵀδ + κ/2 E (fᵀδ)²: g is the
    gradient of KL at the present plan, f that of −log p(next tokens) with the tokens drawn from the present plan's model,
    so that E ffᵀ is its Fisher information (see :func:`~mlpreplace.damage.second_order_damage`). Far from the dense model KL
    bends less than that: κ ≤ 1 is such that the prices of giving all blocks back add up to what it brings, −KL.

    Args:
        plan: where to start, made of ``candidates``.
        candidates: {block: fitted replacements}, MLP and attention blocks alike.
        windows: token ids [windows, seq_len] that KL is measured on: validation windows, never held-out ones.
        rounds: at most so many; each costs two backward passes over ``windows`` and a forward pass for each radius.
        radii: trust regions to propose from: how much more or less of its parameters a block may save in one round.
        cached: keep the result on disk and take it from there.

    Returns:
        The best plan measured, and one record per round and radius: round, radius, kl, best_kl (so far, nats per token),
        moved (blocks that changed), tokens (forwarded so far, a backward pass counted as two).

    Raises:
        ValueError: a replacement in ``plan`` that is no candidate, candidates for another model, windows the model cannot
            read.
    """
    options: dict[Block, list[Option]] = {block: [None, *fitted] for block, fitted in candidates.items()}
    chosen = {block: 0 for block in options}
    for block, replacement in plan.items():
        where = [i for i, option in enumerate(options.get(block, ())) if option is replacement]
        if not where:
            raise ValueError(
                f"The plan's {replacement.family} for {block.name} is none of the candidates: "
                "start from a plan that holds the very replacements of candidates."
            )
        chosen[block] = where[0]
    savings = {b: [0 if o is None else b.n_params - o.n_params for o in of_block] for b, of_block in options.items()}
    target = sum(savings[block][i] for block, i in chosen.items())

    if cached:
        key = fingerprint(model, candidates, list(chosen.values()), windows, rounds, radii, batch_size)
        entry = Entry("search", "search", key)
        if (stored := entry.load()) is not None:
            record = json.loads(bytes(stored["record"].tolist()))
            return _plan(options, dict(zip(options, record["chosen"], strict=True))), record["history"]

    history, tokens = [], 0
    for number in range(rounds):
        near = {radius: _near(savings, chosen, radius) for radius in radii}
        how = {"seed": number, "batch_size": batch_size, "progress": progress}
        passes = [probe(model, _plan(options, chosen), options, windows, objective, **how) for objective in OBJECTIVES]
        with eval_mode(model):
            present_kl, terms = _terms(zip(*passes, strict=True), options, chosen, near[max(radii)], windows)
        curvature = _curvature(present_kl, [terms[block][0] for block, i in chosen.items() if i])
        proposals = {}
        for radius, within in near.items():
            prices = {b: [terms[b][i][0] + curvature * terms[b][i][1] for i in of_block] for b, of_block in within.items()}
            saved = {b: [savings[b][i] for i in of_block] for b, of_block in within.items()}
            picked = knapsack(saved, prices, target, exactly_one=True)
            proposals[radius] = {block: within[block][i] for block, i in picked.items()}
        moved = {radius: sum(proposal[b] != chosen[b] for b in proposal) for radius, proposal in proposals.items()}
        plans = {radius: _plan(options, proposal) for radius, proposal in proposals.items() if moved[radius]}
        measured = compare(model, plans, windows, batch_size=batch_size, progress=progress)
        kls = {radius: measured[radius].mean_kl if radius in measured else present_kl for radius in radii}
        best = min(kls, key=kls.__getitem__)
        improved = kls[best] < present_kl
        tokens += windows.numel() * (7 + len(plans) + bool(plans))  # dense, there and back twice; each proposal, and dense again
        about = {"best_kl": kls[best] if improved else present_kl, "tokens": tokens}
        history += [{"round": number, "radius": r, "kl": kls[r], "moved": moved[r], **about} for r in radii]
        if not improved:
            break
        chosen = proposals[best]
    if cached:
        record = json.dumps({"chosen": list(chosen.values()), "history": history})
        entry.save({"record": torch.frombuffer(bytearray(record.encode()), dtype=torch.uint8)})
    return _plan(options, chosen), history


def _plan(options: Mapping[Block, Sequence[Option]], chosen: Mapping[Block, int]) -> dict[Block, Replacement]:
    return {block: options[block][i] for block, i in chosen.items() if options[block][i] is not None}


def _near(savings: Mapping[Block, Sequence[int]], chosen: Mapping[Block, int], radius: float) -> dict[Block, list[int]]:
    """Options whose saving differs from the present one's by no more than ``radius`` of the block's parameters."""
    return {
        block: [i for i, s in enumerate(of_block) if abs(s - of_block[chosen[block]]) <= radius * block.n_params + 1]
        for block, of_block in savings.items()
    }


def _curvature(present_kl: float, back: Sequence[tuple[float, float]]) -> float:
    """κ, from the two terms of giving each replaced block back."""
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
        while probes:  # each is let go before the next batch runs
            block, p = probes.popitem()
            f = drawn.pop(block).gradient
            for i, terms in sums[block].items():
                if i == chosen[block]:
                    continue
                option = options[block][i]
                delta = (p.dense(block) if option is None else option(p.x)).float() - p.y.float()  # [windows, seq_len, hidden]
                terms[0] += (delta * p.gradient).sum().item()
                terms[1] += 0.5 * (delta * f).sum(-1).square().sum().item()
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return loss / predicted, {b: {i: (g / predicted, f / predicted) for i, (g, f) in s.items()} for b, s in sums.items()}
