"""Perplexity and KL divergence to the dense model on held-out windows, with bootstrap intervals.

:func:`compare` is the one protocol: the dense model and every plan are measured on the same windows in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ..models.forward import eval_mode
from ..models.inputs import check_batch_size, check_windows
from ..replacements.splice import Plan
from ..runtime.cache import Entry, key_of
from ..runtime.fingerprint import fingerprint
from ..runtime.memory import WINDOWS
from .sweep import sweep

RESAMPLES = 2000  # of every bootstrap; the width of an interval then varies by about 1 % between seeds


@dataclass(frozen=True)
class Measurement:
    """Sums per window of one model's losses, so that windows can be resampled."""

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
        """Mean KL divergence to the dense model, nats per token. Raises ValueError where it was not measured."""
        if self.kl is None:
            raise ValueError("No KL divergence was measured; compare(...) measures it.")
        return float(self.kl.sum() / self.tokens.sum())

    def estimate(self, seed: int = 0) -> Estimate:
        """The perplexity with a bootstrap interval: whole windows are resampled."""
        return _exp_per_token(self.nll, self.tokens, seed)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    tokens: int  # that were measured; images or sentences, where a task has those

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] ({self.tokens:,} tokens)"


def resample(n_items: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of items drawn with replacement, [RESAMPLES, n_items]. An item is a window, a task item, an image or a round."""
    return rng.integers(n_items, size=(RESAMPLES, n_items))


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n_items: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval (low, high); nan for a single item.

    Args:
        statistic: from indices of resampled items [RESAMPLES, n_items] to the statistic of each resample, [RESAMPLES].
    """
    if n_items < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(statistic(resample(n_items, np.random.default_rng(seed))), [0.025, 0.975])
    return float(low), float(high)


def _exp_per_token(nll: np.ndarray, tokens: np.ndarray, seed: int) -> Estimate:
    """exp(Σ nll ÷ Σ tokens), both [windows]. Whole windows are resampled."""
    interval = bootstrap(lambda i: np.exp(nll[i].sum(1) / tokens[i].sum(1)), len(tokens), seed)
    return Estimate(float(np.exp(nll.sum() / tokens.sum())), *interval, int(tokens.sum()))


def perplexity_ratio(model: Measurement, dense: Measurement, seed: int = 0) -> Estimate:
    """Perplexity ÷ dense perplexity with a paired bootstrap interval: both models are resampled on the same windows.

    Raises ValueError for measurements of windows of other lengths.
    """
    if not np.array_equal(model.tokens, dense.tokens):
        raise ValueError("The two measurements are not of the same windows.")
    return _exp_per_token(model.nll - dense.nll, model.tokens, seed)


def kl_divergence(model: Measurement, seed: int = 0) -> Estimate:
    """Mean KL(dense ‖ model) in nats per token. Raises ValueError where it was not measured."""
    value, kl, tokens = model.mean_kl, model.kl, model.tokens
    interval = bootstrap(lambda i: kl[i].sum(1) / tokens[i].sum(1), len(tokens), seed)
    return Estimate(value, *interval, model.n_tokens)


def perplexity(
    model: nn.Module, windows: Tensor, *, batch_size: int | None = None, seed: int = 0, progress: bool = True
) -> Estimate:
    """Perplexity of a causal language model on token windows [windows, seq_len], weighted by tokens.

    Every token but the first of a window is predicted. Raises ValueError for windows the model cannot read or of a single token.
    """
    return measure(model, windows, batch_size=batch_size, progress=progress).estimate(seed)


def measure(model: nn.Module, windows: Tensor, *, batch_size: int | None = None, progress: bool = True) -> Measurement:
    """Negative log-likelihood of ``model`` as it is, dense or spliced, on every window."""
    return compare(model, {"model": {}}, windows, batch_size=batch_size, kl=False, progress=progress)["model"]


def compare(
    model: nn.Module,
    plans: Mapping[Hashable, Plan],
    windows: Tensor,
    *,
    kl: bool = True,
    batch_size: int | None = None,
    cached: bool = False,
    progress: bool = True,
) -> dict[Hashable, Measurement]:
    """Measure every plan on the same windows, against the dense ``model``.

    Plans that agree up to some layer share the computation up to there. They agree at a block where they hold the same
    replacement object, or none. Their order does not matter.

    Args:
        plans: {label: {block: replacement}}; an empty plan is the dense model.
        windows: token ids [windows, seq_len].
        kl: whether to measure KL(dense ‖ plan), too: one more pass over the vocabulary.
        batch_size: windows in one forward pass, 4 by default; half as many for a batch that does not fit into memory.
        cached: keep each plan's result on each batch on disk, and run only what is missing.

    Returns:
        {label: Measurement}, in the order of ``plans``. Memory: one batch of logits and, with ``kl``, of dense
        probabilities [batch_size, seq_len, vocab], and at most layers − 1 hidden states [batch_size, seq_len, hidden].

    Raises:
        ValueError: windows the model cannot read or of a single token, a plan for another model, a model that another thread
            has spliced.
    """
    check_windows(windows, model, least=2)
    if not isinstance(plans, Mapping):
        raise ValueError(f"Expected plans by label, {{label: plan}}, got a {type(plans).__name__}.")
    check_batch_size(batch_size)
    with eval_mode(model):
        joined = _measured(model, plans, windows.split(batch_size or WINDOWS), kl, cached, progress)
    tokens = np.full(len(windows), windows.shape[1] - 1)
    return {label: Measurement(nll, tokens, divergence if kl else None) for label, (nll, divergence) in joined.items()}


def _measured(
    model: nn.Module, plans: Mapping[Hashable, Plan], parts: Sequence[Tensor], kl: bool, cached: bool, progress: bool
) -> dict[Hashable, np.ndarray]:
    """{label: negative log-likelihood and KL of every window, [2, windows]}."""
    batches = list(enumerate(parts))
    entries, done = {}, {}
    if cached:
        key, of_plan = key_of("compare", model, kl), {label: fingerprint(plan) for label, plan in plans.items()}
        entries = {
            (label, i): Entry("measure", "evaluation/perplexity", key, of_plan[label], ids)
            for label in plans
            for i, ids in batches
        }
        done = {part: stored for part, entry in entries.items() if (stored := entry.load()) is not None}
    todo = [(i, ids, [label for label in plans if (label, i) not in done]) for i, ids in batches]
    todo = [(i, ids, labels) for i, ids, labels in todo if labels]
    measured = sweep(model, [(ids, [plans[label] for label in labels]) for _, ids, labels in todo], kl=kl, progress=progress)
    for (i, _, labels), sums in zip(todo, measured, strict=True):
        for label, result in zip(labels, sums, strict=True):
            done[label, i] = result
            if cached:
                entries[label, i].save(result)
    return {label: np.concatenate([done[label, i] for i, _ in batches], axis=1) for label in plans}
