"""The multiple-choice knapsack of allocation, in numbers alone: one candidate a block, or none.

``savings`` and ``damages`` hold, for every block, what each of its candidates saves (parameters) and costs (any unit that
adds up).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Savings = Mapping[Hashable, Sequence[int]]
Damages = Mapping[Hashable, Sequence[float]]


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


def greedy(savings: Savings, damages: Damages, target: float) -> dict[Hashable, int]:
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
    choice: dict[Hashable, int] = {}
    saved = 0
    for _, _, block, i in sorted(steps, key=lambda step: step[:2]):
        if saved >= target:
            break
        without = saved - (savings[block][choice[block]] if block in choice else 0)
        enough = [j for j, s in enumerate(savings[block]) if without + s >= target and s <= savings[block][i]]
        choice[block] = min(enough, key=lambda j: damages[block][j], default=i)
        saved = without + savings[block][choice[block]]
    return choice


def knapsack(savings: Savings, damages: Damages, target: float, *, exactly_one: bool = False) -> dict[Hashable, int]:
    """Choices {block: candidate} of least summed damage that save at least ``target``: exact, by scipy's HiGHS.

    Args:
        exactly_one: choose a candidate for every block; otherwise a block may be left out, at no saving and no damage.

    Raises ValueError when no choice saves enough.
    """
    items = [(block, i) for block in savings for i in range(len(savings[block]))]
    rows = {block: n for n, block in enumerate(savings)}
    counts = csr_array((np.ones(len(items)), ([rows[b] for b, _ in items], range(len(items)))), shape=(len(rows), len(items)))
    saving = np.array([[savings[b][i] for b, i in items]], dtype=float)
    cost = np.array([damages[b][i] for b, i in items])
    result = milp(
        c=cost / max(np.abs(cost).max(), np.finfo(float).tiny),  # the solver's own gap is absolute
        constraints=[
            LinearConstraint(counts, lb=1 if exactly_one else 0, ub=1),
            LinearConstraint(saving / max(target, 1), lb=target / max(target, 1)),
        ],
        integrality=np.ones(len(items)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise ValueError(f"No plan saves {target:,.0f} parameters: {result.message}")
    return {b: i for (b, i), x in zip(items, result.x, strict=True) if x > 0.5}
