"""What a plan that is in place learns from: batches and a loss, or the dense model as a teacher.

Source of the latter: Hinton et al. 2015 (arXiv 1503.02531), KL(teacher ‖ student) at temperature 1. Of the teacher's
probabilities the top k are kept, and one bucket for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..fitting.training import Objective
from ..models.forward import eval_mode
from ..models.inputs import IGNORED, Batch, check_batches, input_device, is_seq2seq, items, on_device
from ..runtime.cache import cached
from ..runtime.memory import AtOnce, halving

Loss = Callable[[nn.Module, Batch], Tensor]  # the mean over a batch


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model computes of the batch's labels; raises ValueError where it has none."""
    if "labels" not in batch:
        raise ValueError(f"No labels among {', '.join(batch)}: give them to the batch, or a loss(model, batch).")
    return model(**batch).loss


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

    def of_step(step: int, at_once: int) -> Iterator[Tensor]:
        epoch, turn = divmod(step, len(batches))
        return _in_parts(model, batches[order(epoch)[turn]], loss, at_once)

    largest = [max(items(batch) for batch in some) for some in (batches, validation)]
    mean = partial(mean_loss, model, loss=loss, at_once=AtOnce(max(largest), "item"))
    return Objective(of_step, largest[0], seen, lambda: mean(batches[:1]), lambda: mean(validation), "item")


def _in_parts(model: nn.Module, batch: Batch, loss: Loss, at_once: int) -> Iterator[Tensor]:
    """The loss of a batch in parts of at most ``at_once`` items, which sum to it.

    Parts weigh by their targets where it is the model's own loss, else by their items.
    """
    n = items(batch)
    if n <= at_once:
        yield loss(model, on_device(batch, model))
        return
    parts = [
        {k: t[i : i + at_once] if isinstance(t, Tensor) and t.dim() else t for k, t in batch.items()}
        for i in range(0, n, at_once)
    ]
    weights = [_targets(model, part) if loss is own_loss and "labels" in part else items(part) for part in parts]
    for part, weight in zip(parts, weights, strict=True):
        if weight:
            yield loss(model, on_device(part, model)) * (weight / sum(weights))


def _targets(model: nn.Module, batch: Batch) -> int:
    """Labels that count. Of a sequence's first token there is none, but in a decoder that reads another sequence."""
    labels = batch["labels"]
    return int(((labels if labels.dim() < 2 or is_seq2seq(model) else labels[:, 1:]) != IGNORED).sum())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], loss: Loss, at_once: AtOnce) -> float:
    """Over items."""

    def run(most: int) -> float:
        values = [(sum(float(part) for part in _in_parts(model, batch, loss, most)), items(batch)) for batch in batches]
        return sum(value * n for value, n in values) / sum(n for _, n in values)

    return at_once(run)


# The dense model as a teacher


@dataclass
class Teacher:
    """The dense model's most probable next tokens after every token of some windows."""

    log_p: Tensor  # [windows, seq_len, top_k]
    tokens: Tensor  # [windows, seq_len, top_k], int32

    def kl(self, logits: Tensor, windows: Tensor | slice) -> Tensor:
        """Mean KL(dense ‖ student) in nats per token over the top-k tokens and one bucket for all others.

        It is a lower bound of the KL over the whole vocabulary (data-processing inequality).
        """
        log_p, tokens = self.log_p[windows].to(logits.device), self.tokens[windows].to(logits.device).long()
        log_q = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
        rest_p, rest_q = _rest(log_p), _rest(log_q)
        return ((log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())).mean()


def _rest(log_p: Tensor) -> Tensor:
    """Probability of all tokens that are not among the top k, [...]; rounding may not make it zero."""
    return (1 - log_p.exp().sum(-1)).clamp_min(1e-6)


@cached("teacher")
@torch.inference_mode()
def teach(model: nn.Module, windows: Tensor, *, top_k: int, batch_size: int) -> Teacher:
    """One dense pass over ``windows``, the same for every plan that learns from them; in halves where memory runs out."""

    def run(at_once: int) -> Teacher:
        log_p, tokens = [], []
        for ids in windows.split(at_once):
            logits = model(ids.to(input_device(model)), use_cache=False).logits.float()  # [windows, seq_len, vocab]
            top, where = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
            log_p.append((top - logits.logsumexp(-1, keepdim=True)).cpu())
            tokens.append(where.int().cpu())
        return Teacher(torch.cat(log_p), torch.cat(tokens))

    with eval_mode(model):
        return halving(run, batch_size)


def distillation(
    student: Callable[[Tensor], Tensor],
    windows: Tensor,
    validation: Tensor,
    teacher: Teacher,
    examiner: Teacher,
    batch_windows: int,
    seed: int,
) -> Objective:
    """``batch_windows`` windows a step, in random order, again and again if need be.

    Args:
        student: token ids [windows, seq_len] → logits in float32.
        teacher: of ``windows``; ``examiner``: of ``validation``.
    """
    batch, seq_len = min(batch_windows, len(windows)), windows.shape[1]
    per_epoch, measured_at_once = len(windows) // batch, AtOnce(batch_windows)

    def losses(step: int, at_once: int) -> Iterator[Tensor]:
        epoch, turn = divmod(step, per_epoch)
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(windows)))
        for part in order[turn * batch : (turn + 1) * batch].split(at_once):
            yield teacher.kl(student(windows[part]), part) * (len(part) / batch)

    @torch.no_grad()
    def mean(ids: Tensor, of: Teacher) -> float:
        def run(at_once: int) -> float:
            parts = [slice(i, i + at_once) for i in range(0, len(ids), at_once)]
            found = [of.kl(student(ids[part]), part).item() for part in parts]
            return float(np.average(found, weights=[len(ids[part]) for part in parts]))

        return measured_at_once(run)

    return Objective(
        losses,
        batch,
        seen=lambda step: step * batch * seq_len,
        start=lambda: mean(windows[:batch], teacher),
        validation=lambda: mean(validation, examiner),
    )
