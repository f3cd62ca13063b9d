"""Measure models on held-out windows: perplexity with its interval, KL divergence to the dense model, size.

:func:`compare` is the one protocol: the dense model and every plan see the same windows in the same pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .cache import Entry, fingerprint
from .models import check_windows
from .splice import Plan
from .sweep import sweep

RESAMPLES = 2000  # bootstrap resamples; an interval from these moves by about 1 % of its width between seeds


@dataclass(frozen=True)
class Measurement:
    """What one model did on a set of windows. Sums per window, so that windows can be resampled."""

    nll: np.ndarray  # [windows] negative log-likelihood in nats, summed over predicted tokens
    tokens: np.ndarray  # [windows] predicted tokens
    kl: np.ndarray | None = None  # [windows] KL(dense ‖ model) in nats, summed over predicted tokens

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of the token-weighted mean negative log-likelihood."""
        return float(np.exp(self.nll.sum() / self.tokens.sum()))

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence to the dense model, nats per token."""
        if self.kl is None:
            raise ValueError("No KL divergence was measured; compare(...) measures it.")
        return float(self.kl.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval over windows."""

    value: float
    low: float
    high: float
    tokens: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] ({self.tokens:,} tokens)"


def _bootstrap(statistic, n_windows: int, value: float, tokens: int, seed: int) -> Estimate:
    """Percentile bootstrap: windows are drawn with replacement, all their tokens together."""
    if n_windows < 2:
        return Estimate(value, float("nan"), float("nan"), tokens)
    draws = np.random.default_rng(seed).integers(n_windows, size=(RESAMPLES, n_windows))
    low, high = np.quantile(statistic(draws), [0.025, 0.975])
    return Estimate(value, float(low), float(high), tokens)


def perplexity_ratio(model: Measurement, dense: Measurement, seed: int = 0) -> Estimate:
    """Perplexity ÷ dense perplexity with a paired bootstrap interval: both models are resampled on the same windows."""
    if not np.array_equal(model.tokens, dense.tokens):
        raise ValueError("The two measurements are not of the same windows.")
    difference, tokens = model.nll - dense.nll, model.tokens
    value = float(np.exp(difference.sum() / tokens.sum()))
    return _bootstrap(lambda i: np.exp(difference[i].sum(1) / tokens[i].sum(1)), len(tokens), value, model.n_tokens, seed)


def kl_divergence(model: Measurement, seed: int = 0) -> Estimate:
    """Mean KL(dense ‖ model) in nats per token, with its bootstrap interval."""
    kl, tokens = model.kl, model.tokens
    return _bootstrap(lambda i: kl[i].sum(1) / tokens[i].sum(1), len(tokens), model.mean_kl, model.n_tokens, seed)


def perplexity(model: nn.Module, windows: Tensor, *, batch_size: int = 4, seed: int = 0, progress: bool = True) -> Estimate:
    """Perplexity of a causal language model on token windows [windows, seq_len], token-weighted, with its interval.

    Every token but the first of a window is predicted. Raises ValueError for windows the model cannot read.
    """
    m = measure(model, windows, batch_size=batch_size, progress=progress)
    return _bootstrap(lambda i: np.exp(m.nll[i].sum(1) / m.tokens[i].sum(1)), len(m.tokens), m.perplexity, m.n_tokens, seed)


def measure(model: nn.Module, windows: Tensor, *, batch_size: int = 4, progress: bool = True) -> Measurement:
    """Negative log-likelihood of one model on every window, as it is (dense or spliced)."""
    return compare(model, {"model": {}}, windows, batch_size=batch_size, kl=False, progress=progress)["model"]


def compare(
    model: nn.Module,
    plans: Mapping[Hashable, Plan],
    windows: Tensor,
    *,
    batch_size: int = 4,
    kl: bool = True,
    cached: bool = False,
    progress: bool = True,
) -> dict[Hashable, Measurement]:
    """Measure every plan on the same windows, against the dense ``model``.

    An empty plan is the dense model. Plans that agree up to some layer share what is computed there: a plan starts from
    the hidden states that enter the first layer where it differs from the dense model or from another plan, whichever
    is deeper. They agree at a block where they hold the same replacement object, or none. Their order does not matter.

    Args:
        plans: {label: {block: replacement}}.
        windows: token ids [windows, seq_len].
        kl: whether to measure KL(dense ‖ plan) as well, one pass over the vocabulary more.
        batch_size: windows that run at a time; a batch that the device has no room for is run in halves, or halves of these.
        cached: keep each plan's result on each batch on disk, and run only what is not there yet.

    Returns:
        {label: Measurement}, in the order of ``plans``. Held at a time: one batch of logits and, with ``kl``, of dense
        probabilities [batch_size, seq_len, vocab], and at most layers − 1 hidden states [batch_size, seq_len, hidden].

    Raises:
        ValueError: windows the model cannot read, a plan for another model.
    """
    check_windows(windows, model)
    batches = list(enumerate(windows.split(batch_size)))
    entries, done = {}, {}
    if cached:
        key = fingerprint(model, kl)
        of_plan = {label: fingerprint(plan) for label, plan in plans.items()}
        entries = {(label, i): Entry("evaluate", "measure", key, of_plan[label], ids) for label in plans for i, ids in batches}
        done = {part: stored["sums"].numpy() for part, entry in entries.items() if (stored := entry.load()) is not None}
    todo = [(i, ids, [label for label in plans if (label, i) not in done]) for i, ids in batches]
    todo = [(i, ids, labels) for i, ids, labels in todo if labels]
    measured = sweep(model, [(ids, [plans[label] for label in labels]) for _, ids, labels in todo], kl=kl, progress=progress)
    for (i, _, labels), sums in zip(todo, measured, strict=True):
        for label, result in zip(labels, sums, strict=True):
            done[label, i] = result
            if cached:
                entries[label, i].save({"sums": torch.from_numpy(result)})
    tokens = np.full(len(windows), windows.shape[1] - 1)
    whole = {label: np.concatenate([done[label, i] for i, _ in batches], axis=1) for label in plans}
    return {label: Measurement(nll, tokens, divergence if kl else None) for label, (nll, divergence) in whole.items()}
