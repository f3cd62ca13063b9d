"""Pairs of inputs and outputs of a block, as minibatches for block-wise training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..runtime.memory import AtOnce, free_bytes
from ..statistics.moments import Sample

CHUNK = 4096  # tokens at a time where no gradient is needed


class Pairs:
    """Inputs and outputs to draw minibatches from: single real tokens, or whole windows where a family looks back.

    They move once to the device of ``like``, a weight of the learner, where they fit half of its free memory. Else, and on a
    CPU, they stay where the sample is and each minibatch moves. A minibatch is in the precision of ``like``.
    """

    def __init__(self, sample: Sample, loss: str, whole_windows: bool, like: Tensor):
        x, y = sample.x, sample.y  # [windows, seq_len, hidden]
        self.loss, self.like = loss, like
        self.mask = sample.mask if whole_windows else None
        self.x, self.y = (x, y) if whole_windows else (x[sample.mask], y[sample.mask])  # [items, (seq_len,) hidden]
        self.tokens_per_item = x.shape[1] if whole_windows else 1
        self.unit = "window" if whole_windows else "token"
        self.measured_at_once = AtOnce(max(1, min(len(self), CHUNK // self.tokens_per_item)), self.unit)
        energy = y[sample.mask].to(like.dtype).square().sum(-1).mean()  # of a token's output
        self.energy = energy.to(like.device)  # what squared errors are relative to
        free = free_bytes(like.device)
        if free is not None and 2 * (self.x.nbytes + self.y.nbytes) <= free:
            self.x, self.y = self.x.to(like.device), self.y.to(like.device)
            self.mask = None if self.mask is None else self.mask.to(like.device)

    def __len__(self) -> int:
        return len(self.x)

    def errors(self, body: nn.Module, items: Tensor | slice) -> Tensor:
        """The loss of each real token of ``items``, [tokens]."""
        g, y = body(self.x[items].to(self.like)), self.y[items].to(self.like)
        if self.mask is not None:
            keep = self.mask[items].to(g.device)
            g, y = g[keep], y[keep]
        mse = (g - y).square().sum(-1) / self.energy if self.loss != "cosine" else 0
        cosine = 1 - torch.cosine_similarity(g, y, dim=-1) if self.loss != "mse" else 0
        return mse + cosine

    def losses(self, body: nn.Module, items: Tensor, at_once: int) -> Iterator[Tensor]:
        """The mean loss over the real tokens of ``items``, in parts of at most ``at_once`` items that sum to it."""
        if len(items) <= at_once:
            yield self.errors(body, items).mean()
            return
        tokens = len(items) if self.mask is None else int(self.mask[items].sum())
        for part in items.split(at_once):
            yield self.errors(body, part).sum() / tokens

    @torch.no_grad()
    def mean_error(self, body: nn.Module, most: int | None = None) -> float:
        """The loss over the first ``most`` tokens, or all."""
        items = len(self) if most is None else min(len(self), max(1, most // self.tokens_per_item))

        def run(at_once: int) -> float:
            parts = [self.errors(body, slice(i, min(i + at_once, items))) for i in range(0, items, at_once)]
            return torch.cat(parts).double().mean().item()

        return self.measured_at_once(run)
