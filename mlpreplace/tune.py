"""Training a plan in its place: its replacements learn together from the model's loss, and nothing else changes.

The loss is the caller's: labels of images, translations, next tokens. :mod:`~mlpreplace.heal` is the same training with the
dense model as the teacher. A body that stands in several places is one, and gets the sum of their gradients.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Batch, check_batches, items, on_device
from .blocks import Block
from .cache import Entry, fingerprint
from .layers import Tuned, find_layers, find_parts
from .models import eval_mode
from .replacements import Replacement
from .reports import TrainingReport
from .splice import Plan, bodies, copied, spliced
from .train import TrainingState, learning_rate_at

Loss = Callable[[nn.Module, Batch], Tensor]  # the mean over a batch


@dataclass(frozen=True)
class Tuning:
    """How to tune. Raises ValueError for values that make no sense."""

    steps: int = 32
    learning_rate: float = 3e-4  # of Adam, at the end of the warm-up; decays to zero along a half cosine
    warmup: float = 0.1  # share of the steps
    check_steps: int = 16  # between two looks at the validation data

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"Expected 0 ≤ warmup < 1, got {self.warmup}.")
        for field in fields(self):
            if field.name != "warmup" and not getattr(self, field.name) > 0:
                raise ValueError(f"Expected {field.name} > 0, got {getattr(self, field.name)}.")


@dataclass(frozen=True)
class Course:
    """What a training learns from, with the plan in place."""

    loss: Callable[[int], Tensor]  # of a step, with its gradient
    seen: Callable[[int], int]  # tokens or items that had passed before a step
    start: Callable[[], float]  # the loss to begin the training curve with
    validation: Callable[[], float]


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model computes of the batch's labels; raises ValueError where it has none."""
    if "labels" not in batch:
        raise ValueError(f"No labels among {', '.join(batch)}: give them to the batch, or a loss(model, batch).")
    return model(**batch).loss


def tune(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    validation: Iterable[Batch],
    how: Tuning = Tuning(),
    *,
    loss: Loss = own_loss,
    seed: int = 0,
    cached: bool = False,
    progress: bool = True,
) -> tuple[dict[Block, Replacement], TrainingReport]:
    """Train the replacements of ``plan`` together on a loss of the whole model; neither ``plan`` nor ``model`` changes.

    Everything else stays frozen, unless it is in the plan as well: see :func:`with_rest`. No dropout.

    Args:
        batches: keyword arguments of the model, one batch a step; gone through in random order, again and again if need be.
        validation: batches of other data, which decide the state that is kept; never held-out ones.
        loss: (model, batch on its device) → the batch's mean.
        seed: of the order of batches.
        cached: keep the result on disk; an interrupted tuning goes on at its last check. Only of the model's own loss, which is
            known by its labels.

    Returns:
        The tuned plan, and its curves; ``curve_tokens`` are items here: images, windows, sentences. Where no check beat the
        start, the start is what is returned, and ``report.improved`` says so.

    Raises:
        ValueError: an empty plan, no batches, batches without labels and no loss, a plan for another model, a loss of the
            caller's to be kept.
    """
    if cached and loss is not own_loss:
        raise ValueError("A result is kept by the content of what made it, and a loss(model, batch) has none: cached=False.")
    batches, validation = list(batches), list(validation)
    course = lessons(model, batches, validation, loss, seed)
    tuned, name = copied(plan), getattr(loss, "__name__", "loss")

    def train(checkpoint: Entry | None) -> TrainingReport:
        with learning(model, tuned):
            return learn(model, tuned, course, how, checkpoint=checkpoint, progress=progress, name=name)

    if not cached:
        return tuned, train(None)
    return tuned, kept("tune", fingerprint(model, tuned, sharing(tuned), batches, validation, how, seed), bodies(tuned), train)


def lessons(model: nn.Module, batches: list[Batch], validation: list[Batch], loss: Loss, seed: int) -> Course:
    """One batch a step, in random order, again and again if need be. Raises ValueError where there are no batches."""
    check_batches(batches)
    check_batches(validation, "validation batches")
    sizes = np.array([items(batch) for batch in batches])

    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(batches))

    def seen(step: int) -> int:
        epoch, turn = divmod(step, len(batches))
        return int(epoch * sizes.sum() + sizes[order(epoch)[:turn]].sum())

    def of_step(step: int) -> Tensor:
        epoch, turn = divmod(step, len(batches))
        return loss(model, on_device(batches[order(epoch)[turn]], model))

    return Course(of_step, seen, lambda: _mean(model, batches[:1], loss), lambda: _mean(model, validation, loss))


@torch.no_grad()
def _mean(model: nn.Module, batches: Iterable[Batch], loss: Loss) -> float:
    """Over items."""
    values = [(float(loss(model, on_device(batch, model))), items(batch)) for batch in batches]
    return sum(value * n for value, n in values) / sum(n for _, n in values)


def losses(
    model: nn.Module, plans: Mapping[Hashable, Plan], batches: Iterable[Batch], loss: Loss = own_loss
) -> dict[Hashable, float]:
    """The loss of every plan on the same batches, each batch weighted by its items: {label: loss}. {} is the dense model.

    Args:
        loss: (model, batch on its device) → the batch's mean; anything of which less is better, the share of images that
            are classified wrongly for instance.

    Raises:
        ValueError: no batches, batches without labels and no loss, a plan for another model.
    """
    batches, found = list(batches), {}
    check_batches(batches)
    with eval_mode(model):
        for label, plan in plans.items():
            with spliced(model, plan):
                found[label] = _mean(model, batches, loss)
    return found


def with_rest(model: nn.Module, plan: Plan) -> dict[Block, Replacement]:
    """``plan``, and whatever else has weights in the model's layers as it is (:class:`~mlpreplace.layers.Tuned`): to train all
    layers. Embeddings and head stay frozen, and BERT's norm behind the MLP. Nothing more is saved, and nothing less.

    Raises:
        ValueError: an encoder-decoder, of which ``{b: Replacement(Tuned(), b) for b in find_blocks(model)} | plan`` trains the
            MLPs.
    """
    taken = {path for block in plan for path in block.paths}
    parts = [part for layer in range(len(find_layers(model))) for part in find_parts(model, layer)]
    free = [part for part in parts if not any(f"{path}.".startswith(f"{t}.") for path in part.paths for t in taken)]
    return dict(plan) | {part: Replacement(Tuned(), part) for part in free}


def sharing(plan: Plan) -> list[int]:
    """Which body stands where: equal weights that are tied and such that are not train differently."""
    places = list(bodies(plan))
    return [places.index(replacement.body) for replacement in plan.values()]


def kept(name: str, key: str, learners: nn.Module, train: Callable[[Entry], TrainingReport]) -> TrainingReport:
    """Train ``learners`` in place, or take from disk what training them with the same ``key`` came to."""
    entry, checkpoint = Entry(name, name, key), Entry(name, f"{name}-checkpoint", key)
    if (stored := entry.load()) is not None:
        record = json.loads(bytes(stored.pop("report").tolist()))
        learners.load_state_dict(stored)
        return TrainingReport(**record)
    report = train(checkpoint)
    text = torch.frombuffer(bytearray(json.dumps(asdict(report)).encode()), dtype=torch.uint8)
    entry.save({**learners.state_dict(), "report": text})
    checkpoint.path.unlink(missing_ok=True)
    return report


@contextmanager
def learning(model: nn.Module, plan: Plan) -> Iterator[None]:
    """``model`` in eval mode and frozen, the replacements of ``plan`` not; as it was afterwards, and the plan frozen."""
    if not plan:
        raise ValueError("The plan is empty: there is nothing to train.")
    learners, before = bodies(plan), {p: p.requires_grad for p in model.parameters()}
    if not any(True for _ in learners.parameters()):
        raise ValueError("Nothing in the plan has parameters, as where blocks are only removed: there is nothing to train.")
    try:
        model.requires_grad_(False)
        learners.requires_grad_(True)
        with eval_mode(model):
            yield
    finally:
        learners.requires_grad_(False)
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def learn(
    model: nn.Module,
    plan: Plan,
    course: Course,
    how: Tuning,
    *,
    checkpoint: Entry | None = None,
    progress: bool = True,
    name: str,
) -> TrainingReport:
    """Train ``plan`` in place and leave it at its best check, which may be its start. For use inside :func:`learning`.

    Args:
        checkpoint: where to keep the state of every check, to go on from after an interruption.
        name: of the loss in the report, and of the progress bar.
    """
    with spliced(model, plan):
        return follow(bodies(plan), course, how, checkpoint=checkpoint, progress=progress, name=name)


def follow(
    learners: nn.Module, course: Course, how: Tuning, *, checkpoint: Entry | None, progress: bool, name: str
) -> TrainingReport:
    """Train the parameters of ``learners`` in place and leave them at their best check; arguments as for :func:`learn`."""
    state, start, recent, stopped = TrainingState(learners), time.perf_counter(), [], "finished"
    with tqdm(total=how.steps, desc=name, unit="step", disable=not progress, leave=False) as bar:
        if checkpoint is None or not state.load(checkpoint):
            state.record(0, course.start(), course.validation())
        before = state.seconds
        bar.update(state.step)
        while state.step < how.steps:
            value = course.loss(state.step)
            state.step_with(value, learning_rate_at(how.learning_rate, how.warmup, state.step, how.steps))
            recent.append(value.item())
            bar.update()
            if state.step % how.check_steps and state.step < how.steps:
                continue
            checked = float(np.mean(recent)), course.validation()
            recent.clear()
            if not all(math.isfinite(e) for e in checked):
                stopped = "diverged"
                break
            state.record(course.seen(state.step), *checked)
            state.seconds = before + time.perf_counter() - start
            bar.set_postfix(validation=f"{checked[1]:.4f}")
            if checkpoint is not None:
                state.save(checkpoint)
    return state.finish(name, before + time.perf_counter() - start, stopped)
