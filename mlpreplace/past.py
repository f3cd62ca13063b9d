"""What a replacement that looks back remembers of earlier tokens while a model generates."""

from __future__ import annotations

from torch import Tensor


class Past:
    """Where a replacement keeps, and gets back, what it needs of earlier tokens."""

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError
