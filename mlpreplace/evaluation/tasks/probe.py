"""What a linear classifier reads off a model's last hidden state (Alain and Bengio 2016, arXiv 1610.01644)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...models.forward import eval_mode
from ...models.inputs import check_batch_size, check_context, on_device
from ...runtime.cache import cached as kept
from ...texts.glue import Labelled
from .run import TaskResult

SENTENCES = 32  # in one forward pass
PENALTIES = np.logspace(-4, 1, 6)  # C of the logistic regression
FOLDS = 5  # that choose C


def linear_probe(
    model: nn.Module,
    tokenizer,
    train: Labelled,
    test: Labelled,
    *,
    task: str,
    label: str,
    batch_size: int | None = None,
    cached: bool = False,
    progress: bool = True,
) -> TaskResult:
    """Which test sentences a logistic regression on the last hidden state of a sentence's last token classifies as labelled.

    The hidden state is that behind the last norm, standardised on the training sentences. The penalty is chosen by five-fold
    cross-validation among them, so the test sentences choose nothing. Chance is the accuracy of the larger class.

    Args:
        train, test: labelled sentences, see :func:`~mlpreplace.texts.glue`.
        task, label: of the result.
        batch_size: sentences in one forward pass, 32 by default.
        cached: keep the hidden states on disk, and take them from there.

    Raises:
        ValueError: training sentences of one class, or fewer than five of either; sentences without tokens or longer than the
            model's context.
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_batch_size(batch_size)
    if (fewest := min(train.labels.count(0), train.labels.count(1))) < FOLDS:
        raise ValueError(f"A probe needs {FOLDS} training sentences of each class, got {fewest} of one.")
    options = dict(batch_size=batch_size or SENTENCES, cached=cached, progress=progress)
    x, unseen = (last_states(model, tokenizer, split.sentences, **options).numpy() for split in (train, test))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    how = dict(l1_ratios=(0,), scoring="accuracy", use_legacy_attributes=False)  # the defaults, which are to change
    choice = LogisticRegressionCV(Cs=PENALTIES, cv=folds, max_iter=2000, **how)
    probe = make_pipeline(StandardScaler(), choice).fit(x, train.labels)
    correct = (probe.predict(unseen) == np.array(test.labels)).astype(float)
    items = [int(sha256(sentence.encode()).hexdigest()[:15], 16) for sentence in test.sentences]
    larger = int(np.mean(train.labels) >= 0.5)  # of the classes
    constant = float(np.mean(np.array(test.labels) == larger))
    return TaskResult(f"{task}, probe", label, "acc", correct, np.full(len(correct), 2), np.array(items), constant)


def last_states(
    model: nn.Module,
    tokenizer,
    sentences: Sequence[str],
    *,
    batch_size: int = SENTENCES,
    cached: bool = False,
    progress: bool = True,
) -> Tensor:
    """The last hidden state of each sentence's last token, [sentences, hidden] in float32, on the CPU."""
    ids = [tokenizer(sentence).input_ids for sentence in sentences]
    if empty := [sentence for sentence, tokens in zip(sentences, ids, strict=True) if not tokens]:
        raise ValueError(f"The sentence {empty[0]!r} has no tokens.")
    check_context(max(map(len, ids)), model)
    return _states(model, ids, batch_size, cached=cached, progress=progress)


@kept("states")
@torch.no_grad()
def _states(model: nn.Module, ids: list[list[int]], batch_size: int, *, progress: bool) -> Tensor:
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # of like lengths, so that little is padded
    found: dict[int, Tensor] = {}
    backbone = getattr(model, "base_model", model)
    with eval_mode(model):
        for start in tqdm(range(0, len(ids), batch_size), desc="probe", unit="batch", disable=not progress, leave=False):
            chosen = order[start : start + batch_size]
            longest = max(len(ids[i]) for i in chosen)
            padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in chosen])
            lengths = torch.tensor([len(ids[i]) for i in chosen])
            mask = (torch.arange(longest) < lengths[:, None]).long()
            hidden = backbone(**on_device({"input_ids": padded, "attention_mask": mask}, model)).last_hidden_state
            last = hidden[torch.arange(len(chosen), device=hidden.device), (lengths - 1).to(hidden.device)]
            found |= dict(zip(chosen, last.float().cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(ids))])
