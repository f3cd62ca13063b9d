"""Which block gets which replacement under a parameter budget.

A candidate saves parameters and does damage; damages of blocks are taken to add up. Then the best plan is a
multiple-choice knapsack: one choice a block (or none), most damage avoided for a given number of parameters removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor, nn

from .blocks import Block, block_parameters
from .capture import Statistics
from .evaluate import compare
from .fit import fit, fit_all
from .replacements import Family, LowRank, NarrowMLP, Replacement

STRATEGIES = ("uniform", "greedy", "milp")
Candidates = Mapping[Block, Sequence[Replacement]]
Damages = Mapping[Block, Sequence[float]]


def narrow_widths(block: Block, steps: int = 16) -> list[NarrowMLP]:
    """NarrowMLP at ``steps`` − 1 widths, evenly spaced below the block's own."""
    widths = {round(block.intermediate_size * i / steps) for i in range(1, steps)}
    return [NarrowMLP(w) for w in sorted(widths) if w > 0]


def local_damage(candidates: Candidates) -> dict[Block, list[float]]:
    """Held-out error energy over the residual stream's energy, per token: no forward pass is needed.

    Raises ValueError where the statistics had no held-out windows.
    """
    for block, fitted in candidates.items():
        if any(r.report is None or r.report.validation is None for r in fitted):
            raise ValueError(f"{block.name}: no validation error to allocate by. Use capture(..., validation_windows=4) or more.")
    return {block: [r.report.validation.damage for r in fitted] for block, fitted in candidates.items()}


def measured_damage(
    model: nn.Module, candidates: Candidates, windows: Tensor, *, progress: bool = True
) -> dict[Block, list[float]]:
    """KL divergence to the dense model when a candidate alone is in place, nats per token on ``windows``."""
    plans = {(block, i): {block: r} for block, fitted in candidates.items() for i, r in enumerate(fitted)}
    measured = compare(model, plans, windows, progress=progress)
    return {block: [measured[block, i].mean_kl for i in range(len(fitted))] for block, fitted in candidates.items()}


def _savings(candidates: Candidates) -> dict[Block, list[int]]:
    return {block: [block.n_params - r.n_params for r in fitted] for block, fitted in candidates.items()}


def _hull(savings: Sequence[int], damages: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of damage over saving, from the point (0, 0) of the untouched block on."""
    points = sorted((s, d, i) for i, (s, d) in enumerate(zip(savings, damages, strict=True)) if s > 0)
    hull: list[tuple[float, float, int]] = [(0, 0.0, -1)]
    for s, d, i in points:
        while len(hull) > 1:
            (s0, d0, _), (s1, d1, _) = hull[-2:]
            if (d1 - d0) * (s - s0) < (d - d0) * (s1 - s0):
                break
            hull.pop()
        if s > hull[-1][0]:
            hull.append((s, d, i))
    return [i for _, _, i in hull[1:]]


def greedy(savings: Mapping[Block, Sequence[int]], damages: Damages, target: float) -> dict[Block, int]:
    """Choices {block: candidate} by the least added damage per parameter saved, until ``target`` is saved.

    Along each block's convex hull, which is what makes greed optimal but for the last step; that step takes the
    smallest candidate that reaches the target.
    """
    steps = []
    for block in savings:
        s0, d0 = 0, 0.0
        for i in _hull(savings[block], damages[block]):
            s1, d1 = savings[block][i], damages[block][i]
            steps.append(((d1 - d0) / (s1 - s0), len(steps), block, i))
            s0, d0 = s1, d1
    choice: dict[Block, int] = {}
    saved = 0
    for _, _, block, i in sorted(steps, key=lambda step: step[:2]):
        if saved >= target:
            break
        without = saved - (savings[block][choice[block]] if block in choice else 0)
        enough = [j for j, s in enumerate(savings[block]) if without + s >= target and s <= savings[block][i]]
        choice[block] = min(enough, key=lambda j: damages[block][j], default=i)
        saved = without + savings[block][choice[block]]
    return choice


def knapsack(savings: Mapping[Block, Sequence[int]], damages: Damages, target: float) -> dict[Block, int]:
    """Choices {block: candidate} of least summed damage that save at least ``target``: exact, by scipy's HiGHS."""
    items = [(block, i) for block in savings for i in range(len(savings[block]))]
    rows = {block: n for n, block in enumerate(savings)}
    one_each = csr_array((np.ones(len(items)), ([rows[b] for b, _ in items], range(len(items)))), shape=(len(rows), len(items)))
    saving = np.array([[savings[b][i] for b, i in items]], dtype=float)
    cost = np.array([damages[b][i] for b, i in items])
    result = milp(
        c=cost / max(cost.max(), np.finfo(float).tiny),  # the solver's own gap is absolute
        constraints=[LinearConstraint(one_each, ub=1), LinearConstraint(saving / max(target, 1), lb=target / max(target, 1))],
        integrality=np.ones(len(items)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise ValueError(f"No plan saves {target:,.0f} parameters: {result.message}")
    return {b: i for (b, i), x in zip(items, result.x, strict=True) if x > 0.5}


def _uniform(model: nn.Module, stats: Statistics, target: float, family: type[Family]) -> dict[Block, Replacement]:
    """Every block alike. NarrowMLP: one width everywhere. LowRank, which cannot be large: as few evenly spaced blocks as
    can save enough, one rank in all of them.
    """
    blocks = [b for b in stats if b.kind == "mlp"]
    if family is NarrowMLP:
        chosen, sizes = blocks, range(blocks[0].intermediate_size, 0, -1)
    elif family is LowRank:
        most = blocks[0].n_params - LowRank(1).n_params(blocks[0])
        n = min(len(blocks), max(1, int(np.ceil(target / most))))
        chosen = [blocks[(2 * i + 1) * len(blocks) // (2 * n)] for i in range(n)]  # the middles of n equal parts
        sizes = range(blocks[0].hidden_size // 2, 0, -1)
    else:
        raise ValueError(f"strategy='uniform' takes NarrowMLP or LowRank, got {family.__name__}.")
    for size in sizes:
        if sum(b.n_params - family(size).n_params(b) for b in chosen) >= target:
            return {b: fit(b, stats, family(size), samples=()) for b in chosen}
    raise ValueError(f"Uniform {family.__name__} cannot save {target:,.0f} parameters.")


def allocate(
    model: nn.Module,
    stats: Statistics,
    sparsity: float,
    strategy: str = "greedy",
    *,
    family: type[Family] = NarrowMLP,
    candidates: Candidates | None = None,
    windows: Tensor | None = None,
    progress: bool = True,
) -> dict[Block, Replacement]:
    """A fitted plan that removes at least ``sparsity`` of the parameters of all attention and MLP blocks.

    Args:
        stats: statistics of the blocks that may be replaced.
        strategy: "uniform" (every block alike), "greedy" (least damage per parameter first) or "milp" (exact knapsack).
        family: what "uniform" uses, NarrowMLP or LowRank.
        candidates: {block: fitted replacements} to choose from; by default NarrowMLP at 15 widths.
        windows: measure each candidate's damage alone as KL on these windows, never held-out ones; without them the
            damage is estimated from the fit reports.

    Raises:
        ValueError: unknown strategy, a sparsity outside (0, 1) or beyond what the candidates can save.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; expected one of {STRATEGIES}.")
    if not 0 < sparsity < 1:
        raise ValueError(f"Expected 0 < sparsity < 1, got {sparsity}.")
    target = sparsity * block_parameters(model)
    if strategy == "uniform":
        return _uniform(model, stats, target, family)
    if candidates is None:
        mlps = [b for b in stats if b.has_neurons]
        candidates = {b: fit_all([b], stats, narrow_widths(b), samples=("validation",), progress=progress)[b] for b in mlps}
    savings = _savings(candidates)
    most = sum(max([0, *s]) for s in savings.values())
    if most < target:
        raise ValueError(
            f"sparsity={sparsity} asks to remove {target:,.0f} parameters, the candidates can save {most:,}: offer smaller ones."
        )
    damages = local_damage(candidates) if windows is None else measured_damage(model, candidates, windows, progress=progress)
    choose: Callable = greedy if strategy == "greedy" else knapsack
    return {block: candidates[block][i] for block, i in choose(savings, damages, target).items()}
