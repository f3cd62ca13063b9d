"""The simplest of our own: every MLP is narrowed to one and the same width."""

from __future__ import annotations

from torch import nn

from ..planning.allocate import allocate
from ..replacements.splice import Plan
from .calibration import Calibration
from .registry import Needs, method


@method("uniform", title="one width everywhere", removes="width of every MLP", needs=Needs(moments={"mlp": ["hidden"]}))
def uniform(model: nn.Module, calibration: Calibration, sparsity: float) -> Plan:
    """Every MLP narrowed to one width, the largest that removes at least ``sparsity``; experts to a dense MLP of one width."""
    return allocate(model, calibration.of_kinds("mlp"), sparsity, "uniform")
