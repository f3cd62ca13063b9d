"""Training with the whole plan in place: all replacements learn together, and nothing else changes.

Fits of single blocks cannot see that blocks err together. :func:`tune` minimises any loss of the model: of labels of images, of
translations, of next tokens. :func:`heal` minimises the KL divergence to the dense model's next-token distribution. A body that
stands in several places is one module and gets the sum of their gradients.

Source of healing: Hinton et al. 2015 (arXiv 1503.02531), KL(teacher ‖ student) at temperature 1. Of the teacher's probabilities
the top k are kept, and one bucket for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..fitting.training import Objective, Tuning, learn
from ..models.forward import check_gradients, eval_mode
from ..models.inputs import Batch, check_batches, check_windows, input_device, items, on_device
from ..models.layers import find_layers, find_parts
from ..replacements.families import Replacement
from ..replacements.records import TrainingReport
from ..replacements.splice import Improved, Plan, bodies, check_plan, copied, sharing, spliced
from ..replacements.whole_layers import Tuned
from ..runtime.cache import Entry, cached
from ..runtime.turns import turn

Loss = Callable[[nn.Module, Batch], Tensor]  # the mean over a batch


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model computes of the batch's labels; raises ValueError where it has none."""
    if "labels" not in batch:
        raise ValueError(f"No labels among {', '.join(batch)}: give them to the batch, or a loss(model, batch).")
    return model(**batch).loss


@dataclass(frozen=True)
class Healing(Tuning):
    """How to heal. Raises ValueError for values that make no sense."""

    batch_windows: int = 2
    top_k: int = 64  # of the dense model's probabilities; all others are one bucket


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
        loss: (model, batch on its device) → the batch's mean.
        seed: of the order of batches.
        cached: keep the result on disk; an interrupted tuning goes on at its last check. Only of the model's own loss, which is
            known by its labels.

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
            return learn(learners, made, how, name=name, checkpoint=checkpoint, progress=progress)


@contextmanager
def _learning(model: nn.Module, plan: Plan, learners: nn.Module) -> Iterator[None]:
    """``model`` with ``plan`` in place, frozen but for ``learners``. Afterwards these are frozen, too."""
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        learners.requires_grad_(True)
        with spliced(model, plan):
            yield
    finally:
        learners.requires_grad_(False)
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def batch_objective(model: nn.Module, batches: list[Batch], validation: list[Batch], loss: Loss, seed: int) -> Objective:
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

    return Objective(of_step, seen, lambda: _mean(model, batches[:1], loss), lambda: _mean(model, validation, loss))


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
        loss: (model, batch on its device) → the batch's mean of anything of which less is better, the share of wrongly classified
            images for instance.

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

    Args:
        model: the dense causal language model: the teacher, and with ``plan`` in place the student.
        windows: token ids to learn from [windows, seq_len]; gone through in random order, again and again if need be.
        validation: token ids of other documents [windows, seq_len], which decide the state that is kept; never held-out ones.
        seed: of the order of windows.
        cached: keep the result on disk, and the dense model's probabilities; an interrupted healing goes on at its last check.

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


@dataclass
class _Teacher:
    """The dense model's most probable next tokens after every token of some windows."""

    log_p: Tensor  # [windows, seq_len, top_k]
    tokens: Tensor  # [windows, seq_len, top_k]

    def kl(self, logits: Tensor, windows: Tensor | slice) -> Tensor:
        """Mean KL(dense ‖ student) in nats per token over the top-k tokens and one bucket for all others.

        It is a lower bound of the KL over the whole vocabulary (data-processing inequality).
        """
        log_p, tokens = self.log_p[windows].to(logits.device), self.tokens[windows].to(logits.device)
        log_q = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
        rest_p, rest_q = _rest(log_p), _rest(log_q)
        return ((log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())).mean()


def _rest(log_p: Tensor) -> Tensor:
    """Probability of all tokens that are not among the top k, [...]; rounding may not make it zero."""
    return (1 - log_p.exp().sum(-1)).clamp_min(1e-6)


@cached("teacher")
@torch.inference_mode()
def _teach(model: nn.Module, windows: Tensor, *, top_k: int, batch_size: int) -> _Teacher:
    """One dense pass over ``windows``, the same for every plan that learns from them."""
    log_p, tokens = [], []
    with eval_mode(model):
        for ids in windows.split(batch_size):
            logits = model(ids.to(input_device(model)), use_cache=False).logits.float()  # [windows, seq_len, vocab]
            top, where = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
            log_p.append((top - logits.logsumexp(-1, keepdim=True)).cpu())
            tokens.append(where.cpu())
    return _Teacher(torch.cat(log_p), torch.cat(tokens))


def _distillation(model: nn.Module, windows: Tensor, validation: Tensor, how: Healing, seed: int, cached: bool) -> Objective:
    """``how.batch_windows`` windows a step, in random order, again and again if need be."""
    of_teacher = dict(top_k=how.top_k, batch_size=how.batch_windows, cached=cached)
    teacher, examiner = (_teach(model, ids, **of_teacher) for ids in (windows, validation))
    batch, seq_len = min(how.batch_windows, len(windows)), windows.shape[1]
    per_epoch = len(windows) // batch

    def loss(ids: Tensor, teacher: _Teacher, chosen: Tensor | slice) -> Tensor:
        return teacher.kl(model(ids[chosen].to(input_device(model)), use_cache=False).logits.float(), chosen)

    @torch.no_grad()
    def mean(ids: Tensor, teacher: _Teacher) -> float:
        parts = [slice(i, i + how.batch_windows) for i in range(0, len(ids), how.batch_windows)]
        return float(np.average([loss(ids, teacher, part).item() for part in parts], weights=[len(ids[part]) for part in parts]))

    def of_step(step: int) -> Tensor:
        epoch, turn = divmod(step, per_epoch)
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(windows)))
        return loss(windows, teacher, order[turn * batch : (turn + 1) * batch])

    return Objective(
        of_step,
        seen=lambda step: step * batch * seq_len,
        start=lambda: mean(windows[:batch], teacher),
        validation=lambda: mean(validation, examiner),
    )
