"""The multiple-choice knapsack of allocation, in numbers alone: at most one candidate a block.

``savings`` and ``damages`` hold, for every block, the parameters that each of its candidates saves and the damage it does, in any
unit that adds up.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Savings = Mapping[Hashable, Sequence[int]]
Damages = Mapping[Hashable, Sequence[float]]


def _check_finite(damages: Damages) -> None:
    """Raise ValueError, naming the blocks, unless every damage is a finite number: no choice could go by it."""
    broken = [getattr(b, "name", str(b)) for b, of_block in damages.items() if not np.isfinite(np.asarray(of_block, float)).all()]
    if broken:
        raise ValueError(f"Damages are not finite for {', '.join(broken)}: check the fits, the model and the windows.")


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


def _front(savings: Sequence[int], damages: Sequence[float]) -> list[int]:
    """Indices of what no other candidate beats, one that saves as much and does no more damage: an optimum needs no others."""
    front: list[int] = []
    for i in sorted(range(len(savings)), key=lambda i: (-savings[i], damages[i], i)):
        if not front or damages[i] < damages[front[-1]]:
            front.append(i)
    return sorted(front)


def greedy(savings: Savings, damages: Damages, target: float) -> dict[Hashable, int]:
    """Choices {block: candidate} by the least added damage per parameter saved, until ``target`` is saved.

    The steps follow each block's lower convex hull, so that the greedy choice is optimal up to the last step. That step takes the
    candidate of least damage that reaches the target and saves no more than the hull's.

    Raises ValueError for a damage that is not finite.
    """
    _check_finite(damages)
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

    Raises:
        ValueError: no choice saves enough, or a damage is not finite.
    """
    _check_finite(damages)
    items = [(block, i) for block in savings for i in _front(savings[block], damages[block])]
    saving = np.array([savings[block][i] for block, i in items], dtype=np.int64)
    cost = np.array([damages[block][i] for block, i in items], dtype=float)
    if not items:
        raise ValueError("There are no candidates to choose from.")
    rows = {block: n for n, block in enumerate(savings)}
    counts = csr_array((np.ones(len(items)), ([rows[b] for b, _ in items], range(len(items)))), shape=(len(rows), len(items) + 1))
    # The solver treats sums within a millionth of the target as equal. So a saving is given as two digits in a base near the
    # root of the target, whose sums it tells apart. One more integer variable carries from the higher digit to the lower one.
    target = math.ceil(target)
    base = max(2, math.isqrt(max(0, target)))
    digits = np.stack([np.append(saving // base, -1), np.append(saving % base, base)])  # [2, items + 1]
    result = milp(
        c=np.append(cost / (np.abs(cost).mean() or 1), 0),  # the solver's own gap is absolute
        constraints=[
            LinearConstraint(counts, lb=1 if exactly_one else 0, ub=1),
            LinearConstraint(digits, lb=divmod(target, base)),
        ],
        integrality=np.ones(len(items) + 1),
        bounds=Bounds(np.append(np.zeros(len(items)), -len(rows)), np.ones(len(items) + 1)),
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise ValueError(f"No plan saves {target:,} parameters: {result.message}")
    return {b: i for (b, i), x in zip(items, result.x, strict=False) if x > 0.5}  # the last is the carry
