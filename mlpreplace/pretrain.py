"""Small models trained from nothing: what stands in for a checkpoint of a kind that is not bundled."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .batches import Batch
from .cache import Entry, fingerprint
from .models import eval_mode
from .reports import TrainingReport
from .tune import Tuning, follow, kept, lessons, own_loss


def pretrain(
    model: nn.Module,
    batches: Iterable[Batch],
    validation: Iterable[Batch],
    how: Tuning,
    *,
    seed: int = 0,
    cached: bool = False,
    progress: bool = True,
) -> TrainingReport:
    """Train all of ``model`` in place on its own loss, and leave it at its best check. No dropout.

    Args:
        batches: keyword arguments of the model with labels, one batch a step; gone through in random order.
        validation: batches of other data, which decide the state that is kept.
        seed: of the order of batches; that of the weights is the caller's.
        cached: keep the weights on disk, by the weights to begin with, the data and ``how``.

    Returns:
        The curves; ``curve_tokens`` are items here.

    Raises:
        ValueError: no batches, batches without labels.
    """
    batches, validation = list(batches), list(validation)
    learners = nn.ParameterList(p for p in model.parameters() if p.requires_grad)  # a tied one once
    course = lessons(model, batches, validation, own_loss, seed)

    def train(checkpoint: Entry | None) -> TrainingReport:
        with eval_mode(model):
            return follow(learners, course, how, checkpoint=checkpoint, progress=progress, name="pretrain")

    if not cached:
        return train(None)
    return kept("pretrain", fingerprint(model, batches, validation, how, seed), learners, train)
