"""Measured plans as tidy records, with the columns that every comparison of methods shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .blocks import Block, block_parameters
from .evaluate import Estimate, Measurement, perplexity_ratio
from .reports import FitReport
from .splice import Plan, removed_parameters, sparsity

Label = tuple[str, float]  # method, target sparsity
Sharing = tuple[str, float, bool]  # method, share of the blocks that is to be saved, whether it was tuned


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


def score_rows(
    model: nn.Module,
    blocks: Sequence[Block],
    plans: Mapping[Sharing, Plan],
    scores: Mapping[Sharing, Estimate],
    *,
    task: str,
    domain: str,
    measure: str,
) -> list[dict]:
    """One record a plan of any model, whatever it is measured by.

    Args:
        blocks: of which a share is to be saved.
        plans: {(method, share, tuned): plan}.
        scores: of the same plans.
        task, domain, measure: what the model is for, on which data, and what ``scores`` are.

    Returns:
        Records with task, domain, method, saved, tuned, sparsity (``saved`` as a share of all attention and MLP parameters),
        sparsity_achieved, params_removed_of_total, measure, score with its 95 % interval ci_low, ci_high, and tokens (images and
        sentences are as good).

    Raises:
        KeyError: a plan that was not scored.
    """
    total, parts = sum(p.numel() for p in model.parameters()), block_parameters(model)
    share = sum(block.n_params for block in blocks) / parts
    rows = []
    for (method, saved, tuned), plan in plans.items():
        score, removed = scores[method, saved, tuned], removed_parameters(plan)
        rows.append(
            {
                "task": task,
                "domain": domain,
                "method": method,
                "saved": saved,
                "tuned": tuned,
                "sparsity": saved * share,
                "sparsity_achieved": removed / parts,
                "params_removed_of_total": removed / total,
                "measure": measure,
                "score": score.value,
                "ci_low": score.low,
                "ci_high": score.high,
                "tokens": score.tokens,
            }
        )
    return rows
