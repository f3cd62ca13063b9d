"""Hybrids to test, in tiny models or fitted to pairs that are made up."""

import torch
from conftest import capture_quietly
from tiny_models import build, random_windows

from mlpreplace import AttentionMLP, ConvMLP, MixtureOfExperts, TransformerBlock, fit
from mlpreplace.models.blocks import block_neurons
from mlpreplace.statistics.records import BlockStatistics, Sample

LOOKING_BACK = [ConvMLP(12, kernel=3), AttentionMLP(12, head_dim=4), TransformerBlock(2)]
MIXTURE = MixtureOfExperts(6, experts=3)
HYBRIDS = [*LOOKING_BACK, MIXTURE]


def normal(*shape, seed: int):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs(x, y) -> Sample:
    """[windows, seq_len, hidden] pairs as a sample, residual energy 1."""
    ones = torch.ones(x.shape[:2])
    return Sample(x, y, ones, ones.bool())


def planted(block, x, y, held_out: int, validation: int):
    """({block: statistics}, held-out sample) of float64 pairs [windows, seq_len, hidden] that stand for the block's."""
    inputs, outputs = x.to(block.dtype), y.to(block.dtype)
    n = len(x) - held_out - validation
    flat_x, flat_y = x[:n].flatten(0, 1), y[:n].flatten(0, 1)
    moments = dict(sum_x=flat_x.sum(0), sum_y=flat_y.sum(0), xx=flat_x.T @ flat_x, xy=flat_x.T @ flat_y)
    if block.has_neurons:
        h = block_neurons(block, flat_x)
        moments |= dict(sum_h=h.sum(0), hh=h.T @ h)
    train, unseen, held = (
        pairs(inputs[part], outputs[part]) for part in (slice(n), slice(n, n + validation), slice(n + validation, None))
    )
    return {block: BlockStatistics(len(flat_x), **moments, train=train, validation=unseen)}, held


def shaken(replacement, seed: int = 0):
    """A start whose every parameter matters: taps, attention and experts are no longer zero or alike."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in replacement.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return replacement


def fitted(name: str, *families, **changes):
    """(model, plan) of a tiny model: block i replaced by families[i], None leaves it. float64 but for Mixtral's experts."""
    model = build(name, **changes).to(torch.float32 if name == "mixtral" else torch.float64)
    blocks, stats = capture_quietly(model, random_windows(8, 24), sample_windows=6)
    return model, {b: shaken(fit(b, stats, f), i) for i, (b, f) in enumerate(zip(blocks, families, strict=False)) if f}
