"""SVD-LLM-type (arXiv 2403.07378): every projection of every block becomes a product of two, of least error in its output.

Written after the paper. As there, all matrices keep the same share of their parameters. What is left out: the update of the
factors from one layer to the next, which the paper adds for high sparsities.
"""

from __future__ import annotations

from torch import nn

from ..planning.candidates import Choice, fitted_plan
from ..replacements.factored import FactoredAttention, FactoredMLP
from ..replacements.splice import Plan
from .calibration import Calibration, least_choice
from .registry import Needs, method

STEPS = 4096  # of the share that is kept
NEEDS = Needs(moments={"mlp": ["input", "hidden"], "attention": ["input", "hidden"]})


@method("svd_llm", title="SVD-LLM-type", removes="ranks of all matrices", paper="2403.07378", needs=NEEDS)
def svd_llm(model: nn.Module, calibration: Calibration, sparsity: float) -> Plan:
    """All projections of attention and MLP blocks factored, at the largest ranks that remove ``sparsity``.

    Raises:
        ValueError: a sparsity that cannot be reached, statistics that are missing.
        NotApplicable: blocks whose projections are not known (experts).
    """
    stats = calibration.of_insides()

    def choices(n: int) -> Choice:
        kept = 1 - n / STEPS
        families = {b: FactoredMLP if b.kind == "mlp" else FactoredAttention for b in stats}
        return {b: family.nearest(b, kept * b.n_params) for b, family in families.items()}

    return fitted_plan(stats, least_choice(choices, STEPS, model, sparsity), cached=calibration.cached)
