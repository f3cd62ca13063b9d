"""Solve the output weights of one layer's replacements again, on what the compressed layers before it give.

Attention comes first and then the MLP. Each part of the layer runs once in the dense model and once in the compressed one: the
MLP is silent while attention is solved, and reads what the solved attention gives, whose features are known by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.blocks import Block
from ..models.forward import State, copied_state, handing_on, hidden_states, token_rows, watching
from ..models.walk import Seen, Walk
from ..replacements.families import Replacement
from ..replacements.splice import Plan, spliced
from .read_out import Regression, read_out

TARGETS = ("output", "stream")
DAMPING = 1e-2  # for channels to which a norm gives little gain, relative to the mean squared gain

Solved = dict[str, float | None]  # the record of a regression
Targets = list[dict[str, Tensor]]  # of each batch {kind of block: [tokens, hidden]}, on the CPU


@dataclass(frozen=True)
class Refit:
    """What a regression is towards, and its ridges; it reads the first ``fitted`` batches, the others choose among ridges."""

    towards: str
    ridges: tuple[float, ...]
    fitted: int = 0


def reads_out(block: Block, replacement: Replacement) -> bool:
    """Whether it is refitted."""
    if block.kind == "attention" and not replacement.family.attends:
        return False
    return read_out(replacement.family, replacement.body) is not None


def refit_layer(dense: Walk, compressed: Walk, here: Plan, how: Refit) -> dict[Block, Solved]:
    """Run the next layer of both walks, the second with ``here`` in place, whose output weights are solved on the way.

    The two may be one walk, where nothing is replaced up to this layer.
    """
    again = {b.kind: b for b, r in here.items() if reads_out(b, r)}
    attention, mlp = again.get("attention"), again.get("mlp")
    targets, records = _targets(dense, compressed, again, how.towards), {}
    if compressed is dense:
        return records
    attended: list[Tensor | None] = [None] * len(targets)
    if attention is not None:
        records[attention], attended = _refit_attention(compressed, attention, here, targets, how)
    if mlp is not None:
        records[mlp] = _refit_mlp(dense, compressed, mlp, here, attended, targets, how)
        return records
    for i in range(len(targets)):
        with _in_place(compressed, here, attended[i]):
            compressed.step(i)
    return records


def _targets(dense: Walk, compressed: Walk, again: Mapping[str, Block], towards: str) -> Targets:
    """Run the next layer of the dense walk, for what the blocks of ``again`` should give.

    That is their output in the dense model; or, towards the stream, what attention should add to the stream of the compressed
    model so that the two become equal. What the MLP should add depends on what attention then gives.
    """
    found: Targets = [{} for _ in dense.batches]
    for i, target in enumerate(found):
        entering = dense.states[i]
        seen = dict(zip(again, dense.step(i, *again.values())[1], strict=True))
        if towards == "output":
            target |= {kind: token_rows(block.y).cpu() for kind, block in seen.items()}
        elif "attention" in seen:
            target["attention"] = token_rows(seen["attention"].added(seen["attention"].y)).cpu()
            if compressed.states[i] is not entering:
                target["attention"] += _rows(entering) - _rows(compressed.states[i])
    return found


def _refit_attention(compressed: Walk, block: Block, here: Plan, targets: Targets, how: Refit) -> tuple[Solved, list[Tensor]]:
    """Solve the attention of the next layer, in front of which the walk stays.

    Returns the record, and what the attention gives for every batch, on the CPU.
    """
    out, regression, features = read_out(here[block].family, here[block].body), Regression(), []
    for i, target in enumerate(targets):
        read: list[Tensor] = []
        with (
            _in_place(compressed, here, silent=[r for b, r in here.items() if b.kind == "mlp"]),
            watching(out.layer, enter=lambda f, _, read=read: read.append(f)),
        ):
            _, (present,) = compressed.step(i, block, stay=True)
        goal = target.pop("attention").to(present.y.device)
        regression.add(token_rows(read[0]), *_errors(goal, present, present.y, how.towards), unseen=i >= how.fitted)
        features.append(read[0].cpu())
    solved, dtype = regression.solve(block, out, how.ridges), present.y.dtype
    return solved, [out.output(f.to(block.device)).to(dtype).cpu() for f in features]


def _refit_mlp(
    dense: Walk, compressed: Walk, block: Block, here: Plan, attended: Sequence[Tensor | None], targets: Targets, how: Refit
) -> Solved:
    """Run the next layer of the compressed walk, and solve its MLP."""
    replacement, regression, inputs = here[block], Regression(), []
    out = read_out(replacement.family, replacement.body)
    with _in_place(compressed, here, attended[0]):
        whole = _rows(compressed.step(0, stay=True)[0])
    for i, target in enumerate(targets):
        with _in_place(compressed, here, attended[i], silent=[replacement]):
            state, (present,) = compressed.step(i, block)
        nothing = present.added(torch.zeros_like(present.y.flatten(0, -2)[0]))  # which is not zero for a norm with a bias
        features = out.features(present.x.to(replacement.precision or present.x.dtype))
        y, rest = out.output(features).to(present.y.dtype), _rows(state) - nothing
        if i == 0:
            _check_added(block, whole - rest, token_rows(present.added(y)), whole)
        goal = target["mlp"].to(rest) if "mlp" in target else _rows(dense.states[i]).to(rest.device) - rest
        regression.add(token_rows(features), *_errors(goal, present, y, how.towards), unseen=i >= how.fitted)
        inputs.append(present.x.cpu())
    solved = regression.solve(block, out, how.ridges)
    for x, state in zip(inputs, compressed.states, strict=True):
        stream = hidden_states(state)
        stream += (present.added(replacement(x.to(block.device))) - nothing).reshape(stream.shape).to(stream.device)
    return solved


@contextmanager
def _in_place(walk: Walk, here: Plan, attended: Tensor | None = None, *, silent: Iterable[Replacement] = ()) -> Iterator[None]:
    """Put ``here`` in place. Attention gives ``attended``, if that is known; the ``silent`` ones give zeros."""
    with spliced(walk.model, here), ExitStack() as stack:
        if attended is not None:
            ((block, attention),) = [(b, r) for b, r in here.items() if b.kind == "attention"]
            stack.enter_context(handing_on([attention], lambda: copied_state(attended, block.device)))
        for replacement in silent:
            stack.enter_context(_giving_zeros(replacement))
        yield


@contextmanager
def _giving_zeros(replacement: Replacement) -> Iterator[None]:
    """Let ``replacement`` give zeros instead of computing."""
    seen: list[Tensor] = []
    precision = torch.float32 if replacement.widens else None
    with (
        watching(replacement, enter=lambda x, _: seen.append(x)),
        handing_on([replacement], lambda: torch.zeros_like(seen.pop(), dtype=precision)),
    ):
        yield


def _rows(state: State) -> Tensor:
    """Hidden states, [tokens, hidden]."""
    return token_rows(hidden_states(state))


def _check_added(block: Block, given: Tensor, added: Tensor, stream: Tensor) -> None:
    """Raise ValueError unless the block gives the residual stream what it adds to it, [tokens, hidden]."""
    rounding = 4 * torch.finfo(stream.dtype).eps * stream.norm()
    if (given - added).norm() > 0.1 * added.norm() + rounding:
        raise ValueError(
            f"{block.name}: its layer does more than add the block's output to the residual stream (it scales it, or normalises "
            "the sum, as BERT does), so the target of a refit is unknown."
        )


def _errors(goal: Tensor, present: Seen, y: Tensor, towards: str) -> tuple[Tensor, Tensor]:
    """What to add to the block's output ``y`` [tokens, hidden], and each token's weight [tokens, 1].

    Args:
        goal: for y, or towards the stream for what the block adds to it, [tokens, hidden].
    """
    rows = token_rows(y)
    if towards == "output":
        return goal - rows, torch.ones_like(rows[:, :1])
    added = token_rows(present.added(y))
    return _before_norm(goal - added, rows, added)


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
