"""Attention blocks to test: tiny models and plans that replace their attention."""

import torch
from conftest import capture_quietly
from tiny_models import SINGLE, build, random_windows

from mlpreplace import Linear, LowRank, TwoLayerMLP, fit

SETS = [(0,), (1,), (0, 2), (0, 1, 2)]  # layers whose attention is replaced


def precise(name: str, **changes):
    """A tiny model in float64 where it can be."""
    return build(name, **changes).to(torch.float32 if name in SINGLE else torch.float64)


def assert_alike(name: str, actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 if name in SINGLE else 1e-9)


def attention_plan(model, family=None, layers=(0, 1, 2)):
    blocks, stats = capture_quietly(model, random_windows(8, 24), "attention", moments=("input",))
    return {block: fit(block, stats, family or Linear()) for block in blocks if block.layer in layers}


def both_kinds(model):
    """A plan of MLP and attention blocks, in one layer and in different ones."""
    mlps, stats = capture_quietly(model, random_windows(8, 24))
    mixed = {mlps[0]: fit(mlps[0], stats, TwoLayerMLP(8)), mlps[1]: fit(mlps[1], stats, Linear())}
    return mixed | attention_plan(model, LowRank(4), layers=(0, 2))
