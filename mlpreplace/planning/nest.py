"""Several plans in one: nested MLPs that switch between the widths of plans for several sparsities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..models.blocks import NotApplicable
from ..replacements.families import NarrowMLP, Replacement
from ..replacements.nested import NestedMLP
from ..replacements.splice import Plan, replacements_of
from ..statistics.moments import Statistics
from .candidates import fitted_plan


def nest(stats: Statistics, plans: Mapping[float, Plan], *, progress: bool = True, **options) -> Plan:
    """One plan in place of several: its levels have the widths of ``plans``, and one set of parameters is solved for all levels.

    A block that is dense in some plan has all its neurons at that level, and computes what the dense block does. Widths never
    grow with sparsity. Where those of ``plans`` do (a search's may, a greedy allocation's do not), the sparser level gets the
    smaller width, and saves more than its plan: ``sparsity_of(model, narrowed(plan, 0.25))``.

    Args:
        stats: with the "hidden" moment of every block in ``plans``.
        plans: {sparsity: plan of NarrowMLPs}, as of :func:`~mlpreplace.planning.allocate`; {} for the dense model.
        options: those of :func:`~mlpreplace.fitting.fit`; reports are of the least sparse level.

    Returns:
        {block: replacement by a :class:`~mlpreplace.replacements.NestedMLP`}, at the least sparse level. Training and healing
        change the active level only.

    Raises:
        ValueError: no plan, a sparsity outside [0, 1).
        NotApplicable: a replacement that is no NarrowMLP.
    """
    if not plans or not all(0 <= sparsity < 1 for sparsity in plans):
        raise ValueError(f"Expected plans for sparsities in [0, 1), got {list(plans)}.")
    if others := {str(r.family) for plan in plans.values() for r in plan.values() if type(r.family) is not NarrowMLP}:
        raise NotApplicable(f"Only NarrowMLPs can be nested, the plans also hold {', '.join(sorted(others))}: leave these out.")
    families = {}
    for block in dict.fromkeys(block for plan in plans.values() for block in plan):
        levels, width = [], block.intermediate_size
        for sparsity, plan in sorted(plans.items()):
            width = min(width, plan[block].family.width if block in plan else width)
            levels.append((sparsity, width))
        families[block] = NestedMLP(tuple(levels))
    return fitted_plan(stats, families, progress=progress, **options)


def set_sparsity(model: nn.Module, sparsity: float) -> None:
    """Switch every nested replacement in ``model`` to its level for ``sparsity``, from the next call on.

    The model computes less, with views of its weights, and is as large as before. A copy that ``splice`` made is switched alone;
    the plan's replacements stay as they are.

    Raises:
        ValueError: nothing nested in the model, or no level made for ``sparsity``; then nothing has changed.
    """
    nested = [r for r in replacements_of(model).values() if isinstance(r.family, NestedMLP)]
    if not nested:
        raise ValueError("No nested replacement in this model: splice(model, nest(stats, plans)) first.")
    for r, level in [(r, r.family.index(sparsity)) for r in nested]:
        r.body.level = level
        r.family = replace(r.family, active=sparsity)
        r.n_active_params = r.body.n_active_params


def narrowed(plan: Plan, sparsity: float) -> Plan:
    """One level of a nested plan as a plan of NarrowMLPs with weights of its own, to measure it beside others or save it alone.

    Blocks that are dense at the level are left out, replacements that are not nested stay as they are.

    Raises:
        ValueError: no level made for ``sparsity``.
    """
    level = {}
    for block, r in plan.items():
        if not isinstance(r.family, NestedMLP):
            level[block] = r
        elif (width := r.family.widths[i := r.family.index(sparsity)]) < block.intermediate_size:
            level[block] = Replacement(NarrowMLP(width), block)
            level[block].body.load_state_dict(r.body.narrowed(i))
    return level
