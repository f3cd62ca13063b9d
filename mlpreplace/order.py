"""What can be done about a plan once it is made: refit its weights in order, roll back choices that were bad.

Fits are made block by block, on what the dense model gives a block. In place, a replacement is given what those before it
left. :func:`refit` solves its output weights again on that; :func:`rollback` takes a replacement out and saves elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .algebra import centred, least_squares
from .blocks import Block
from .cache import Entry
from .capture import _tensor
from .damage import Candidates, local_damage
from .evaluate import compare
from .knapsack import greedy
from .models import check_windows, eval_mode
from .replacements import Family, Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, Replacement, TwoLayerMLP
from .splice import Plan, bodies, copied, removed_parameters, spliced
from .walk import Pass, Walk, moved

TARGETS = ("output", "stream")
DAMPING = 1e-2  # of channels that a norm hardly lets through, relative to their mean gain


@dataclass(frozen=True)
class ReadOut:
    """A module as a linear map of features: g(x) = Σᵢ Wᵢ fᵢ(x) + b."""

    features: Callable[[Tensor], Tensor]  # [..., hidden] → [..., width], all fᵢ side by side
    weights: tuple[nn.Parameter, ...]  # [hidden, width of fᵢ] each
    bias: nn.Parameter | None  # [hidden]


@singledispatch
def read_out(family: Family, body: nn.Module) -> ReadOut | None:
    """The output weights of a family's module; None where it does not end in such weights, or is not known to."""
    return None


@read_out.register
def _(family: Mean, body: nn.Module) -> ReadOut:
    return ReadOut(lambda x: x[..., :0], (), body.bias)


@read_out.register
def _(family: Linear, body: nn.Module) -> ReadOut:
    return ReadOut(lambda x: x, (body.weight,), body.bias)


@read_out.register
def _(family: LowRank, body: nn.Module) -> ReadOut:
    return ReadOut(body[0], (body[1].weight,), body[1].bias)


@read_out.register(NarrowMLP)
@read_out.register(TwoLayerMLP)
def _(family: Family, body: nn.Module) -> ReadOut:
    return ReadOut(body.neurons, (body.down.weight,), body.down.bias)


@read_out.register
def _(family: NarrowPlusLinear, body: nn.Module) -> ReadOut:
    inward, outward = body.linear
    weights = body.mlp.down.weight, outward.weight
    return ReadOut(lambda x: torch.cat([body.mlp.neurons(x), inward(x)], -1), weights, outward.bias)


def refit(
    model: nn.Module,
    plan: Plan,
    windows: Tensor,
    *,
    towards: str = "stream",
    ridge: float = 1.0,
    batch_size: int = 4,
    cached: bool = False,
    progress: bool = True,
) -> dict[Block, Replacement]:
    """The plan with output weights solved again, front to back, each with the replacements before it in place.

    Refitted are NarrowMLP, TwoLayerMLP, NarrowPlusLinear, Linear, LowRank and Mean where they replace MLP blocks; their
    features stay as they are (kept neurons, low-rank input directions). Other families and replaced attention stay as they
    are, but what comes after them is fitted to what they give.

    Costs one dense and one compressed forward pass over ``windows``, and no more than that from the first replaced layer to
    the last, however many blocks are refitted. Held on the CPU: 3 · tokens · hidden numbers, in the model's dtype.

    Args:
        plan: does not change. Its ``.report``\\ s go over to the new plan and remain those of the first fits.
        windows: token ids to fit on [windows, seq_len].
        towards: "output" for what the dense block gives in the dense model, or "stream" for what brings the residual stream
            behind the layer back to the dense one, so that earlier errors are corrected. A norm between the block and the
            stream (Gemma 2) is taken to first order.
        ridge: λ towards the present weights, relative to the mean of the Gram matrix's diagonal. A fit's own 1e-2 overfits few
            tokens: on 4,096 of them it raised the perplexity of a compressed 135M Llama by 27 %, and 1.0 changed little.
        cached: keep the result on disk, and take it from there.

    Raises:
        ValueError: an unknown target, a negative ridge, windows the model cannot read, a plan for another model, an
            encoder-decoder, a layer that does not just add its block's output (BERT), singular moments at ridge 0.
    """
    if towards not in TARGETS:
        raise ValueError(f"Unknown target towards={towards!r}; expected one of {', '.join(TARGETS)}.")
    if not ridge >= 0:
        raise ValueError(f"Expected ridge ≥ 0, got {ridge}.")
    check_windows(windows, model)
    new = copied(plan)
    learners = bodies(new)
    if cached:
        entry = Entry("order", "refit", model, new, windows, towards, ridge, batch_size)
        if (stored := entry.load()) is not None:
            learners.load_state_dict(stored)
            return new
    with spliced(model, new):  # a plan for another model is refused before anything runs
        pass
    with eval_mode(model), torch.no_grad():
        _refit(model, new, windows.split(batch_size), towards, ridge, progress)
    if cached:
        entry.save(learners.state_dict())
    return new


def _refit(model: nn.Module, plan: Plan, batches: Sequence[Tensor], towards: str, ridge: float, progress: bool) -> None:
    read_outs = {b: out for b, r in plan.items() if b.kind == "mlp" and (out := read_out(r.family, r.body)) is not None}
    first, last = min((b.layer for b in plan), default=0), max((b.layer for b in read_outs), default=-1)
    dense, compressed = Walk(model, batches), Walk(model, batches)
    for layer in tqdm(range(last + 1), desc="refit", unit="layer", disable=not progress, leave=False):
        if layer == first:
            compressed.states = list(dense.states)
        here = {b: r for b, r in plan.items() if b.layer == layer}
        block = next((b for b in here if b in read_outs), None)
        regression, inputs = _Regression(), []
        for i in range(len(batches)):
            target = dense.step(layer, i, block)
            if layer < first:
                continue
            with spliced(model, here):
                present = compressed.step(layer, i, block)
            if block is None:
                continue
            if layer == first and len(here) == 1:
                _check_added(block, target, present)
            added = present.added(present.y)
            rest = _rows(present.stream) - _rows(added)  # the stream before the block adds to it
            if towards == "output":
                error, weight = _rows(target.y) - _rows(present.y), torch.ones_like(rest[:, :1])
            else:
                error, weight = _before_norm(_rows(target.stream) - _rows(present.stream), _rows(present.y), _rows(added))
            regression.add(_rows(read_outs[block].features(present.x)), error, weight)
            inputs.append(present.x.cpu())
            compressed.states[i] = moved(present.with_stream(rest), "cpu")
        if block is not None:
            regression.solve(block, read_outs[block], ridge)
            for x, state in zip(inputs, compressed.states, strict=True):
                rest = _tensor(state)
                rest += present.added(plan[block](x.to(block.device))).reshape(rest.shape).to(rest.device)


def _rows(t: Tensor) -> Tensor:
    """[..., width] → [tokens, width] in at least float32."""
    return t.flatten(0, -2).to(torch.promote_types(t.dtype, torch.float32))


def _check_added(block: Block, target: Pass, present: Pass) -> None:
    """Up to the first replaced block the two models agree: their streams must differ by what the two blocks add."""
    streams = _rows(target.stream) - _rows(present.stream)
    added = _rows(target.added(target.y)) - _rows(present.added(present.y))
    rounding = 4 * torch.finfo(present.stream.dtype).eps * _rows(target.stream).norm()
    if (streams - added).norm() > 0.1 * added.norm() + rounding:
        raise ValueError(
            f"{block.name}: its layer does more than add the block's output to the residual stream (scale it, or normalise "
            "the sum, as BERT does), so that there is no telling what a refit would have to give."
        )


def _before_norm(error: Tensor, y: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """What to add to ``y`` so that ``error`` is added to what the stream gets of it, and each token's weight, [tokens, 1].

    Where a norm stands between (RMSNorm: added = gain ⊙ y, gain ∝ 1/|y|), to first order: error over gain, without its part
    along y, which the norm takes away again. Errors of y count by the square of the gain.
    """
    if torch.equal(y, added):
        return error, torch.ones_like(error[:, :1])
    tiny = torch.finfo(y.dtype).tiny
    gain = added * y / y.square().clamp_min(tiny)
    mean_square = gain.square().mean(-1, keepdim=True)
    change = error * gain / (gain.square() + DAMPING * mean_square)
    along = (change * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True).clamp_min(tiny)
    return change - along * y, mean_square


class _Regression:
    """Ridge regression of errors on features from moments, summed in float64 over batches of weighted tokens."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add(self, f: Tensor, error: Tensor, weight: Tensor) -> None:
        """Features [tokens, width], errors [tokens, hidden], weights [tokens, 1]."""
        wf, we = weight * f, weight * error
        of_batch = [s.double() for s in (weight.sum(), wf.sum(0), we.sum(0), wf.T @ f, wf.T @ error)]
        self.sums = [a + b for a, b in zip(self.sums, of_batch, strict=True)] if self.sums else of_batch

    def solve(self, block: Block, out: ReadOut, ridge: float) -> None:
        """Add (FᵀF + λI)⁻¹FᵀE to the weights. The bias, where there is one, takes up the mean, without ridge."""
        n, sum_f, sum_e, ff, fe = self.sums
        if out.bias is not None:
            ff, fe = centred(ff, sum_f, sum_f, n), centred(fe, sum_f, sum_e, n)
        delta = least_squares(block, ff, fe, ridge) if out.weights else fe  # [width, hidden]
        for weight, part in zip(out.weights, delta.split([w.shape[1] for w in out.weights]), strict=True):
            weight.copy_(weight + part.T)
        if out.bias is not None:
            out.bias.copy_(out.bias + (sum_e - sum_f @ delta) / n)


def rollback(
    model: nn.Module,
    plan: Plan,
    candidates: Candidates,
    windows: Tensor,
    *,
    tries: int = 3,
    rounds: int = 8,
    batch_size: int = 4,
    progress: bool = True,
) -> tuple[dict[Block, Replacement], list[dict]]:
    """Take out replacements that hurt more than their parameters are worth, and save these parameters elsewhere.

    Each round measures the plan without each of its replacements. The few blocks that give most KL for a parameter become
    dense again, one at a time; what is then missing is saved by smaller candidates of other blocks, greedily by local damage.
    The best of these plans is kept if its KL is lower, and the next round starts from it.

    Args:
        plan: any replacements with validation error, candidates or not.
        candidates: {block: fitted replacements}, with validation error; what other blocks may be given.
        windows: token ids [windows, seq_len] that KL is measured on: validation windows, never held-out ones.
        tries: blocks to roll back in a round, one at a time.
        rounds: at most so many; each costs ``tries`` passes over ``windows`` and half a pass for each replacement.

    Returns:
        A plan that saves no less than ``plan`` did, and one record for each try: round, block, params (given back), kl_before,
        kl_after (nats per token), kept.

    Raises:
        ValueError: no validation error, windows the model cannot read, a plan for another model.
    """
    options = {block: [*candidates.get(block, ()), *([plan[block]] if block in plan else ())] for block in {**candidates, **plan}}
    damages = local_damage(options)
    damage = {r: d for block, fitted in options.items() for r, d in zip(fitted, damages[block], strict=True)}
    best, target, history = dict(plan), removed_parameters(plan), []
    how = dict(batch_size=batch_size, progress=progress)
    for number in range(rounds):
        without = {block: {b: r for b, r in best.items() if b != block} for block in best}
        measured = compare(model, {None: best, **without}, windows, **how)
        kl = measured.pop(None).mean_kl
        worth = {block: (kl - m.mean_kl) / max(removed_parameters({block: best[block]}), 1) for block, m in measured.items()}
        proposals = {}
        for block in sorted(worth, key=worth.__getitem__, reverse=True):
            elsewhere = {other: fitted for other, fitted in candidates.items() if other != block}
            proposal = _saving_more(without[block], elsewhere, damage, target)
            if removed_parameters(proposal) >= target and len(proposals) < tries:
                proposals[block] = proposal
        kls = {block: m.mean_kl for block, m in compare(model, proposals, windows, **how).items()}
        chosen = min(kls, key=kls.__getitem__, default=None)
        improved = chosen is not None and kls[chosen] < kl
        for block, after in kls.items():
            record = {"round": number, "block": block.name, "params": block.n_params - best[block].n_params}
            history.append(record | {"kl_before": kl, "kl_after": after, "kept": improved and block == chosen})
        if not improved:
            break
        best = proposals[chosen]
    return best, history


def _saving_more(
    plan: Plan, candidates: Candidates, damage: Mapping[Replacement, float], target: int
) -> dict[Block, Replacement]:
    """``plan`` with smaller candidates until it saves ``target`` (or none is left), least added local damage first."""
    saved = {block: removed_parameters({block: plan[block]}) if block in plan else 0 for block in candidates}
    smaller = {b: [r for r in fitted if b.n_params - r.n_params > saved[b]] for b, fitted in candidates.items()}
    savings = {b: [b.n_params - r.n_params - saved[b] for r in fitted] for b, fitted in smaller.items()}
    added = {b: [damage[r] - (damage[plan[b]] if b in plan else 0) for r in fitted] for b, fitted in smaller.items()}
    choice = greedy(savings, added, target - removed_parameters(plan))
    return dict(plan) | {block: smaller[block][i] for block, i in choice.items()}
