"""Block-wise training: a replacement's module goes on from its closed form, on captured input/output pairs alone.

A step needs one block, no vocabulary and no other layer, so it costs milliseconds where distillation of the whole model
costs seconds. Everything is a function of the seed: the same run twice gives the same bits, and so does a run that was
killed and started again, since each check leaves a checkpoint behind.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .cache import Entry
from .capture import Sample
from .reports import TrainingReport

LOSSES = ("mse", "cosine", "both")
CHUNK = 4096  # tokens at a time where no gradient is needed


@dataclass(frozen=True)
class Training:
    """How to train. Raises ValueError for values that make no sense.

    "mse" is Σ‖g(x) − y‖² / Σ‖y‖², what the closed forms minimise; "cosine" the mean of 1 − cos(g(x), y), blind to length;
    "both" their sum.
    """

    loss: str = "mse"
    epochs: int = 4
    learning_rate: float = 3e-3  # of Adam, at the end of the warm-up; decays to zero along a half cosine
    warmup: float = 0.05  # share of the steps
    batch_tokens: int = 512  # whole windows, at least one, where a family looks back
    check_tokens: int = 8192  # between two looks at the validation windows
    patience: int = 6  # checks without a new best before stopping

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"Unknown loss {self.loss!r}; expected one of {', '.join(LOSSES)}.")
        for name in ("epochs", "learning_rate", "batch_tokens", "check_tokens", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected {name} > 0, got {getattr(self, name)}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"Expected 0 ≤ warmup < 1, got {self.warmup}.")


class _Pairs:
    """Inputs and outputs to draw minibatches from: single real tokens, or whole windows where a family looks back.

    They stay where the sample is; a minibatch goes to the device and precision of the ``learner``'s weights.
    """

    def __init__(self, sample: Sample, whole_windows: bool, learner: Tensor):
        x, y = sample.x, sample.y  # [windows, seq_len, hidden]
        self.learner = learner
        self.mask = sample.mask if whole_windows else None
        self.x, self.y = (x, y) if whole_windows else (x[sample.mask], y[sample.mask])  # [items, (seq_len,) hidden]
        self.tokens_per_item = x.shape[1] if whole_windows else 1
        energy = y[sample.mask].to(learner.dtype).square().sum(-1).mean()  # of a token's output
        self.energy = energy.to(learner.device)

    def __len__(self) -> int:
        return len(self.x)

    def errors(self, body: nn.Module, items: Tensor | slice, loss: str, energy: Tensor) -> Tensor:
        """The objective of each real token of ``items``, [tokens]; ``energy`` makes the squared error relative."""
        g, y = body(self.x[items].to(self.learner)), self.y[items].to(self.learner)
        if self.mask is not None:
            keep = self.mask[items].to(g.device)
            g, y = g[keep], y[keep]
        mse = (g - y).square().sum(-1) / energy if loss != "cosine" else 0
        cosine = 1 - torch.cosine_similarity(g, y, dim=-1) if loss != "mse" else 0
        return mse + cosine

    @torch.no_grad()
    def mean_error(self, body: nn.Module, loss: str, energy: Tensor, most: int | None = None) -> float:
        """The objective over the first ``most`` tokens, or all."""
        step = max(1, CHUNK // self.tokens_per_item)
        items = len(self) if most is None else min(len(self), max(1, most // self.tokens_per_item))
        parts = [self.errors(body, slice(i, min(i + step, items)), loss, energy) for i in range(0, items, step)]
        return torch.cat(parts).double().mean().item()


def learning_rate_at(peak: float, warmup: float, step: int, steps: int) -> float:
    """Up in a line over the share ``warmup`` of the steps, then down to zero along a half cosine."""
    done = step / steps
    if done < warmup:
        return peak * (step + 1) / math.ceil(warmup * steps)
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


class TrainingState:
    """All that a training run is at a check, as tensors: parameters, the best of them, Adam's moments and the curves."""

    def __init__(self, learner: nn.Module):
        self.parameters = dict(learner.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), betas=(0.9, 0.99))
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.curves: list[tuple[float, float, float]] = []  # tokens, training loss, validation loss
        self.step, self.seconds = 0, 0.0

    def record(self, tokens: int, train_loss: float, validation_loss: float) -> None:
        if self.curves and validation_loss < min(v for _, _, v in self.curves):
            for name, p in self.parameters.items():
                self.best[name].copy_(p.detach())
        self.curves.append((tokens, train_loss, validation_loss))

    @property
    def checks_since_best(self) -> int:
        losses = [v for _, _, v in self.curves]
        return len(losses) - 1 - losses.index(min(losses))

    def step_with(self, loss: Tensor, learning_rate: float) -> None:
        """One step of Adam down the gradient of ``loss``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def finish(self, loss: str, seconds: float, stopped: str) -> TrainingReport:
        """Put the best check's parameters back; how it went."""
        for name, p in self.parameters.items():
            p.data.copy_(self.best[name])
        tokens, train_curve, validation_curve = zip(*self.curves, strict=True)
        curves = [int(t) for t in tokens], list(train_curve), list(validation_curve)
        return TrainingReport(loss, *curves, steps=self.step, seconds=seconds, stopped=stopped)

    def save(self, entry: Entry) -> None:
        tensors = {f"parameter/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"best/{name}": p for name, p in self.best.items()}
        for name, p in self.parameters.items():
            tensors |= {f"adam/{name}/{key}": value for key, value in self.optimizer.state[p].items()}
        tensors["curves"] = torch.tensor(self.curves, dtype=torch.float64)
        tensors["progress"] = torch.tensor([self.step, self.seconds], dtype=torch.float64)
        entry.save(tensors)

    def load(self, entry: Entry) -> bool:
        """Take up what ``save`` left; False where there is nothing."""
        if (tensors := entry.load()) is None:
            return False
        for name, p in self.parameters.items():
            p.data.copy_(tensors[f"parameter/{name}"])
            self.best[name].copy_(tensors[f"best/{name}"])
            prefix = f"adam/{name}/"
            self.optimizer.state[p] = {
                key.removeprefix(prefix): t if t.dim() == 0 else t.to(p.device)
                for key, t in tensors.items()
                if key.startswith(prefix)
            }
        self.curves = [tuple(row) for row in tensors["curves"].tolist()]
        self.step, self.seconds = int(tensors["progress"][0]), float(tensors["progress"][1])
        return True


def train(
    body: nn.Module,
    fitting: Sample,
    validation: Sample,
    how: Training,
    *,
    whole_windows: bool = False,
    seed: int = 0,
    checkpoint: Entry | None = None,
    progress: bool = True,
) -> TrainingReport:
    """Train ``body`` in place with Adam and leave it at its best check, which may be its start.

    Args:
        body: the module as its closed form left it, in at least float32.
        fitting: the pairs to train on; ``validation``: the pairs that decide which check was best and when to stop.
        whole_windows: minibatches of windows instead of single tokens, for modules that look at earlier tokens.
        seed: of the order of minibatches.
        checkpoint: where to keep the state of every check, to go on from after an interruption.

    Raises:
        ValueError: no pairs, or a start whose loss is not finite.
    """
    pairs, unseen = (_Pairs(s, whole_windows, next(body.parameters()).detach()) for s in (fitting, validation))
    if not len(pairs) or not len(unseen):
        raise ValueError("Training needs real tokens in the training and in the validation sample.")
    per_batch = min(len(pairs), max(1, how.batch_tokens // pairs.tokens_per_item))
    per_epoch = len(pairs) // per_batch
    steps = how.epochs * per_epoch
    every = max(1, how.check_tokens // (per_batch * pairs.tokens_per_item))
    state = TrainingState(body.requires_grad_(True))
    if checkpoint is None or not state.load(checkpoint):
        first = pairs.mean_error(body, how.loss, pairs.energy, how.check_tokens)
        state.record(0, first, unseen.mean_error(body, how.loss, pairs.energy))
        if not all(math.isfinite(e) for e in (pairs.energy.item(), *state.curves[0])):
            raise ValueError("The start's error is not finite: the activations, or the closed form, hold NaN or infinity.")

    stopped, start, before = "finished", time.perf_counter(), state.seconds
    losses: list[Tensor] = []
    bar = tqdm(total=steps, initial=state.step, desc="train", unit="step", disable=not progress, leave=False)
    with bar:
        while state.step < steps:
            if state.checks_since_best >= how.patience:
                stopped = "early"
                break
            epoch, batch = divmod(state.step, per_epoch)
            if batch == 0 or not losses:
                order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(pairs))).to(pairs.x.device)
            loss = pairs.errors(body, order[batch * per_batch : (batch + 1) * per_batch], how.loss, pairs.energy).mean()
            state.step_with(loss, learning_rate_at(how.learning_rate, how.warmup, state.step, steps))
            losses.append(loss.detach())
            bar.update()
            if state.step % every and state.step < steps:
                continue
            checked = torch.stack(losses).mean().item(), unseen.mean_error(body, how.loss, pairs.energy)
            losses.clear()
            if not all(math.isfinite(e) for e in checked):
                stopped = "diverged"
                break
            state.record(state.step * per_batch * pairs.tokens_per_item, *checked)
            state.seconds = before + time.perf_counter() - start
            bar.set_postfix(validation=f"{checked[1]:.4f}")
            if checkpoint is not None:
                state.save(checkpoint)
    body.requires_grad_(False)
    return state.finish(how.loss, before + time.perf_counter() - start, stopped)
