"""Reference moments from activations that are stored whole."""

from __future__ import annotations

import torch
from conftest import activations
from torch.testing import assert_close

from mlpreplace.statistics.records import SUMS


def reference(model, block, windows, mask=None) -> dict[str, torch.Tensor]:
    a = activations(model, block, windows, mask)
    x, y = a["x"], a["y"]
    sums = {"sum_x": x.sum(0), "sum_y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y}
    return sums | ({"sum_h": a["h"].sum(0), "hh": a["h"].T @ a["h"], "hx": a["h"].T @ x} if "h" in a else {})


def assert_moments(statistics, expected) -> None:
    """float32 products of a batch, summed in float64: six digits of the largest entry."""
    for name in SUMS:
        got, want = getattr(statistics, name), expected.get(name)
        assert (got is None) == (want is None), name
        if want is not None:
            assert got.dtype == torch.float64
            assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item(), msg=lambda text, name=name: f"{name}: {text}")
