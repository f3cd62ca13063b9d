"""Our allocation: widths and ranks for every block, chosen by a knapsack over priced candidates."""

from __future__ import annotations

from torch import nn

from ..planning.allocate import allocate
from ..planning.candidates import candidate_families
from ..replacements.splice import Plan
from .calibration import Calibration
from .registry import Needs, method

CANDIDATES = Needs(moments={"mlp": ["input", "hidden", "cross"], "attention": ["input", "hidden"]})


@method("allocated", title="joint allocation", removes="widths and ranks of MLPs, some attention", needs=CANDIDATES)
def allocated(model: nn.Module, calibration: Calibration, sparsity: float) -> Plan:
    """Of ``calibration.candidates``, for attention and MLP blocks alike, those of least damage: the exact knapsack.

    With ``calibration.validation``, attention is tried at several prices: of these plans that of least damage together.
    Damages are ``calibration.damages``; by default of second order on the validation windows, or those of the fit reports.

    Raises what :func:`~mlpreplace.planning.allocate` raises.
    """
    stats = calibration.of_kinds("mlp", "attention")
    strategy = "milp" if calibration.validation is None else "joint"
    choices = dict(candidates=calibration.candidates or candidate_families(stats), damages=calibration.damages)
    return allocate(model, stats, sparsity, strategy, windows=calibration.validation, cached=calibration.cached, **choices)
