"""Take back choices of a plan that cost more than they save."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..evaluation.perplexity import compare
from ..models.inputs import check_windows
from ..replacements.families import Replacement
from ..replacements.splice import Improved, Plan, removed_parameters
from ..runtime.memory import WINDOWS
from .candidates import Candidates
from .damage import check_kl, local_damage
from .knapsack import greedy


def rollback(
    model: nn.Module,
    plan: Plan,
    candidates: Candidates,
    windows: Tensor,
    *,
    tries: int = 3,
    rounds: int = 8,
    batch_size: int | None = None,
    progress: bool = True,
) -> Improved:
    """Make blocks dense again where that lowers KL most for a parameter, and save these parameters in other blocks.

    Each round measures the plan without each of its replacements. The blocks with the highest KL for a parameter become dense
    again, one at a time. What is then missing is saved by smaller candidates of other blocks, greedily by local damage. The best
    of these plans is kept if its KL is lower, and the next round starts from it.

    Args:
        plan: any replacements with validation error, candidates or not.
        candidates: {block: fitted replacements}, with validation error; what other blocks may be given.
        windows: token ids [windows, seq_len] that KL is measured on: validation windows, never held-out ones.
        tries: blocks to roll back in a round, one at a time.
        rounds: at most; each costs ``tries`` passes over ``windows`` and half a pass for each replacement.
        batch_size: windows in one pass, 4 by default.

    Returns:
        A plan that saves no less than ``plan`` did, and one record for each try: round, block, params (given back), kl_before,
        kl_after (nats per token), kept.

    Raises:
        ValueError: no validation error, windows the model cannot read or of a single token, a plan for another model, damages or
            KL divergences that are not finite.
    """
    check_windows(windows, model, least=2)
    options = {block: [*candidates.get(block, ()), *([plan[block]] if block in plan else ())] for block in {**candidates, **plan}}
    damages = local_damage(options)
    damage = {r: d for block, fitted in options.items() for r, d in zip(fitted, damages[block], strict=True)}
    best, target, history = dict(plan), removed_parameters(plan), []
    how = dict(batch_size=batch_size or WINDOWS, progress=progress)
    for number in range(rounds):
        without = {block: {b: r for b, r in best.items() if b != block} for block in best}
        measured = compare(model, {None: best, **without}, windows, **how)
        check_kl(m.mean_kl for m in measured.values())
        kl = measured.pop(None).mean_kl
        worth = {block: (kl - m.mean_kl) / max(removed_parameters({block: best[block]}), 1) for block, m in measured.items()}
        proposals = {}
        for block in sorted(worth, key=worth.__getitem__, reverse=True):
            elsewhere = {other: fitted for other, fitted in candidates.items() if other != block}
            proposal = _saving_more(without[block], elsewhere, damage, target)
            if removed_parameters(proposal) >= target and len(proposals) < tries:
                proposals[block] = proposal
        kls = {block: m.mean_kl for block, m in compare(model, proposals, windows, **how).items()}
        chosen = min(kls, key=kls.__getitem__, default=None)
        improved = chosen is not None and kls[chosen] < kl
        for block, after in kls.items():
            record = {"round": number, "block": block.name, "params": block.n_params - best[block].n_params}
            history.append(record | {"kl_before": kl, "kl_after": after, "kept": improved and block == chosen})
        if not improved:
            break
        best = proposals[chosen]
    return Improved(best, history)


def _saving_more(plan: Plan, candidates: Candidates, damage: Mapping[Replacement, float], target: int) -> Plan:
    """``plan`` with smaller candidates until it saves ``target`` or none is left; least added local damage first."""
    saved = {block: removed_parameters({block: plan[block]}) if block in plan else 0 for block in candidates}
    smaller = {b: [r for r in fitted if b.n_params - r.n_params > saved[b]] for b, fitted in candidates.items()}
    savings = {b: [b.n_params - r.n_params - saved[b] for r in fitted] for b, fitted in smaller.items()}
    added = {b: [damage[r] - (damage[plan[b]] if b in plan else 0) for r in fitted] for b, fitted in smaller.items()}
    choice = greedy(savings, added, target - removed_parameters(plan))
    return dict(plan) | {block: smaller[block][i] for block, i in choice.items()}
