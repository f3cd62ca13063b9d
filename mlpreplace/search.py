"""Allocation that knows of interaction: damages are priced with the whole plan in place, not block by block.

Damages of single blocks add up while they are small. Later they do not, and a plan that trusts the sum overspends where
blocks were each other's insurance. Each round here prices all candidates at the present plan by one backward pass
(:mod:`~mlpreplace.probe`), solves the knapsack within a trust region, and keeps a proposal only if its measured KL is lower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import Block
from .damage import Candidates, local_damage
from .evaluate import compare
from .knapsack import knapsack
from .probe import Probe, probe
from .replacements import Replacement

Option = Replacement | None  # None: the block stays as it is


def search(
    model: nn.Module,
    plan: Mapping[Block, Replacement],
    candidates: Candidates,
    windows: Tensor,
    *,
    rounds: int = 4,
    radii: Sequence[float] = (1 / 16, 1 / 8),
    batch_size: int = 2,
    progress: bool = True,
) -> tuple[dict[Block, Replacement], list[dict]]:
    """A plan of lower KL divergence that saves as much as ``plan`` does, by sequential linear programming.

    With δ what a candidate changes in its block's output, the price of choosing it is E gᵀδ + κ E ‖δ‖² / ‖r‖²: the
    gradient g of KL at the present plan, and a curvature κ, isotropic over the residual stream r, that is the present KL
    over the present sum of local damages.

    Args:
        plan: where to start, made of ``candidates``.
        candidates: {block: fitted replacements}, with reports of validation error.
        windows: token ids [windows, seq_len] that KL is measured on: validation windows, never held-out ones.
        rounds: at most so many; each costs a backward pass over ``windows`` and a forward pass for each radius.
        radii: trust regions to propose from: how much more or less of its parameters a block may save in one round.

    Returns:
        The best plan measured, and one record per round and radius: round, radius, kl, best_kl (so far, nats per token),
        moved (blocks that changed), tokens (forwarded so far, a backward pass counted as two).

    Raises:
        ValueError: a replacement in ``plan`` that is no candidate, candidates without validation error.
    """
    options: dict[Block, list[Option]] = {block: [None, *fitted] for block, fitted in candidates.items()}
    chosen = {block: 0 for block in options}
    for block, replacement in plan.items():
        where = [i for i, option in enumerate(options.get(block, ())) if option is replacement]
        if not where:
            raise ValueError(f"{replacement} of {block.name} is not among the candidates.")
        chosen[block] = where[0]
    local = {block: [0.0, *damages] for block, damages in local_damage(candidates).items()}
    savings = {b: [0 if o is None else b.n_params - o.n_params for o in of_block] for b, of_block in options.items()}
    target = sum(savings[block][i] for block, i in chosen.items())

    history, tokens, best_kl = [], 0, None
    for number in range(rounds):
        near = {block: _near(block, savings[block], chosen[block], max(radii)) for block in options}
        batches = probe(model, _plan(options, chosen), options, windows, batch_size=batch_size, progress=progress)
        best_kl, terms = _priced(batches, options, chosen, near, windows)
        curvature = best_kl / max(sum(local[block][i] for block, i in chosen.items()), 1e-12)
        proposals = {}
        for radius in radii:
            within = {block: [i for i in near[block] if i in _near(block, savings[block], chosen[block], radius)] for block in near}
            prices = {b: [terms[b][i][0] + curvature * terms[b][i][1] for i in of_block] for b, of_block in within.items()}
            saved = {b: [savings[b][i] for i in of_block] for b, of_block in within.items()}
            picked = knapsack(saved, prices, target, exactly_one=True)
            proposals[radius] = {block: within[block][i] for block, i in picked.items()}
        measured = compare(model, {r: _plan(options, p) for r, p in proposals.items()}, windows, progress=progress)
        tokens += windows.numel() * (4 + len(proposals) + 1)
        kls = {radius: measured[radius].mean_kl for radius in proposals}
        best = min(kls, key=kls.__getitem__)
        improved = kls[best] < best_kl
        before, best_kl = chosen, min(best_kl, kls[best])
        chosen = proposals[best] if improved else chosen
        for radius, proposal in proposals.items():
            moved = sum(proposal[block] != before[block] for block in proposal)
            record = {"round": number, "radius": radius, "kl": kls[radius], "best_kl": best_kl, "moved": moved}
            history.append(record | {"tokens": tokens})
        if not improved:
            break
    return _plan(options, chosen), history


def _plan(options: Mapping[Block, Sequence[Option]], chosen: Mapping[Block, int]) -> dict[Block, Replacement]:
    return {block: options[block][i] for block, i in chosen.items() if options[block][i] is not None}


def _near(block: Block, savings: Sequence[int], present: int, radius: float) -> list[int]:
    """Options whose saving differs from the present one's by no more than ``radius`` of the block's parameters. A dense
    attention block cannot be priced where it was replaced: it needs more than its input.
    """
    near = [i for i, saving in enumerate(savings) if abs(saving - savings[present]) <= radius * block.n_params + 1]
    return near if block.kind == "mlp" else [i for i in near if i or i == present]


def _priced(batches, options, chosen, near, windows: Tensor) -> tuple[float, dict[Block, dict[int, tuple[float, float]]]]:
    """KL of the present plan in nats per token, and {block: {option: (E gᵀδ, E ‖δ‖² / ‖r‖²)}} for the options near it."""
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    loss = 0.0
    sums = {block: {i: [0.0, 0.0] for i in of_block} for block, of_block in near.items()}
    for of_batch, probes in batches:
        loss += of_batch
        for block, p in probes.items():
            for i in near[block]:
                if i == chosen[block]:
                    continue
                delta = _output(block, options[block][i], options[block][chosen[block]], p)
                sums[block][i][0] += (delta * p.gradient).sum().item() / predicted
                sums[block][i][1] += (delta.square().sum(-1) / p.residual_energy).mean().item() * len(p.x) / len(windows)
    return loss / predicted, sums


@torch.no_grad()
def _output(block: Block, option: Option, present: Option, p: Probe) -> Tensor:
    """What choosing ``option`` would change in the block's output, δ [windows, seq_len, hidden]."""
    if option is not None:
        return option(p.x).float() - p.y.float()
    hidden = p.x
    for module in block.modules:
        hidden = module(hidden)
    return hidden.float() - p.y.float()
