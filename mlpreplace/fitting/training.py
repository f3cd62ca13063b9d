"""Training with Adam: the one loop, its checkpoints, and the block-wise training that goes on from a closed form.

A step of block-wise training needs one block, no vocabulary and no other layer. So it costs milliseconds where distillation of
the whole model costs seconds. Everything is a function of the seed: two runs give the same bits, and so does a run that was
interrupted and started again, since each check leaves a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.forward import check_gradients
from ..replacements.records import TrainingReport
from ..runtime.cache import Entry
from ..statistics.moments import Sample

LOSSES = ("mse", "cosine", "both")
CHUNK = 4096  # tokens at a time where no gradient is needed


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
        if field.name not in ("warmup", "loss") and not value > 0:
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

    loss: Callable[[int], Tensor]  # of a step, with its gradient
    seen: Callable[[int], int]  # tokens or items before a step
    start: Callable[[], float]  # the loss to begin the training curve with
    validation: Callable[[], float]


class TrainingState:
    """The state of a training at a check: parameters, the best of them, Adam's moments and the curves."""

    def __init__(self, learners: nn.Module):
        self.parameters = dict(learners.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), betas=(0.9, 0.99))
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.curves: list[tuple[float, float, float]] = []  # tokens, training loss, validation loss
        self.step, self.seconds = 0, 0.0

    def record(self, tokens: int, train_loss: float, validation_loss: float) -> None:
        if self.curves and validation_loss < min(v for _, _, v in self.curves):
            for name, p in self.parameters.items():
                self.best[name].copy_(p.detach())
        self.curves.append((tokens, train_loss, validation_loss))

    @property
    def checks_since_best(self) -> int:
        losses = [v for _, _, v in self.curves]
        return len(losses) - 1 - losses.index(min(losses))

    def step_with(self, loss: Tensor, learning_rate: float) -> None:
        """One step of Adam down the gradient of ``loss``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def finish(self, name: str, seconds: float, stopped: str) -> TrainingReport:
        """Put the parameters of the best check back."""
        self._set(self.best)
        tokens, train_curve, validation_curve = map(list, zip(*self.curves, strict=True))
        return TrainingReport(name, tokens, train_curve, validation_curve, steps=self.step, seconds=seconds, stopped=stopped)

    def save(self, checkpoint: Entry) -> None:
        adam = self.optimizer.state_dict()
        checkpoint.save([self.parameters, self.best, adam, self.curves, self.step, self.seconds])

    def load(self, checkpoint: Entry) -> bool:
        """Take up what :meth:`save` left; False where there is nothing."""
        if (stored := checkpoint.load()) is None:
            return False
        parameters, self.best, adam, self.curves, self.step, self.seconds = stored
        self._set(parameters)
        self.optimizer.load_state_dict(adam)
        return True

    def _set(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.data.copy_(values[name])


def learn(
    learners: nn.Module,
    objective: Objective,
    how: Tuning,
    *,
    name: str,
    patience: int | None = None,
    checkpoint: Entry | None = None,
    progress: bool = True,
) -> TrainingReport:
    """Train the parameters of ``learners`` in place with Adam and leave them at their best check, which may be the start.

    Also under torch.no_grad().

    Args:
        name: of the loss in the report.
        patience: checks without a new best before stopping; None never stops early.
        checkpoint: where to keep the state of every check, to go on from after an interruption.

    Raises:
        ValueError: a start whose loss is not finite, a call under torch.inference_mode().
    """
    check_gradients(learners)
    state, start, recent, stopped = TrainingState(learners), time.perf_counter(), [], "finished"
    with torch.enable_grad(), tqdm(total=how.steps, desc=name, unit="step", disable=not progress, leave=False) as bar:
        if checkpoint is None or not state.load(checkpoint):
            state.record(0, objective.start(), objective.validation())
            if not all(map(math.isfinite, state.curves[0])):
                raise ValueError(
                    "The loss at the start is not finite: the model, the data or the closed form hold NaN or infinity."
                )
        before = state.seconds
        bar.update(state.step)
        while state.step < how.steps:
            if patience is not None and state.checks_since_best >= patience:
                stopped = "early"
                break
            loss = objective.loss(state.step)
            state.step_with(loss, learning_rate_at(how.learning_rate, how.warmup, state.step, how.steps))
            recent.append(loss.detach())
            bar.update()
            if state.step % how.check_steps and state.step < how.steps:
                continue
            checked = float(np.mean(torch.stack(recent).tolist())), objective.validation()
            recent.clear()
            if not all(map(math.isfinite, checked)):
                stopped = "diverged"
                break
            state.record(objective.seen(state.step), *checked)
            state.seconds = before + time.perf_counter() - start
            bar.set_postfix(validation=f"{checked[1]:.4f}")
            if checkpoint is not None:
                state.save(checkpoint)
    return state.finish(name, before + time.perf_counter() - start, stopped)


class _Pairs:
    """Inputs and outputs to draw minibatches from: single real tokens, or whole windows where a family looks back.

    They stay where the sample is; a minibatch goes to the device and precision of ``like``, a weight of the learner.
    """

    def __init__(self, sample: Sample, loss: str, whole_windows: bool, like: Tensor):
        x, y = sample.x, sample.y  # [windows, seq_len, hidden]
        self.loss, self.like = loss, like
        self.mask = sample.mask if whole_windows else None
        self.x, self.y = (x, y) if whole_windows else (x[sample.mask], y[sample.mask])  # [items, (seq_len,) hidden]
        self.tokens_per_item = x.shape[1] if whole_windows else 1
        energy = y[sample.mask].to(like.dtype).square().sum(-1).mean()  # of a token's output
        self.energy = energy.to(like.device)  # what squared errors are relative to

    def __len__(self) -> int:
        return len(self.x)

    def errors(self, body: nn.Module, items: Tensor | slice) -> Tensor:
        """The loss of each real token of ``items``, [tokens]."""
        g, y = body(self.x[items].to(self.like)), self.y[items].to(self.like)
        if self.mask is not None:
            keep = self.mask[items].to(g.device)
            g, y = g[keep], y[keep]
        mse = (g - y).square().sum(-1) / self.energy if self.loss != "cosine" else 0
        cosine = 1 - torch.cosine_similarity(g, y, dim=-1) if self.loss != "mse" else 0
        return mse + cosine

    @torch.no_grad()
    def mean_error(self, body: nn.Module, most: int | None = None) -> float:
        """The loss over the first ``most`` tokens, or all."""
        step = max(1, CHUNK // self.tokens_per_item)
        items = len(self) if most is None else min(len(self), max(1, most // self.tokens_per_item))
        parts = [self.errors(body, slice(i, min(i + step, items))) for i in range(0, items, step)]
        return torch.cat(parts).double().mean().item()


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
    pairs, unseen = (_Pairs(sample, how.loss, whole_windows, like) for sample in (fitting, validation))
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

    def loss(step: int) -> Tensor:
        epoch, batch = divmod(step, per_epoch)
        return pairs.errors(body, order(epoch)[batch * per_batch : (batch + 1) * per_batch]).mean()

    objective = Objective(
        loss,
        seen=lambda step: step * tokens,
        start=lambda: pairs.mean_error(body, how.check_tokens),
        validation=lambda: unseen.mean_error(body),
    )
    schedule = Tuning(how.epochs * per_epoch, how.learning_rate, how.warmup, max(1, how.check_tokens // tokens))
    options = dict(name=how.loss, patience=how.patience, checkpoint=checkpoint, progress=progress)
    body.requires_grad_(True)
    report = learn(body, objective, schedule, **options)
    body.requires_grad_(False)
    return report
