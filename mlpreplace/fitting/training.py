"""Training with Adam: the one loop, its checkpoints, and the block-wise training that goes on from a closed form.

A step of block-wise training needs one block, no vocabulary and no other layer. So it costs milliseconds where distillation of
the whole model costs seconds.

Everything is trained in at least float32. At a check, parameters of half precision are measured as they would be returned:
rounded. What is kept is the best of these. (``fit`` trains a module in float32 and rounds it afterwards.)

Everything is a function of the seed: two runs give the same bits, and so does a run that was interrupted and started again at
its last checkpoint. Only a step that runs in parts, since memory ran out, sums in another order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.forward import check_gradients
from ..replacements.records import TrainingReport
from ..runtime.cache import Entry
from ..statistics.moments import Sample
from .pairs import Pairs
from .state import Checkpoints, Masters, TrainingState

LOSSES = ("mse", "cosine", "both")


@dataclass(frozen=True)
class Tuning:
    """The schedule of a training. Raises ValueError for values that make no sense."""

    steps: int = 32
    learning_rate: float = 3e-4  # of Adam, at the end of the warm-up; decays to zero along a half cosine
    warmup: float = 0.1  # share of the steps
    check_steps: int = 16  # between two looks at the validation data; the last step is followed by one

    def __post_init__(self) -> None:
        _check_settings(self)


@dataclass(frozen=True)
class Training:
    """How to train block-wise. Raises ValueError for values that make no sense.

    "mse" is Σ‖g(x) − y‖² / Σ‖y‖², what the closed forms minimise; "cosine" the mean of 1 − cos(g(x), y), blind to length;
    "both" their sum.
    """

    loss: str = "mse"
    epochs: int = 4
    learning_rate: float = 3e-3  # of Adam, at the end of the warm-up; decays to zero along a half cosine
    warmup: float = 0.05  # share of the steps
    batch_tokens: int = 512  # whole windows, at least one, where a family looks back
    check_tokens: int = 8192  # between two looks at the validation windows
    patience: int = 6  # checks without a new best before stopping

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"Unknown loss {self.loss!r}; expected one of {', '.join(LOSSES)}.")
        _check_settings(self)


def _check_settings(how: Tuning | Training) -> None:
    """Raise ValueError unless the warm-up is a share below 1 and every other number is positive."""
    if not 0 <= how.warmup < 1:
        raise ValueError(f"Expected 0 ≤ warmup < 1, got {how.warmup}.")
    for field in fields(how):
        value = getattr(how, field.name)
        if field.name not in ("warmup", "loss") and field.type != "bool" and not value > 0:
            raise ValueError(f"Expected {field.name} > 0, got {value}.")


def learning_rate_at(peak: float, warmup: float, step: int, steps: int) -> float:
    """Linear warm-up to ``peak`` over the share ``warmup`` of the steps, then a half cosine down to zero."""
    done = step / steps
    if done < warmup:
        return peak * (step + 1) / math.ceil(warmup * steps)
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@dataclass(frozen=True)
class Objective:
    """What a training minimises, and how it is measured."""

    losses: Callable[[int, int], Iterable[Tensor]]  # of a step, with gradients, in parts of at most so many items; their sum
    items: int  # of the largest step
    seen: Callable[[int], int]  # tokens or items before a step
    start: Callable[[], float]  # the loss to begin the training curve with
    validation: Callable[[], float]
    unit: str = "window"  # of the items


def learn(
    learners: nn.Module,
    objective: Objective,
    how: Tuning,
    *,
    name: str,
    patience: int | None = None,
    scaled: bool = False,
    checkpoint: Entry | None = None,
    progress: bool = True,
) -> TrainingReport:
    """Train the parameters of ``learners`` in place with Adam and leave them at their best check, which may be the start.

    Half-precision parameters are in float32 while a step runs, and in their own precision at every check and at the end. Also
    under torch.no_grad().

    Args:
        name: of the loss in the report.
        patience: checks without a new best before stopping; None never stops early.
        scaled: whether gradients pass through modules in float16, where small ones vanish unless the loss is scaled.
        checkpoint: where to keep the state, to go on from after an interruption: at checks, as often as takes a few per cent of
            the time.

    Raises:
        ValueError: a start whose loss is not finite, a call under torch.inference_mode().
    """
    check_gradients(learners)
    masters, start, recent, stopped = Masters(learners), time.perf_counter(), [], "finished"
    state = TrainingState(learners, objective.items, objective.unit, scaled)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        bar = stack.enter_context(tqdm(total=how.steps, desc=name, unit="step", disable=not progress, leave=False))
        stack.enter_context(masters.in_float32())
        if checkpoint is None or not state.load(checkpoint):
            with masters.rounded():
                state.record(0, objective.start(), objective.validation())
            if not all(map(math.isfinite, state.curves[0])):
                raise ValueError(
                    "The loss at the start is not finite: the model, the data or the closed form hold NaN or infinity."
                )
        before, checkpoints = state.seconds, Checkpoints(checkpoint, state)
        bar.update(state.step)
        while state.step < how.steps:
            if patience is not None and state.checks_since_best >= patience:
                stopped = "early"
                break
            rate = learning_rate_at(how.learning_rate, how.warmup, state.step, how.steps)
            recent.append(state.step_with(partial(objective.losses, state.step), rate))
            bar.update()
            if state.step % how.check_steps and state.step < how.steps:
                continue
            with masters.rounded():
                checked = float(np.mean(torch.stack(recent).tolist())), objective.validation()
                recent.clear()
                if not all(map(math.isfinite, checked)):
                    stopped = "diverged"
                    break
                state.record(objective.seen(state.step), *checked)
            state.seconds = before + time.perf_counter() - start
            bar.set_postfix(validation=f"{checked[1]:.4f}")
            checkpoints.save()
        return state.finish(name, before + time.perf_counter() - start, stopped)


def train(
    body: nn.Module,
    fitting: Sample,
    validation: Sample,
    how: Training,
    *,
    whole_windows: bool = False,
    seed: int = 0,
    checkpoint: Entry | None = None,
    progress: bool = True,
) -> TrainingReport:
    """Train ``body`` in place with Adam and leave it at its best check, which may be its start.

    Args:
        body: the module as its closed form left it, in at least float32.
        fitting: the pairs to train on; ``validation``: the pairs that decide which check was best and when to stop.
        whole_windows: minibatches of windows instead of single tokens, for modules that look at earlier tokens.
        seed: of the order of minibatches.
        checkpoint: as for :func:`learn`.

    Raises:
        ValueError: no pairs, pairs or a start whose loss is not finite, a call under torch.inference_mode().
    """
    check_gradients(body)
    like = next(body.parameters()).detach()
    pairs, unseen = (Pairs(sample, how.loss, whole_windows, like) for sample in (fitting, validation))
    unseen.energy = pairs.energy
    if not len(pairs) or not len(unseen):
        raise ValueError("Training needs real tokens in the training and in the validation sample.")
    if not pairs.energy.isfinite():
        raise ValueError("The outputs to train on are not finite: check the model (a half-precision overflow?) and the text.")
    per_batch = min(len(pairs), max(1, how.batch_tokens // pairs.tokens_per_item))
    per_epoch, tokens = len(pairs) // per_batch, per_batch * pairs.tokens_per_item

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(pairs))).to(pairs.x.device)

    def losses(step: int, at_once: int) -> Iterator[Tensor]:
        epoch, batch = divmod(step, per_epoch)
        return pairs.losses(body, order(epoch)[batch * per_batch : (batch + 1) * per_batch], at_once)

    objective = Objective(
        losses,
        per_batch,
        seen=lambda step: step * tokens,
        start=lambda: pairs.mean_error(body, how.check_tokens),
        validation=lambda: unseen.mean_error(body),
        unit=pairs.unit,
    )
    schedule = Tuning(how.epochs * per_epoch, how.learning_rate, how.warmup, max(1, how.check_tokens // tokens))
    options = dict(name=how.loss, patience=how.patience, checkpoint=checkpoint, progress=progress)
    body.requires_grad_(True)
    report = learn(body, objective, schedule, **options)
    body.requires_grad_(False)
    return report
