"""Train a small model from random weights, where no checkpoint of its kind is bundled."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..fitting.training import learn
from ..models.forward import check_gradients, eval_mode
from ..models.inputs import Batch
from ..planning.distil import Tuning, batch_objective, own_loss
from ..replacements.records import TrainingReport
from ..runtime.cache import Entry, cached


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
    """Train all of ``model`` in place on its own loss, without dropout, and leave it at the weights of its best check.

    Args:
        batches: keyword arguments of the model with labels, one batch a step, in random order.
        validation: batches of other data, which decide which weights are kept.
        seed: of the order of batches.
        cached: keep the trained weights on disk, and continue an interrupted training at its last checkpoint.

    Returns:
        The learning curves; ``curve_tokens`` counts items.

    Raises:
        ValueError: no batches, batches without labels, a call under torch.inference_mode().
    """
    check_gradients(model)
    learners = nn.ParameterList(p for p in model.parameters() if p.requires_grad)  # a tied one once
    return _pretrain(learners, model, list(batches), list(validation), how, seed, cached=cached, progress=progress)


@cached("pretrain", fills="learners")
def _pretrain(
    learners: nn.ParameterList,
    model: nn.Module,
    batches: list[Batch],
    validation: list[Batch],
    how: Tuning,
    seed: int,
    *,
    checkpoint: Entry | None = None,
    progress: bool,
) -> TrainingReport:
    objective = batch_objective(model, batches, validation, own_loss, seed)
    with eval_mode(model):
        return learn(learners, objective, how, name="pretrain", checkpoint=checkpoint, progress=progress)
