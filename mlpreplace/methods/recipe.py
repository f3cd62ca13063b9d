"""Our best plan in closed form: neurons and heads by what the loss feels, sizes by a knapsack, output weights front to back."""

from __future__ import annotations

from torch import nn

from ..planning.allocate import choose
from ..planning.candidates import candidate_families
from ..planning.refit import refit
from ..replacements.splice import Plan
from ..statistics.groups import with_effects
from .calibration import Calibration
from .registry import Needs, method

OF_MLPS = Needs(moments={"mlp": ["hidden"]}, effects=True)
OF_ALL = Needs(moments={"mlp": ["input", "hidden", "cross"], "attention": ["input", "hidden"]}, effects=True)


@method(
    "uniform_refit",
    title="one width everywhere, refitted",
    removes="width of every MLP",
    needs=OF_MLPS,
    strategy="uniform",
)
@method("recipe", title="our recipe", removes="widths and ranks of MLPs, heads and widths of attention", needs=OF_ALL)
def recipe(model: nn.Module, calibration: Calibration, sparsity: float, *, strategy: str = "joint") -> Plan:
    """Chosen among candidates for every block by the validation windows, and refitted front to back.

    Kept are the neurons and heads of largest energy and effect, see :func:`~mlpreplace.statistics.fisher_effects`. Candidates are
    priced to second order; of exact knapsacks at several prices of attention the one of least damage together is taken. Ridges of
    the refit are chosen block by block.

    Args:
        strategy: "joint", or "uniform" for one width of all MLPs, which asks for no candidates.

    Raises ValueError where statistics, effects or windows are missing, and what :func:`~mlpreplace.planning.choose` raises.
    """
    windows, validation = calibration.of_text()
    how = dict(cached=calibration.cached, progress=calibration.progress)
    stats = calibration.of_kinds("mlp") if strategy == "uniform" else calibration.of_kinds("mlp", "attention")
    if not calibration.effects:
        raise ValueError('No effects of neurons and heads: calibrate(model, windows, sparsities, methods=["recipe"]).')
    stats = with_effects(stats, calibration.effects)
    priced = {}
    if strategy != "uniform":
        priced = dict(candidates=candidate_families(stats), windows=validation)
    chosen = choose(model, stats, sparsity, strategy, **priced, **how)
    return refit(model, chosen, windows, stats, validation=validation, **how).plan
