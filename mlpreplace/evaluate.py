"""Measure models on held-out windows: perplexity with its interval, KL divergence to the dense model, size.

:func:`compare` is the one protocol: the dense model and every plan see the same windows in the same pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import layer_lists
from .cache import Entry, fingerprint
from .data import check_windows
from .models import eval_mode
from .splice import Plan, spliced

RESAMPLES = 2000  # bootstrap resamples; an interval from these moves by about 1 % of its width between seeds


@dataclass(frozen=True)
class Measurement:
    """What one model did on a set of windows. Sums per window, so that windows can be resampled."""

    nll: np.ndarray  # [windows] negative log-likelihood in nats, summed over predicted tokens
    tokens: np.ndarray  # [windows] predicted tokens
    kl: np.ndarray | None = None  # [windows] KL(dense ‖ model) in nats, summed over predicted tokens

    def as_tensors(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(value) for name, value in vars(self).items() if value is not None}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Measurement:
        return Measurement(**{name: tensor.numpy() for name, tensor in tensors.items()})

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


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities of a causal language model after every token but the last, [windows, seq_len - 1, vocab]."""
    return model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def _nll(log_q: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood summed over the predicted tokens of each window, [windows]."""
    return -log_q.gather(-1, ids[:, 1:, None]).squeeze(-1).double().sum(1)


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

    The dense model runs once a batch, and a plan that leaves the first layers alone starts from the dense hidden
    states where it first differs: a sweep over single blocks costs about half of the naive one. An empty plan is the
    dense model.

    Args:
        plans: {label: {block: replacement}}.
        windows: token ids [windows, seq_len].
        kl: whether to measure KL(dense ‖ plan) as well, one pass over the vocabulary more.
        cached: keep each plan's result on disk, and run only the plans that are not there yet.

    Returns:
        {label: Measurement}, in the order of ``plans``. Memory is bounded by one batch.

    Raises:
        ValueError: windows the model cannot read, a plan for another model.
    """
    check_windows(windows, model)
    if cached:
        key = fingerprint(model, windows, batch_size, kl)
        entries = {label: Entry("evaluate", "measure", key, plan) for label, plan in plans.items()}
    done = {label: Measurement.from_tensors(t) for label in plans if cached and (t := entries[label].load()) is not None}
    todo = {label: plan for label, plan in plans.items() if label not in done}
    for label, measurement in (_run(model, todo, windows, batch_size, kl, progress) if todo else {}).items():
        done[label] = measurement
        if cached:
            entries[label].save(measurement.as_tensors())
    return {label: done[label] for label in plans}


def _run(
    model: nn.Module, plans: Mapping[Hashable, Plan], windows: Tensor, batch_size: int, kl: bool, progress: bool
) -> dict[Hashable, Measurement]:
    stacks = layer_lists(model)
    layers = stacks[0][2] if len(stacks) == 1 else None  # an encoder-decoder has no single prefix to share
    device = next(model.parameters()).device
    first = {label: min((block.layer for block in plan), default=0) for label, plan in plans.items()}
    needed = {f for f in first.values() if f} if layers is not None else set()
    rows: dict[Hashable, list[Tensor]] = {label: [] for label in plans}  # per batch: nll and kl, [2, windows]
    starts = range(0, len(windows), batch_size)
    bar = tqdm(total=len(plans) * len(starts), desc="evaluate", unit="batch", disable=not progress, leave=False)
    with bar, eval_mode(model), torch.inference_mode():
        for start in starts:
            ids = windows[start : start + batch_size].to(device)
            with _recorded(layers, needed) as inputs:
                log_p = log_probabilities(model, ids)
            dense_nll, p = _nll(log_p, ids), log_p.exp() if kl else None
            for label, plan in plans.items():
                nll, divergence = dense_nll, torch.zeros_like(dense_nll)
                if plan:
                    with spliced(model, plan), _resumed(layers, first[label], inputs):
                        log_q = log_probabilities(model, ids)
                    nll = _nll(log_q, ids)
                    divergence = _kl(p, log_p, log_q) if kl else divergence
                rows[label].append(torch.stack([nll, divergence]).cpu())
                bar.update()
    tokens = np.full(len(windows), windows.shape[1] - 1)
    measured = {label: torch.cat(batches, dim=1).numpy() for label, batches in rows.items()}  # [2, windows]
    return {label: Measurement(nll, tokens, divergence if kl else None) for label, (nll, divergence) in measured.items()}


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) summed per window, [windows]; overwrites ``log_q``, since each of these is as large as the logits."""
    return log_q.neg_().add_(log_p).mul_(p).sum(-1).double().sum(1)


@contextmanager
def _recorded(layers: nn.ModuleList | None, needed: set[int]) -> Iterator[dict[int, Tensor | tuple]]:
    """Collect what enters the ``needed`` layers during a forward pass, as the layer before hands it on."""
    inputs: dict[int, Tensor | tuple] = {}

    def keep(index: int):
        def hook(module, args, output):
            # as the layer returns it, a tensor or a tuple that starts with one (Falcon); copied, since layers may write into it
            inputs[index] = (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()

        return hook

    handles = [layers[i - 1].register_forward_hook(keep(i)) for i in sorted(needed)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _resumed(layers: nn.ModuleList | None, first: int, inputs: Mapping[int, Tensor | tuple]) -> Iterator[None]:
    """Let the layers before ``first`` hand on the recorded hidden states instead of computing them."""
    if first not in inputs:
        yield
        return

    def stand_in(*args, **kwargs):
        return inputs[first]

    own = {layer: vars(layer).get("forward") for layer in layers[:first]}  # where a device-placement library has set one
    for layer in own:
        layer.forward = stand_in  # the instance's, so that the layer keeps its attributes and its class's forward
    try:
        yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
