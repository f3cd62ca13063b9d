"""Healing: a spliced model's replacements, and nothing else, are distilled on the dense model's next-token distribution.

Block-wise fits cannot see that blocks err together; here every replacement learns with all others in place. The dense
model is the teacher and stays as it is, so the text needs no labels and the budget is counted in tokens.

Source: Hinton et al. 2015 (arXiv 1503.02531), KL(teacher ‖ student) at temperature 1; keeping the teacher's top-k
probabilities and one bucket for the rest makes it affordable to keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .blocks import Block
from .cache import Entry, fingerprint
from .models import check_windows, input_device
from .replacements import Replacement
from .reports import TrainingReport
from .splice import bodies, copied
from .tune import Course, Tuning, kept, learn, learning, sharing


@dataclass(frozen=True)
class Healing(Tuning):
    """How to heal. Raises ValueError for values that make no sense."""

    batch_windows: int = 2
    top_k: int = 64  # of the dense model's probabilities; all others are one bucket


@dataclass
class _Teacher:
    """The dense model's most probable next tokens after every token of some windows."""

    log_p: Tensor  # [windows, seq_len, top_k]
    tokens: Tensor  # [windows, seq_len, top_k]

    def kl(self, logits: Tensor, windows: Tensor | slice) -> Tensor:
        """Mean KL(dense ‖ student) in nats per token over the top-k tokens and one bucket for all others: a lower bound of
        the KL over the whole vocabulary (data-processing inequality).
        """
        log_p, tokens = self.log_p[windows].to(logits.device), self.tokens[windows].to(logits.device)
        log_q = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
        rest_p, rest_q = _rest(log_p), _rest(log_q)
        return ((log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())).mean()


def _rest(log_p: Tensor) -> Tensor:
    """Probability of all tokens that are not among the top k, [...]; rounding may not make it zero."""
    return (1 - log_p.exp().sum(-1)).clamp_min(1e-6)


@torch.inference_mode()
def _teach(model: nn.Module, windows: Tensor, how: Healing, cached: bool) -> _Teacher:
    """One dense pass over ``windows``; with ``cached`` the same for every plan that learns from them."""
    if cached:
        entry = Entry("heal", "teacher", model, windows, how.top_k, how.batch_windows)
        if (stored := entry.load()) is not None:
            return _Teacher(**stored)
    log_p, tokens = [], []
    for ids in windows.split(how.batch_windows):
        logits = model(ids.to(input_device(model)), use_cache=False).logits.float()  # [windows, seq_len, vocab]
        top, where = logits.topk(min(how.top_k, logits.shape[-1]), dim=-1)
        log_p.append((top - logits.logsumexp(-1, keepdim=True)).cpu())
        tokens.append(where.cpu())
    teacher = _Teacher(torch.cat(log_p), torch.cat(tokens))
    if cached:
        entry.save(vars(teacher))
    return teacher


def heal(
    model: nn.Module,
    plan: Mapping[Block, Replacement],
    windows: Tensor,
    validation: Tensor,
    how: Healing = Healing(),
    *,
    seed: int = 0,
    cached: bool = False,
    progress: bool = True,
) -> tuple[dict[Block, Replacement], TrainingReport]:
    """Distil the replacements of ``plan`` together; neither ``plan`` nor ``model`` changes.

    Args:
        model: the dense causal language model, teacher and frame of the student.
        windows: token ids to learn from [windows, seq_len]; gone through in random order, again and again if need be.
        validation: token ids of other documents [windows, seq_len], which decide the state that is kept; never held-out ones.
        seed: of the order of windows.
        cached: keep the result on disk, and the dense model's probabilities; an interrupted healing goes on at its last check.

    Returns:
        The healed plan, and its curves: KL(dense ‖ spliced) in nats per token as ``how.top_k`` sees it (the training curve
        begins with the first windows). Where no check beat the start, the start is what is returned, and
        ``report.improved`` says so.

    Raises:
        ValueError: an empty plan, windows the model cannot read, a plan for another model.
    """
    if not plan:
        raise ValueError("The plan is empty: there is nothing to heal.")
    for ids in (windows, validation):
        check_windows(ids, model)
    healed = copied(plan)

    def distil(checkpoint: Entry | None) -> TrainingReport:
        with learning(model, healed):
            course = _course(model, windows, validation, how, seed, cached)
            return learn(model, healed, course, how, checkpoint=checkpoint, progress=progress, name="kl")

    if not cached:
        return healed, distil(None)
    return healed, kept(
        "heal", fingerprint(model, healed, sharing(healed), windows, validation, how, seed), bodies(healed), distil
    )


def _course(model: nn.Module, windows: Tensor, validation: Tensor, how: Healing, seed: int, cached: bool) -> Course:
    teacher, examiner = (_teach(model, ids, how, cached) for ids in (windows, validation))
    batch, seq_len = min(how.batch_windows, len(windows)), windows.shape[1]
    per_epoch = len(windows) // batch

    def loss(ids: Tensor, lesson: _Teacher, items: Tensor | slice) -> Tensor:
        return lesson.kl(model(ids[items].to(input_device(model)), use_cache=False).logits.float(), items)

    @torch.no_grad()
    def examined(ids: Tensor, lesson: _Teacher) -> float:
        parts = [slice(i, i + how.batch_windows) for i in range(0, len(ids), how.batch_windows)]
        return float(np.average([loss(ids, lesson, part).item() for part in parts], weights=[len(ids[part]) for part in parts]))

    def of_step(step: int) -> Tensor:
        epoch, turn = divmod(step, per_epoch)
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(windows)))
        return loss(windows, teacher, order[turn * batch : (turn + 1) * batch])

    return Course(
        of_step,
        lambda step: step * batch * seq_len,
        lambda: examined(windows[:batch], teacher),
        lambda: examined(validation, examiner),
    )
