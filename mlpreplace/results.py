"""Measured plans as tidy records, with the columns that every comparison of methods shares."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .evaluate import Measurement, perplexity_ratio
from .reports import FitReport
from .splice import Plan, removed_parameters, sparsity

Label = tuple[str, float]  # method, target sparsity


def _seconds(report: FitReport) -> float:
    return report.seconds + (report.training.seconds if report.training else 0)


def result_rows(
    model: nn.Module, plans: Mapping[Label, Plan], measured: Mapping[Label, Measurement], domain: str, *, seed: int = 0
) -> list[dict]:
    """One record a plan: what it removes and what that costs on one domain.

    Args:
        plans: {(method, target sparsity): plan}; exactly one of them empty, the dense model.
        measured: what :func:`~mlpreplace.evaluate.compare` made of the same plans on windows of ``domain``.

    Returns:
        Records with method, sparsity, sparsity_achieved, params_removed_of_total, blocks_replaced, domain, perplexity,
        perplexity_ratio with its 95 % paired-bootstrap interval ci_low, ci_high, kl (nats per token), tokens, fit_seconds.

    Raises:
        ValueError: no dense model among the plans, or more than one.
    """
    dense = [label for label, plan in plans.items() if not plan]
    if len(dense) != 1:
        raise ValueError(f"Expected one empty plan, the dense model, among {len(plans)} plans; found {len(dense)}.")
    total = sum(p.numel() for p in model.parameters())
    rows = []
    for (method, target), plan in plans.items():
        m = measured[method, target]
        ratio = perplexity_ratio(m, measured[dense[0]], seed=seed)
        rows.append(
            {
                "method": method,
                "sparsity": target,
                "sparsity_achieved": sparsity(model, plan),
                "params_removed_of_total": removed_parameters(plan) / total,
                "blocks_replaced": len(plan),
                "domain": domain,
                "perplexity": m.perplexity,
                "perplexity_ratio": ratio.value,
                "ci_low": ratio.low,
                "ci_high": ratio.high,
                "kl": None if m.kl is None else m.mean_kl,
                "tokens": m.n_tokens,
                "fit_seconds": sum(_seconds(r.report) for r in plan.values() if r.report),
            }
        )
    return rows
