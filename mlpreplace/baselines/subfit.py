"""SubFit-style: attention and MLP submodules removed wherever they are, each with a fitted residual bypass.

Written after what arXiv 2606.02559 and descriptions of it say, without its code (which it names,
github.com/eliacunegatti/SubFit, and which was not read for this). What they say: submodules are scored by how little they
change the residual stream, in magnitude and rotation; the lowest go, in no order of depth, until the sparsity is met net of
the bypasses, which add about a tenth of what is removed; attention gets a low-rank map and an MLP one of higher rank, in
closed form. What it leaves open is chosen here, as options of :func:`subfit`: how magnitude and rotation become one score
(their geometric mean), whether it is divided by the parameters saved (it is, or nearly all attention would go before any MLP),
the ranks (a tenth of the block's parameters each, so that an MLP's is the higher one), that every MLP has an input basis of
its own (a description has them share one), the ridge (the fits' own), and that scores and bypasses are of the dense model, not
of one after another. Where the last submodule would remove too much, smaller ones may go in its place: the sparsity is
exceeded by as little as possible.

Descriptions that train the bypasses on next tokens go on from here: :func:`~mlpreplace.heal.heal` trains any plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from ..blocks import Block
from ..closed_form import RIDGE
from ..damage import local_damage
from ..fit import fit, fit_all
from ..replacements import LowRank
from ..stream import StreamStatistics
from .calibration import Calibration, Plan, target_parameters

SCORES = ("magnitude", "rotation", "both", "bypass")


def scores(stream: StreamStatistics, score: str = "both") -> dict[str, float]:
    """{block name: how much it changes the residual stream}.

    "magnitude" is ‖a‖/‖r‖ and "rotation" 1 − cos(r, r + a), means over tokens, a what the block adds to the stream r; "both" is
    their geometric mean, which does not depend on the units of either.
    """
    if score in ("magnitude", "rotation"):
        return dict(getattr(stream, score))
    return {name: math.sqrt(m * max(0.0, stream.rotation[name])) for name, m in stream.magnitude.items()}


def lowest_first(order: Mapping[Block, float], savings: Mapping[Block, int], target: float) -> list[Block]:
    """Blocks of lowest score until ``target`` parameters are saved, of the ways to end that which saves least beyond it.

    Where the next block would save too much, the end is the smallest that saves enough, or first more of those that do not.
    """
    chosen, ends, missing = [], [], target
    left = sorted((block for block in order if savings[block] > 0), key=lambda block: order[block])
    while left:
        enough = [block for block in left if savings[block] >= missing]
        if left[0] in enough or ends:
            ends += [[*chosen, min(enough, key=lambda b: savings[b])]] if enough else []  # min: of equal ones the lowest score
            left = [block for block in left if block not in enough]
        if left:
            chosen.append(left.pop(0))
            missing -= savings[chosen[-1]]
    if not ends:
        raise ValueError(f"All submodules together save {target - missing:,.0f} parameters, {target:,.0f} are asked for.")
    return min(ends, key=lambda end: sum(savings[block] for block in end))


def subfit(
    model: nn.Module,
    calibration: Calibration,
    sparsity: float,
    *,
    score: str = "both",
    per_parameter: bool = True,
    added: float = 0.1,
    ridge: float = RIDGE,
    progress: bool = False,
) -> Plan:
    """Submodules of lowest score replaced by low-rank bypasses, until at least ``sparsity`` is removed net of these.

    Args:
        score: "both", "magnitude" or "rotation" (see :func:`scores`), or "bypass": the bypass's squared error on validation
            windows over the residual stream's energy.
        per_parameter: divide scores by what the removal saves.
        added: parameters of a bypass, as a share of its submodule's.
        ridge: of the bypass fits.

    Raises:
        ValueError: an unknown score, a share outside (0, 1), a sparsity that cannot be reached, statistics that are missing
            or of another model.
    """
    if score not in SCORES:
        raise ValueError(f"Unknown score {score!r}; expected one of {', '.join(SCORES)}.")
    if not 0 < added < 1:
        raise ValueError(f"Expected 0 < added < 1, got {added}.")
    target, stats = target_parameters(model, sparsity), calibration.of_kinds("attention", "mlp")
    families = {block: LowRank.nearest(block, added * block.n_params) for block in stats}
    savings = {block: block.n_params - family.n_params(block) for block, family in families.items()}
    fitted: Plan = {}
    if score == "bypass":
        options = dict(ridge=ridge, samples=("validation",), progress=progress)
        fitted = {b: r for b, family in families.items() for r in fit_all([b], stats, [family], **options)[b]}
        order = {block: of_block[0] for block, of_block in local_damage({b: [r] for b, r in fitted.items()}).items()}
    else:
        by_name = scores(calibration.of_stream(model), score)
        if missing := [block.name for block in stats if block.name not in by_name]:
            raise ValueError(f"The stream's statistics do not know {missing[0]}: they are of another model.")
        order = {block: by_name[block.name] for block in stats}
    if per_parameter:
        order = {block: value / savings[block] if savings[block] > 0 else math.inf for block, value in order.items()}
    chosen = lowest_first(order, savings, target)
    return {block: fitted.get(block) or fit(block, stats, families[block], ridge=ridge) for block in chosen}
