"""Measured plans as tidy records, with the columns that every comparison of methods shares."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from torch import nn

from ..evaluation.perplexity import Estimate, Measurement, perplexity_ratio
from ..fitting.errors import sample_errors
from ..models.blocks import Block
from ..models.parameters import block_parameters
from ..replacements.families import Replacement
from ..replacements.records import SAMPLES, FitReport
from ..replacements.splice import Plan, removed_parameters, sparsity_of
from ..statistics.moments import Sample

Label = tuple[str, float]  # method, target sparsity
Sharing = tuple[str, float, bool]  # method, share of the blocks that is to be saved, whether it was tuned


def report_rows(fitted: Mapping[Block, Iterable[Replacement]], **samples: Mapping[Block, Sample]) -> list[dict]:
    """The fit reports as tidy records, one per block, replacement and split ("train", "validation").

    Args:
        samples: further splits to measure and their samples, as in ``heldout=sample(model, blocks, windows)``.
    """
    rows = []
    for block, r in _each(fitted):
        training = r.report.training
        about = _names(block, r) | {
            "n_params": r.n_params,
            "share_of_block": r.n_params / block.n_params,
            "active_share_of_block": r.n_active_params / block.n_params,
            "tokens": r.report.tokens,
            "trained": training.loss if training else None,
            "improved": training.improved if training else None,
            "fit_seconds": _seconds(r.report),
        }
        reported = {name: getattr(r.report, name) for name in SAMPLES}
        measured = {name: sample_errors(r, by_block[block]) for name, by_block in samples.items()}
        rows += [{**about, "split": name, **asdict(e)} for name, e in {**reported, **measured}.items() if e is not None]
    return rows


def loss_rows(fitted: Mapping[Block, Iterable[Replacement]]) -> list[dict]:
    """The loss curves of trained replacements as tidy records, one per block, replacement and check."""
    rows = []
    for block, r in _each(fitted):
        if (training := r.report.training) is not None:
            curves = zip(training.curve_tokens, training.train_curve, training.validation_curve, strict=True)
            about = _names(block, r) | {"loss": training.loss}
            rows += [about | {"curve_tokens": n, "train_loss": t, "validation_loss": v} for n, t, v in curves]
    return rows


def _each(fitted: Mapping[Block, Iterable[Replacement]]) -> list[tuple[Block, Replacement]]:
    return [(block, replacement) for block, replacements in fitted.items() for replacement in replacements]


def _names(block: Block, replacement: Replacement) -> dict:
    return {"layer": block.layer, "family": type(replacement.family).__name__, "label": str(replacement.family)}


def _seconds(report: FitReport) -> float:
    return report.seconds + (report.training.seconds if report.training else 0)


def result_rows(
    model: nn.Module, plans: Mapping[Label, Plan], measured: Mapping[Label, Measurement], domain: str, *, seed: int = 0
) -> list[dict]:
    """One record a plan: what it removes and what that costs on one domain.

    Args:
        plans: {(method, target sparsity): plan}; exactly one of them empty, the dense model.
        measured: the results of :func:`~mlpreplace.evaluation.compare` for the same plans on windows of ``domain``.

    Returns:
        Records with method, sparsity, sparsity_achieved, params_removed_of_total, blocks_replaced, domain, perplexity,
        perplexity_ratio with its 95 % paired-bootstrap interval ci_low, ci_high, kl (nats per token), tokens, fit_seconds.

    Raises:
        ValueError: no dense model among the plans, or more than one.
    """
    dense = [label for label, plan in plans.items() if not plan]
    if len(dense) != 1:
        raise ValueError(f"Expected one empty plan, the dense model, among {len(plans)} plans; found {len(dense)}.")
    rows = []
    for (method, target), plan in plans.items():
        m = measured[method, target]
        ratio = perplexity_ratio(m, measured[dense[0]], seed=seed)
        rows.append(
            {
                "method": method,
                "sparsity": target,
                **_removed(model, plan),
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


def matched_rows(
    rows: Iterable[dict], measured: Mapping[tuple[str, float, str], Measurement], method: str, *, seed: int = 0
) -> list[dict]:
    """``rows`` with perplexity ÷ that of ``method`` at the sparsity which the plan of the row reached, on the same windows.

    Methods that remove whole layers reach another sparsity than they were asked for. So the log-perplexity of ``method`` is
    interpolated between the two of its plans that remove a little less and a little more, linearly and window by window.

    Args:
        rows: those of :func:`result_rows`, of all domains, the dense model included.
        measured: {(method, target sparsity, domain): measurement} of the same plans.

    Returns:
        The rows with matched_ratio and its 95 % paired-bootstrap interval matched_low, matched_high. They are None where a plan
        removes more than all plans of ``method``.
    """
    rows = list(rows)
    reached: dict[str, list[tuple[float, Measurement]]] = {}
    for r in rows:
        if r["method"] in ("dense", method):
            known = measured[r["method"], r["sparsity"], r["domain"]]
            reached.setdefault(r["domain"], []).append((r["sparsity_achieved"], known))
    matched = []
    for r in rows:
        other = _between(sorted(reached[r["domain"]], key=lambda of: of[0]), r["sparsity_achieved"])
        ratio = other and perplexity_ratio(measured[r["method"], r["sparsity"], r["domain"]], other, seed=seed)
        value, low, high = (ratio.value, ratio.low, ratio.high) if ratio else (None, None, None)
        matched.append({**r, "matched_ratio": value, "matched_low": low, "matched_high": high})
    return matched


def _between(reached: Sequence[tuple[float, Measurement]], sparsity: float) -> Measurement | None:
    """The losses at ``sparsity`` of a method measured at others, in rising order; None beyond the last."""
    place = bisect_left([at for at, _ in reached], sparsity)
    if place == len(reached):
        return None
    above, high = reached[place]
    if place == 0 or above == sparsity:
        return high
    below, low = reached[place - 1]
    share = (sparsity - below) / (above - below)
    return Measurement((1 - share) * low.nll + share * high.nll, high.tokens)


def _removed(model: nn.Module, plan: Plan) -> dict:
    total = sum(p.numel() for p in model.parameters())
    return {"sparsity_achieved": sparsity_of(model, plan), "params_removed_of_total": removed_parameters(plan) / total}


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
        sparsity_achieved, params_removed_of_total, measure, score with its 95 % interval ci_low, ci_high, and tokens (or images
        or sentences).

    Raises:
        KeyError: a plan that was not scored.
    """
    share = sum(block.n_params for block in blocks) / block_parameters(model)
    rows = []
    for (method, saved, tuned), plan in plans.items():
        score = scores[method, saved, tuned]
        about = {"task": task, "domain": domain, "method": method, "saved": saved, "tuned": tuned, "sparsity": saved * share}
        interval = {"score": score.value, "ci_low": score.low, "ci_high": score.high}
        rows.append(about | _removed(model, plan) | {"measure": measure, **interval, "tokens": score.tokens})
    return rows
