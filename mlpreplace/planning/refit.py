"""Solve the output weights of a plan again, front to back.

Fits are made block by block, on the inputs that a block has in the dense model. In place, a replacement has other inputs, since
the blocks before it are replaced as well. :func:`refit` solves its output weights on these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..fitting.fit import unfitted
from ..models.blocks import Block
from ..models.forward import State, copied_state, eval_mode, hidden_states, token_rows, watching
from ..models.inputs import check_batch_size, check_windows
from ..models.walk import Pass, Walk
from ..replacements.families import Family, Replacement
from ..replacements.records import FitReport
from ..replacements.splice import Improved, Plan, bodies, check_plan, copied, spliced
from ..runtime.cache import cached
from ..runtime.memory import WINDOWS, halving, on_disk
from ..runtime.turns import turn
from ..statistics.groups import InGroups, release
from ..statistics.records import Statistics
from .candidates import Choice, fitted_plan
from .read_out import Regression, read_out

TARGETS = ("output", "stream")
RIDGE = 1.0  # without validation windows
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # that validation windows choose among
DAMPING = 1e-2  # for channels to which a norm gives little gain, relative to the mean squared gain


@dataclass(frozen=True)
class _How:
    """What a regression is towards, and its ridges; it reads the first ``fitted`` batches, the others choose among ridges."""

    towards: str
    ridges: tuple[float, ...]
    fitted: int = 0


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

    However many MLPs are refitted, it costs one dense forward pass over ``windows`` and a second pass over the layers from the
    first replaced to the last refitted one; a layer with narrowed attention runs twice in both. Held on the CPU: 5 · tokens ·
    hidden numbers, in the model's dtype.

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
        ridge: λ towards the present weights, relative to the mean of the Gram matrix's diagonal. By default 1.0, or what
            ``validation`` chooses. A fit's own 1e-2 overfits few tokens: on 4,096 of them it raised the perplexity of a
            compressed 135M Llama by 27 %, and 1.0 changed little.
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
        new = _new(plan)
        check_plan(model, new)
        matter = model, plan, new, windows, validation, stats, _How(towards, ridges), size
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
    how: _How,
    batch_size: int,
    *,
    progress: bool,
) -> tuple[list[dict], list[FitReport | None]]:
    """Fit and refit ``new``, whose bodies are ``learners``: the records of blocks, and the reports of first fits."""
    last = max((b.layer for b, r in new.items() if _reads_out(b, r)), default=-1)
    batches, records = list(windows.split(batch_size)), []
    how = replace(how, fitted=len(batches))
    batches += [] if validation is None else validation.split(batch_size)
    dense = compressed = Walk(model, batches)
    with eval_mode(model):
        for layer in tqdm(range(last + 1), desc="refit", unit="layer", disable=not progress, leave=False):
            if layer == min(b.layer for b in plan):
                compressed = dense.branch()
            here = {b: r for b, r in new.items() if b.layer == layer}
            _fill(here, plan, stats)
            release(stats, (b for b in plan if b.layer > layer))
            again = {b.kind: b for b, r in here.items() if _reads_out(b, r)}
            if attention := again.get("attention"):
                solved = _refit_attention(dense, compressed, attention, here, how)
                records.append({"block": attention.name, "layer": layer, **solved})
            if mlp := again.get("mlp"):
                solved = _refit_mlp(dense, compressed, mlp, here, how)
                records.append({"block": mlp.name, "layer": layer, **solved})
            else:
                _run_layer(dense, compressed, here)
            _put_away(here, stats)
        _fill({b: r for b, r in new.items() if b.layer > last}, plan, stats)
    return records, [r.report for r in new.values()]


def _run_layer(dense: Walk, compressed: Walk, here: Plan) -> None:
    """Run the next layer of both walks, the second with ``here`` in place."""
    for i in range(len(dense.batches)):
        dense.step(i)
        if compressed is not dense:
            with spliced(dense.model, here):
                compressed.step(i)


def _put_away(done: Plan, stats: Statistics | None) -> None:
    """Where memory does not hold all statistics, it need not hold what is done."""
    if isinstance(stats, InGroups):
        for weight in bodies(done).parameters():
            if weight.device.type == "cpu":
                weight.data = on_disk(weight.data)


def _reads_out(block: Block, replacement: Replacement) -> bool:
    """Whether it is refitted."""
    if block.kind == "attention" and not replacement.family.attends:
        return False
    return read_out(replacement.family, replacement.body) is not None


def _fill(new: Plan, plan: Choice, stats: Statistics | None) -> None:
    """Fit those of ``new`` that are families in ``plan``."""
    families = {block: family for block in new if isinstance(family := plan[block], Family)}
    for block, fitted in fitted_plan(stats, families, progress=False).items():
        new[block].body.load_state_dict(fitted.body.state_dict(), assign=True)
        new[block].report = fitted.report


def _refit_attention(dense: Walk, compressed: Walk, block: Block, here: Plan, how: _How) -> dict[str, float | None]:
    """Solve the attention of the next layer again, with ``here`` in place. Both walks stay in front of the layer.

    What the block adds makes up for the difference of the two residual streams that enter the layer.
    """
    replacement, regression = here[block], Regression()
    out, ahead, of_compressed = read_out(replacement.family, replacement.body), dense.branch(), compressed.branch()
    for i in range(len(dense.batches)):
        target, read = ahead.step(i, block), []
        with spliced(dense.model, here), watching(out.layer or nn.Identity(), enter=lambda f, _, read=read: read.append(f)):
            present = of_compressed.step(i, block)
        features = read[0] if out.layer else out.features(present.x.to(replacement.precision or present.x.dtype))
        before = _difference(dense.states[i], compressed.states[i], present.y.device)
        regression.add(token_rows(features), *_errors(target, present, how.towards, before), unseen=i >= how.fitted)
        ahead.states[i] = of_compressed.states[i] = None
    return regression.solve(block, out, how.ridges)


def _difference(dense: State | None, compressed: State | None, device: torch.device) -> Tensor | float:
    """Of the residual streams that enter a layer, [tokens, hidden]."""
    if dense is compressed:
        return 0.0
    return token_rows(hidden_states(dense).to(device)) - token_rows(hidden_states(compressed).to(device))


def _refit_mlp(dense: Walk, compressed: Walk, block: Block, here: Plan, how: _How) -> dict[str, float | None]:
    """Run the next layer of both walks, the second with ``here`` in place, and solve the MLP of it again."""
    replacement, regression, inputs = here[block], Regression(), []
    out = read_out(replacement.family, replacement.body)
    first = all(one is other for one, other in zip(dense.states, compressed.states, strict=True))
    for i in range(len(dense.batches)):
        target = dense.step(i, block)
        with spliced(dense.model, here):
            present = compressed.step(i, block)
        if first and len(here) == 1:
            _check_added(block, target, present)
        rest = _without(present)
        features = out.features(present.x.to(replacement.precision or present.x.dtype))
        regression.add(token_rows(features), *_errors(target, present, how.towards), unseen=i >= how.fitted)
        inputs.append(present.x.cpu())
        compressed.states[i] = copied_state(present.with_stream(rest), "cpu")
    solved = regression.solve(block, out, how.ridges)
    for x, state in zip(inputs, compressed.states, strict=True):
        rest = hidden_states(state)
        rest += present.added(replacement(x.to(block.device))).reshape(rest.shape).to(rest.device)
    return solved


def _without(present: Pass) -> Tensor:
    """The residual stream that leaves the layer, without what the block adds to it, [tokens, hidden]."""
    return token_rows(present.stream) - token_rows(present.added(present.y))


def _errors(target: Pass, present: Pass, towards: str, before: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """What to add to the block's output [tokens, hidden], and each token's weight [tokens, 1].

    Args:
        before: difference of the streams in front of the block; where it is not given, that of those behind the layer counts.
    """
    y, added = token_rows(present.y), token_rows(present.added(present.y))
    if towards == "output":
        return token_rows(target.y) - y, torch.ones_like(y[:, :1])
    if before is None:
        return _before_norm(token_rows(target.stream) - token_rows(present.stream), y, added)
    return _before_norm(before + token_rows(target.added(target.y)) - added, y, added)


def _check_added(block: Block, target: Pass, present: Pass) -> None:
    """Raise ValueError unless the two streams differ by what the two blocks add, as they must at the first replaced block."""
    streams = token_rows(target.stream) - token_rows(present.stream)
    added = token_rows(target.added(target.y)) - token_rows(present.added(present.y))
    rounding = 4 * torch.finfo(present.stream.dtype).eps * token_rows(target.stream).norm()
    if (streams - added).norm() > 0.1 * added.norm() + rounding:
        raise ValueError(
            f"{block.name}: its layer does more than add the block's output to the residual stream (it scales it, or normalises "
            "the sum, as BERT does), so the target of a refit is unknown."
        )


def _before_norm(error: Tensor, y: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The change of ``y`` that changes ``added`` by ``error``, and each token's weight, [tokens, 1].

    With a norm between (RMSNorm: added = gain ⊙ y, gain ∝ 1/|y|) to first order: error over gain, without its part along y, which
    the norm removes. Errors of y are weighted by the square of the gain.
    """
    if torch.equal(y, added):
        return error, torch.ones_like(error[:, :1])
    tiny = torch.finfo(y.dtype).tiny
    gain = added * y / y.square().clamp_min(tiny)
    mean_square = gain.square().mean(-1, keepdim=True)
    change = error * gain / (gain.square() + DAMPING * mean_square)
    along = (change * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True).clamp_min(tiny)
    return change - along * y, mean_square
