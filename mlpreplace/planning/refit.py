"""Solve the output weights of a plan again, front to back.

Fits are made block by block, on the inputs that a block has in the dense model. In place, a replacement has other inputs, since
the blocks before it are replaced as well. :func:`refit` solves its output weights on these.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..fitting.fit import unfitted
from ..models.forward import eval_mode
from ..models.inputs import check_batch_size, check_windows
from ..models.walk import Walk
from ..replacements.families import Family
from ..replacements.records import FitReport
from ..replacements.splice import Improved, Plan, bodies, check_plan, copied
from ..runtime.cache import cached
from ..runtime.memory import WINDOWS, halving, put_away, trim
from ..runtime.turns import turn
from ..statistics.groups import InGroups, release
from ..statistics.records import Statistics
from .candidates import Choice, fitted_plan
from .refit_layer import TARGETS, Refit, reads_out, refit_layer

RIDGE = 1.0  # without validation windows
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # that validation windows choose among


def refit(
    model: nn.Module,
    plan: Choice,
    windows: Tensor,
    stats: Statistics | None = None,
    *,
    validation: Tensor | None = None,
    towards: str = "stream",
    ridge: float | None = None,
    batch_size: int | None = None,
    cached: bool = False,
    progress: bool = True,
) -> Improved:
    """The plan with output weights solved again, front to back, each with the replacements before it in place.

    Refitted are NarrowMLP, TwoLayerMLP, NarrowPlusLinear, Linear, LowRank and Mean where they replace MLP blocks, and
    NarrowAttention; in a layer attention first. Their features (kept neurons and heads, low-rank input directions) do not change,
    nor do other families and maps in the place of attention; what comes after these is fitted with them in place.

    However many blocks are refitted, it costs one dense forward pass over ``windows`` and a second pass over the layers from the
    first replaced to the last refitted one. Held on the CPU: 4 · tokens · hidden numbers, in the model's dtype.

    Args:
        plan: does not change. Each new replacement has the ``.report`` of the first fit. What :func:`~mlpreplace.planning.choose`
            returns is as good: a family is fitted when its layer comes, so that no plan is in memory but the new one.
        windows: token ids to fit on [windows, seq_len].
        stats: what families in ``plan`` are fitted to.
        validation: token ids of other documents [windows, seq_len], which choose λ block by block; never held-out ones. A block
            whose error they find no lower keeps its weights.
        towards: the target. "output" is the output of the dense block in the dense model. "stream" is the residual stream behind
            the layer in the dense model, so that earlier errors are corrected. A norm between the block and the stream (Gemma 2)
            is taken to first order.
        ridge: λ towards the present weights, for feature i relative to σᵢ·mean(σ), σ² the diagonal of the Gram matrix. By default
            1.0, or what ``validation`` chooses. A fit's own 1e-2 overfits few tokens.
        batch_size: windows in one pass, 4 by default. Where memory runs out, all starts again with half as many.
        cached: keep the result on disk, and take it from there.

    Returns:
        The new plan, and one record for each refitted block: block, layer, error (squared error of a token before, in the mean
        and with the weights of the regression), error_left (after, on the same tokens) and ridge (None where weights stayed).

    Raises:
        ValueError: an unknown target, a negative ridge, windows the model cannot read, a plan for another model, a family
            without statistics, an encoder-decoder, a layer that does not just add its block's output (BERT), singular moments at
            ridge 0.
    """
    if towards not in TARGETS:
        raise ValueError(f"Unknown target towards={towards!r}; expected one of {', '.join(TARGETS)}.")
    if ridge is not None and not ridge >= 0:
        raise ValueError(f"Expected ridge ≥ 0, got {ridge}.")
    for ids in (windows,) if validation is None else (windows, validation):
        check_windows(ids, model)
    check_batch_size(batch_size)
    by_default = (RIDGE,) if validation is None else RIDGES
    ridges = by_default if ridge is None else (ridge,)

    def run(size: int) -> Improved:
        trim()  # weights that are not set yet would keep what was freed
        new = _new(plan)
        check_plan(model, new)
        matter = model, plan, new, windows, validation, stats, Refit(towards, ridges), size
        records, reports = _refit(bodies(new), *matter, cached=cached, progress=progress)
        for replacement, report in zip(new.values(), reports, strict=True):
            replacement.report = report
        return Improved(new, records)

    with turn(model):  # also while the plan is copied, in which another thread may have hooks
        return halving(run, batch_size or WINDOWS)


def _new(plan: Choice) -> Plan:
    """A copy of what is fitted, and unfitted replacements for the rest."""
    fitted = copied({block: c for block, c in plan.items() if not isinstance(c, Family)})
    return {block: fitted[block] if block in fitted else unfitted(family, block) for block, family in plan.items()}


@cached("refit", fills="learners", key=lambda learners, new, **matter: matter)
@torch.no_grad()
def _refit(
    learners: nn.Module,
    model: nn.Module,
    plan: Choice,
    new: Plan,
    windows: Tensor,
    validation: Tensor | None,
    stats: Statistics | None,
    how: Refit,
    batch_size: int,
    *,
    progress: bool,
) -> tuple[list[dict], list[FitReport | None]]:
    """Fit and refit ``new``, whose bodies are ``learners``: the records of blocks, and the reports of first fits."""
    last = max((b.layer for b, r in new.items() if reads_out(b, r)), default=-1)
    batches, records = list(windows.split(batch_size)), []
    how = replace(how, fitted=len(batches))
    batches += [] if validation is None else validation.split(batch_size)
    dense = compressed = Walk(model, batches)
    with eval_mode(model):
        for layer in tqdm(range(last + 1), desc="refit", unit="layer", disable=not progress, leave=False):
            if layer == min(b.layer for b in plan):
                compressed = dense.branch()
            trim()  # or the heap keeps more with every layer
            here = {b: r for b, r in new.items() if b.layer == layer}
            _fill(here, plan, stats)
            release(stats, [b for b in plan if b.layer > layer])
            for block, solved in refit_layer(dense, compressed, here, how).items():
                records.append({"block": block.name, "layer": layer, **solved})
            if isinstance(stats, InGroups):  # where memory does not hold all statistics, it need not hold what is done
                put_away(bodies(here))
        _fill({b: r for b, r in new.items() if b.layer > last}, plan, stats)
    return records, [r.report for r in new.values()]


def _fill(new: Plan, plan: Choice, stats: Statistics | None) -> None:
    """Fit those of ``new`` that are families in ``plan``."""
    families = {block: family for block in new if isinstance(family := plan[block], Family)}
    for block, fitted in fitted_plan(stats, families, progress=False).items():
        new[block].body.load_state_dict(fitted.body.state_dict(), assign=True)
        new[block].report = fitted.report
