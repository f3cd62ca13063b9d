"""The state of a training: weights as they are trained and as they are returned, Adam, the best check, and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..replacements.records import TrainingReport
from ..runtime.cache import Entry
from ..runtime.memory import AtOnce

PAUSE = 25  # between two checkpoints, in times that one takes: 4 % of a training
DISK = 1e9  # bytes per second that are expected of the first checkpoint


def is_half(tensor: Tensor) -> bool:
    """Whether it holds floating-point numbers in less than float32."""
    return tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32


class Masters:
    """The parameters and buffers of a module that are in half precision; others stay as they are.

    A step of Adam is often smaller than the last bit of a half-precision weight, and would be lost. In float16 the squares of
    small gradients vanish as well.
    """

    def __init__(self, module: nn.Module):
        self.own = {t: t.dtype for t in (*module.parameters(), *module.buffers()) if is_half(t)}

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """In float32 while in the context, afterwards rounded to their own precision."""
        for tensor in self.own:
            tensor.data = tensor.data.float()
        try:
            yield
        finally:
            self._round()

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Within :meth:`in_float32`: in their own precision while in the context, afterwards as before."""
        before = {tensor: tensor.data for tensor in self.own}
        self._round()
        try:
            yield
        finally:
            for tensor, master in before.items():
                tensor.data = master

    def _round(self) -> None:
        for tensor, dtype in self.own.items():
            tensor.data = tensor.data.to(dtype)


class TrainingState:
    """The state of a training at a check: parameters, the best of them, Adam's moments, the curves, and what a step is made of.

    Args:
        items: that a step has at most.
        scaled: whether losses are scaled for gradients in float16.
    """

    def __init__(self, learners: nn.Module, items: int, unit: str, scaled: bool):
        self.parameters = dict(learners.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), betas=(0.9, 0.99))
        device = next(iter(self.parameters.values())).device.type
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**15, enabled=scaled)  # the largest that float16 holds
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.curves: list[tuple[float, float, float]] = []  # tokens, training loss, validation loss
        self.step, self.seconds = 0, 0.0
        self.at_once = AtOnce(items, unit)

    def record(self, tokens: int, train_loss: float, validation_loss: float) -> None:
        if self.curves and validation_loss < min(v for _, _, v in self.curves):
            for name, p in self.parameters.items():
                self.best[name].copy_(p.detach())
        self.curves.append((tokens, train_loss, validation_loss))

    @property
    def checks_since_best(self) -> int:
        losses = [v for _, _, v in self.curves]
        return len(losses) - 1 - losses.index(min(losses))

    def step_with(self, losses: Callable[[int], Iterable[Tensor]], learning_rate: float) -> Tensor:
        """One step of Adam down the gradient of a loss, which is returned. ``losses`` gives its parts of at most so many items.

        It starts again with smaller parts where memory runs out, and with a smaller scale where scaled gradients overflow.
        """

        def backward(at_once: int) -> Tensor:
            self.optimizer.zero_grad()  # of parts that ran before the memory was full
            found = []
            for loss in losses(at_once):
                self.scaler.scale(loss).backward()
                found.append(loss.detach())
            return torch.stack(found).sum()

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        while True:
            loss, scale = self.at_once(backward), self.scaler.get_scale()
            self.scaler.step(self.optimizer)  # leaves gradients out that are not finite
            self.scaler.update()
            if self.scaler.get_scale() >= scale or scale <= 1 or not loss.isfinite():
                break  # else they overflowed: the step starts again with half the scale
        self.optimizer.zero_grad()
        self.step += 1
        return loss

    def finish(self, name: str, seconds: float, stopped: str) -> TrainingReport:
        """Put the parameters of the best check back."""
        self._set(self.best)
        tokens, train_curve, validation_curve = map(list, zip(*self.curves, strict=True))
        return TrainingReport(name, tokens, train_curve, validation_curve, steps=self.step, seconds=seconds, stopped=stopped)

    @property
    def nbytes(self) -> int:
        """Of a checkpoint, nearly: the parameters, the best of them, and two moments."""
        return sum(3 * p.nbytes for p in self.parameters.values()) + sum(best.nbytes for best in self.best.values())

    def save(self, checkpoint: Entry) -> None:
        beside = self.curves, self.step, self.seconds, self.at_once.most
        checkpoint.save([self.parameters, self.best, self.optimizer.state_dict(), self.scaler.state_dict(), *beside])

    def load(self, checkpoint: Entry) -> bool:
        """Take up what :meth:`save` left; False where there is nothing."""
        if (stored := checkpoint.load()) is None:
            return False
        parameters, self.best, adam, scaler, self.curves, self.step, self.seconds, self.at_once.most = stored
        self._set(parameters)
        self.optimizer.load_state_dict(adam)
        self.scaler.load_state_dict(scaler)
        return True

    def _set(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.data.copy_(values[name])


class Checkpoints:
    """Where the state of a training is kept, as often as costs a few per cent of its time."""

    def __init__(self, entry: Entry | None, state: TrainingState):
        self.entry, self.state = entry, state
        self.last, self.took = time.perf_counter(), state.nbytes / DISK

    def save(self) -> None:
        """Write a checkpoint if the last one is long enough ago."""
        start = time.perf_counter()
        if self.entry is None or start - self.last < PAUSE * self.took:
            return
        self.state.save(self.entry)
        self.last = time.perf_counter()
        self.took = self.last - start
