"""Solve the output weights of a plan again, front to back.

Fits are made block by block, on the inputs that a block has in the dense model. In place, a replacement has other inputs, since
the blocks before it are replaced as well. :func:`refit` solves its output weights on these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..fitting.ridge import centred, least_squares
from ..models.blocks import Block
from ..models.forward import Pass, Walk, copied_state, eval_mode, hidden_states, token_rows
from ..models.inputs import check_batch_size, check_windows
from ..replacements.families import Family, Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, TwoLayerMLP
from ..replacements.splice import Improved, Plan, bodies, check_plan, copied, spliced
from ..runtime.cache import cached
from ..runtime.memory import WINDOWS
from ..runtime.turns import turn

TARGETS = ("output", "stream")
DAMPING = 1e-2  # for channels to which a norm gives little gain, relative to the mean squared gain


@dataclass(frozen=True)
class ReadOut:
    """A module as a linear map of features: g(x) = Σᵢ Wᵢ fᵢ(x) + b."""

    features: Callable[[Tensor], Tensor]  # [..., hidden] → [..., width], all fᵢ side by side
    weights: tuple[nn.Parameter, ...]  # [hidden, width of fᵢ] each
    bias: nn.Parameter | None  # [hidden]


@singledispatch
def read_out(family: Family, body: nn.Module) -> ReadOut | None:
    """The output weights of a family's module; None where the family has none or is not registered."""
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
    batch_size: int | None = None,
    cached: bool = False,
    progress: bool = True,
) -> Improved:
    """The plan with output weights solved again, front to back, each with the replacements before it in place.

    Refitted are NarrowMLP, TwoLayerMLP, NarrowPlusLinear, Linear, LowRank and Mean where they replace MLP blocks. Their features
    (kept neurons, low-rank input directions) do not change, nor do other families and replaced attention; what comes after these
    is fitted with them in place.

    However many blocks are refitted, it costs one dense forward pass over ``windows`` and a second pass over the layers from the
    first replaced to the last refitted one. Held on the CPU: 3 · tokens · hidden numbers, in the model's dtype.

    Args:
        plan: does not change. Each new replacement has the ``.report`` of the first fit.
        windows: token ids to fit on [windows, seq_len].
        towards: the target. "output" is the output of the dense block in the dense model. "stream" is the residual stream behind
            the layer in the dense model, so that earlier errors are corrected. A norm between the block and the stream (Gemma 2)
            is taken to first order.
        ridge: λ towards the present weights, relative to the mean of the Gram matrix's diagonal. A fit's own 1e-2 overfits few
            tokens: on 4,096 of them it raised the perplexity of a compressed 135M Llama by 27 %, and 1.0 changed little.
        batch_size: windows in one pass, 4 by default.
        cached: keep the result on disk, and take it from there.

    Returns:
        The new plan, and one record for each refitted block: block, layer, error (squared error of a token before, in the mean
        and with the weights of the regression) and error_left (after, on the same tokens).

    Raises:
        ValueError: an unknown target, a negative ridge, windows the model cannot read, a plan for another model, an
            encoder-decoder, a layer that does not just add its block's output (BERT), singular moments at ridge 0.
    """
    if towards not in TARGETS:
        raise ValueError(f"Unknown target towards={towards!r}; expected one of {', '.join(TARGETS)}.")
    if not ridge >= 0:
        raise ValueError(f"Expected ridge ≥ 0, got {ridge}.")
    check_windows(windows, model)
    check_batch_size(batch_size)
    with turn(model):  # also while the plan is copied, in which another thread may have hooks
        check_plan(model, plan)
        new = copied(plan)
        matter = model, new, windows, towards, ridge, batch_size or WINDOWS
        return Improved(new, _refit(bodies(new), *matter, cached=cached, progress=progress))


@cached("refit", fills="learners")
@torch.no_grad()
def _refit(
    learners: nn.Module,
    model: nn.Module,
    plan: Plan,
    windows: Tensor,
    towards: str,
    ridge: float,
    batch_size: int,
    *,
    progress: bool,
) -> list[dict]:
    read_outs = {b: out for b, r in plan.items() if b.kind == "mlp" and (out := read_out(r.family, r.body)) is not None}
    first, last = min((b.layer for b in plan), default=0), max((b.layer for b in read_outs), default=-1)
    batches, records = windows.split(batch_size), []
    dense, compressed = Walk(model, batches), Walk(model, batches)
    with eval_mode(model):
        for layer in tqdm(range(last + 1), desc="refit", unit="layer", disable=not progress, leave=False):
            if layer == first:
                compressed.states = list(dense.states)
            here = {b: r for b, r in plan.items() if b.layer == layer}
            block = next((b for b in here if b in read_outs), None)
            out = read_outs.get(block)
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
                rest = _without(present)
                features = out.features(present.x.to(plan[block].precision or present.x.dtype))
                regression.add(token_rows(features), *_errors(target, present, towards))
                inputs.append(present.x.cpu())
                compressed.states[i] = copied_state(present.with_stream(rest), "cpu")
            if block is not None:
                records.append({"block": block.name, "layer": layer, **regression.solve(block, out, ridge)})
                for x, state in zip(inputs, compressed.states, strict=True):
                    rest = hidden_states(state)
                    rest += present.added(plan[block](x.to(block.device))).reshape(rest.shape).to(rest.device)
    return records


def _without(present: Pass) -> Tensor:
    """The residual stream that leaves the layer, without what the block adds to it, [tokens, hidden]."""
    return token_rows(present.stream) - token_rows(present.added(present.y))


def _errors(target: Pass, present: Pass, towards: str) -> tuple[Tensor, Tensor]:
    """What to add to the block's output [tokens, hidden], and each token's weight [tokens, 1]."""
    y = token_rows(present.y)
    if towards == "output":
        return token_rows(target.y) - y, torch.ones_like(y[:, :1])
    return _before_norm(token_rows(target.stream) - token_rows(present.stream), y, token_rows(present.added(present.y)))


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


class _Regression:
    """Ridge regression of errors on features from moments, summed in float64 over batches of weighted tokens."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add(self, f: Tensor, error: Tensor, weight: Tensor) -> None:
        """Features [tokens, width], errors [tokens, hidden], weights [tokens, 1]."""
        wf, we = weight * f, weight * error
        of_batch = [s.double() for s in (weight.sum(), wf.sum(0), we.sum(0), wf.T @ f, wf.T @ error, (we * error).sum())]
        self.sums = [a + b for a, b in zip(self.sums, of_batch, strict=True)] if self.sums else of_batch

    def solve(self, block: Block, out: ReadOut, ridge: float) -> dict[str, float]:
        """Add (FᵀF + λI)⁻¹FᵀE to the weights; a bias takes up the mean, without ridge. Returns a token's squared error, and what
        is left of it.
        """
        n, sum_f, sum_e, ff, fe, ee = self.sums
        error = left = ee / n
        if out.bias is not None:
            ff, fe = centred(ff, sum_f, sum_f, n), centred(fe, sum_f, sum_e, n)
            left = left - sum_e.square().sum() / n**2
        delta = least_squares(block, ff, fe, ridge) if out.weights else fe  # [width, hidden]
        for weight, part in zip(out.weights, delta.split([w.shape[1] for w in out.weights]), strict=True):
            weight.copy_(weight + part.T)
        if out.bias is not None:
            out.bias.copy_(out.bias + (sum_e - sum_f @ delta) / n)
        left = left + ((delta * (ff @ delta)).sum() - 2 * (delta * fe).sum()) / n
        return {"error": error.item(), "error_left": left.item()}
