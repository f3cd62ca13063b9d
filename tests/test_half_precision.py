"""A model in bfloat16 through the whole path: sums in float64, products in float32, replacements in bfloat16."""

from __future__ import annotations

import pytest
import torch
from conftest import activations, captured_whole
from tiny_models import build, random_windows

import mlpreplace as m
from mlpreplace.statistics.records import SUMS

FAMILIES = [m.Mean(), m.Linear(), m.LowRank(4), m.NarrowMLP(24), m.NarrowPlusLinear(16, 2), m.TwoLayerMLP(24)]
FAMILIES += [m.ConvMLP(24), m.AttentionMLP(24, 8), m.MixtureOfExperts(12, 2), m.TransformerBlock(4, 2)]


@pytest.fixture(scope="module")
def captured():
    model = build("llama").to(torch.bfloat16)
    return model, *captured_whole(model, random_windows(8))


def test_sums_are_float64_of_float32_products(captured):
    model, blocks, stats = captured
    s, seen = stats[blocks[1]], activations(model, blocks[1], random_windows(8)[:6])
    assert {getattr(s, name).dtype for name in SUMS} == {torch.float64}
    assert {s.train.x.dtype, s.train.y.dtype, s.validation.x.dtype} == {torch.bfloat16}
    for name, expected in {"xx": seen["x"].T @ seen["x"], "hh": seen["h"].T @ seen["h"], "xy": seen["x"].T @ seen["y"]}.items():
        error = (getattr(s, name) - expected).norm() / expected.norm()
        assert error < 1e-5, name  # products in bfloat16 would be off by 1e-3


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_every_family_goes_the_whole_path(captured, family, tmp_path):
    model, blocks, stats = captured
    small = m.fit(blocks[1], stats, family)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    exact = m.fit(blocks[1], stats, m.Mean()).report.train
    assert small.report.train.pooled <= exact.pooled * 1.05
    compressed = m.splice(model, {blocks[1]: small})
    unseen = random_windows(2, seed=1)
    assert m.perplexity(compressed, unseen, progress=False).value > 1
    m.save(compressed, tmp_path / "out", standalone=True)
    again = m.load(tmp_path / "out", device="cpu")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again(unseen).logits, compressed(unseen).logits)
