"""Training with the whole plan in place: all replacements learn together, and nothing else changes.

Fits of single blocks cannot see that blocks err together. :func:`tune` minimises any loss of the model: of labels of images, of
translations, of next tokens. :func:`heal` minimises the KL divergence to the dense model's next-token distribution. A body that
stands in several places is one module and gets the sum of their gradients.

In a model of half precision the replacements are in float32 while a step runs, products included
(``torch.set_float32_matmul_precision("high")`` makes these fast on a recent GPU), and everything else stays as it is. They are
measured, kept and returned in their own precision. Through float16 the loss is scaled, so that small gradients do not vanish.

Where memory runs out, a step goes on in parts of its batch, half as many items at a time, and sums their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..fitting.state import is_half
from ..fitting.training import Objective, Tuning, learn
from ..models.architectures import layer_lists
from ..models.forward import check_gradients, checkpointed, eval_mode
from ..models.inputs import Batch, check_batches, check_windows, input_device, items
from ..models.layers import find_layers, find_parts
from ..replacements.families import Replacement
from ..replacements.records import TrainingReport
from ..replacements.splice import Improved, Plan, bodies, check_plan, copied, sharing, spliced
from ..replacements.whole_layers import Tuned
from ..runtime.cache import Entry, cached
from ..runtime.memory import AtOnce
from ..runtime.turns import turn
from .objectives import Loss, batch_objective, distillation, mean_loss, own_loss, teach


@dataclass(frozen=True)
class Healing(Tuning):
    """How to heal. Raises ValueError for values that make no sense."""

    learning_rate: float = 1e-4  # of a 135M-parameter Llama at 25 % sparsity 48 steps take 11 % of the KL, at 3e-4 they take 8 %
    batch_windows: int = 2
    top_k: int = 64  # of the dense model's probabilities; all others are one bucket
    gradient_checkpointing: bool = False  # less memory, a third more time: see :func:`~mlpreplace.models.forward.checkpointed`


def tune(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    validation: Iterable[Batch],
    how: Tuning = Tuning(),  # noqa: B008, it is frozen
    *,
    loss: Loss = own_loss,
    seed: int = 0,
    cached: bool = False,
    progress: bool = True,
) -> Improved:
    """Train the replacements of ``plan`` together on a loss of the whole model; neither ``plan`` nor ``model`` changes.

    Everything else stays frozen, unless it is in the plan as well: see :func:`with_rest`. No dropout.

    Args:
        batches: keyword arguments of the model, one batch a step; gone through in random order, again and again if need be.
        validation: batches of other data, which decide the state that is kept; never held-out ones.
        loss: (model, batch on its device) → the mean over the batch's items.
        seed: of the order of batches.
        cached: keep the result on disk; an interrupted tuning goes on at its last checkpoint. Only of the model's own loss, which
            is known by its labels.

    Returns:
        The tuned plan, and its curves; ``curve_tokens`` are items here: images, windows, sentences. Where no check beat the
        start, the start is what is returned, and ``report.improved`` says so.

    Raises:
        ValueError: an empty plan, no batches, batches without labels and no loss, a plan for another model, a loss of the
            caller's to be kept, a start whose loss is not finite, a call under torch.inference_mode().
    """
    check_gradients(model)
    if cached and loss is not own_loss:
        raise ValueError("A result is kept by the content of what made it, and a loss(model, batch) has none: cached=False.")
    data, name = (list(batches), list(validation)), getattr(loss, "__name__", "loss")
    with turn(model):  # also while the plan is copied, in which another thread may have hooks
        tuned = copied(plan)
        matter = model, tuned, data, how, seed, name, lambda: batch_objective(model, *data, loss, seed)
        return Improved(tuned, _train(bodies(tuned), *matter, cached=cached, progress=progress))


@cached("trained-plan", fills="learners", key=lambda learners, objective, **matter: (sharing(matter["plan"]), matter))
def _train(
    learners: nn.Module,
    model: nn.Module,
    plan: Plan,
    data: tuple,  # what ``objective`` is made of
    how: Tuning,
    seed: int,
    name: str,
    objective: Callable[[], Objective],
    *,
    checkpoint: Entry | None = None,
    progress: bool,
) -> TrainingReport:
    """Train ``learners``, the bodies of ``plan``, in place."""
    if not plan:
        raise ValueError("The plan is empty: there is nothing to train.")
    if not any(True for _ in learners.parameters()):
        raise ValueError("Nothing in the plan has parameters, as where blocks are only removed: there is nothing to train.")
    with eval_mode(model):
        made = objective()  # of the dense model
        with _learning(model, plan, learners):
            scaled = any(p.dtype == torch.float16 for p in model.parameters())
            return learn(learners, made, how, name=name, scaled=scaled, checkpoint=checkpoint, progress=progress)


@contextmanager
def _learning(model: nn.Module, plan: Plan, learners: nn.Module) -> Iterator[None]:
    """``model`` with ``plan`` in place, frozen but for ``learners``. Afterwards these are frozen, too."""
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        learners.requires_grad_(True)
        with spliced(model, plan), ExitStack() as stack:
            for replacement in plan.values():
                if replacement.family.keeps_precision:
                    stack.enter_context(_reading_masters(replacement))
            yield
    finally:
        learners.requires_grad_(False)
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@contextmanager
def _reading_masters(replacement: Replacement) -> Iterator[None]:
    """Let a replacement that takes its input as it is read it in float32 while its half-precision weights are in float32.

    Other families do so by themselves.
    """
    half = next(((p, p.dtype) for p in replacement.body.parameters() if is_half(p)), None)
    if half is None:
        yield
        return
    forward, (weight, own) = replacement.forward, half

    def reading(hidden_states: Tensor) -> Tensor:
        if weight.dtype == own:
            return forward(hidden_states)
        y = forward(hidden_states.to(weight.dtype))
        return y if replacement.widens else y.to(hidden_states.dtype)

    replacement.forward = reading  # on the instance: hooks of the replacement stay in use
    try:
        yield
    finally:
        del replacement.forward


def losses(
    model: nn.Module, plans: Mapping[Hashable, Plan], batches: Iterable[Batch], loss: Loss = own_loss
) -> dict[Hashable, float]:
    """The loss of every plan on the same batches, each batch weighted by its items: {label: loss}. {} is the dense model.

    Args:
        loss: (model, batch on its device) → the batch's mean of anything of which less is better, the share of wrongly classified
            images for instance.

    Raises:
        ValueError: no batches, batches without labels and no loss, a plan for another model.
    """
    batches, found = list(batches), {}
    check_batches(batches)
    at_once = AtOnce(max(map(items, batches)), "item")
    with eval_mode(model):
        for label, plan in plans.items():
            with spliced(model, plan):
                found[label] = mean_loss(model, batches, loss, at_once)
    return found


def with_rest(model: nn.Module, plan: Plan) -> Plan:
    """``plan``, and a :class:`~mlpreplace.replacements.Tuned` for all else that has weights in the layers: to train all layers.

    Embeddings, head and BERT's norm behind the MLP stay frozen. The sparsity stays the same.

    Raises:
        ValueError: an encoder-decoder, of which ``{b: Replacement(Tuned(), b) for b in find_blocks(model)} | plan`` trains the
            MLPs.
    """
    taken = {path for block in plan for path in block.paths}
    with turn(model):
        parts = [part for layer in range(len(find_layers(model))) for part in find_parts(model, layer)]
        free = [part for part in parts if not any(f"{path}.".startswith(f"{t}.") for path in part.paths for t in taken)]
        return dict(plan) | {part: Replacement(Tuned(), part) for part in free}


def heal(
    model: nn.Module,
    plan: Plan,
    windows: Tensor,
    validation: Tensor,
    how: Healing = Healing(),
    *,
    seed: int = 0,
    cached: bool = False,
    progress: bool = True,
) -> Improved:
    """Distil the replacements of ``plan`` together; neither ``plan`` nor ``model`` changes.

    Windows that the fits did not see teach more, since on those that they saw the student errs less than it does elsewhere.

    Args:
        model: the dense causal language model: the teacher, and with ``plan`` in place the student.
        windows: token ids to learn from [windows, seq_len]; gone through in random order, again and again if need be.
        validation: token ids of other documents [windows, seq_len], which decide the state that is kept; never held-out ones.
        seed: of the order of windows.
        cached: keep the result on disk, and the dense model's probabilities; an interrupted healing goes on at its last
            checkpoint.

    Returns:
        The healed plan, and its curves: KL(dense ‖ spliced) in nats per token over ``how.top_k`` tokens and the bucket (the
        training curve begins with the first windows). Where no check beat the start, the start is what is returned, and
        ``report.improved`` says so.

    Raises:
        ValueError: an empty plan or one without parameters, windows the model cannot read or of a single token, a plan for
            another model, a start whose loss is not finite, a call under torch.inference_mode().
    """
    check_gradients(model)
    for ids in (windows, validation):
        check_windows(ids, model, least=2)
    with turn(model):
        check_plan(model, plan)
        healed, data = copied(plan), (windows, validation)
        matter = model, healed, data, how, seed, "kl", lambda: _distillation(model, *data, how, seed, cached)
        return Improved(healed, _train(bodies(healed), *matter, cached=cached, progress=progress))


def _distillation(model: nn.Module, windows: Tensor, validation: Tensor, how: Healing, seed: int, cached: bool) -> Objective:
    layers = [layer for *_, layers in layer_lists(model) for layer in layers]

    def student(ids: Tensor) -> Tensor:
        with checkpointed(layers) if how.gradient_checkpointing else nullcontext():
            return model(ids.to(input_device(model)), use_cache=False).logits.float()

    of_teacher = dict(top_k=how.top_k, batch_size=how.batch_windows, cached=cached)
    teachers = [teach(model, ids, **of_teacher) for ids in (windows, validation)]
    return distillation(student, windows, validation, *teachers, how.batch_windows, seed)
