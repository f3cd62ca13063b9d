"""Settings of PyTorch that a program may have made for itself, its default dtype and device, change no result."""

from contextlib import contextmanager

import pytest
import torch
from conftest import captured_whole, word_tokenizer
from tiny_models import VOCABULARY, build, random_windows
from torch import nn

import mlpreplace as m
from mlpreplace.fitting.training import Training
from mlpreplace.models.generation import generate_windows
from mlpreplace.models.inputs import token_batches
from mlpreplace.planning.damage import second_order_damage
from mlpreplace.planning.distil import Healing, Tuning, tune
from mlpreplace.planning.nest import narrowed, nest
from mlpreplace.statistics import Span, capture_spans, capture_stream, capture_units, cka_map

FAMILIES = [m.Mean(), m.Linear(), m.LowRank(4), m.NarrowMLP(24), m.NarrowPlusLinear(16, 2), m.TwoLayerMLP(24)]
FAMILIES += [m.ConvMLP(24), m.AttentionMLP(24, 8), m.MixtureOfExperts(12, 2), m.TransformerBlock(4, 2)]
WINDOWS = random_windows(8)
LEFT = torch.arange(12) >= torch.tensor([0, 3, 5, 0, 2, 7, 0, 1])[:, None]


@contextmanager
def default(setting: torch.dtype | str):
    dtype = torch.get_default_dtype()
    try:
        if isinstance(setting, str):
            torch.set_default_device(setting)
        else:
            torch.set_default_dtype(setting)
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)


SETTINGS = [torch.float64, torch.bfloat16, torch.float16, "meta"]  # meta: whatever is made there instead of on the CPU fails


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, nn.Module):
        return list(value.state_dict().values())
    if isinstance(value, (torch.Tensor, float, int)):
        return [value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")]
    if isinstance(value, (dict, list, tuple)):
        return [t for item in (value.values() if isinstance(value, dict) else value) for t in tensors(item)]
    return tensors({k: v for k, v in vars(value).items() if k != "seconds"}) if hasattr(value, "__dict__") else []


def assert_same(found, expected) -> None:
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@pytest.fixture(scope="module")
def case():
    model = build("llama")
    blocks, stats = captured_whole(model, WINDOWS)
    return model, blocks, stats, {b: m.fit(b, stats, m.NarrowMLP(24)) for b in blocks}


TOKENIZER = word_tokenizer(f"w{i}" for i in range(1, VOCABULARY))
HOW = Healing(steps=3, check_steps=2, top_k=8)
BATCHES = token_batches(WINDOWS, LEFT, labels=True)
USES = {
    "capture": lambda model, blocks, stats, plan: captured_whole(model, WINDOWS, mask=LEFT)[1],
    "stream": lambda model, blocks, stats, plan: capture_stream(model, WINDOWS, progress=False),
    "spans": lambda model, blocks, stats, plan: capture_spans(model, [Span(1, 3)], WINDOWS, LEFT, progress=False),
    "cka": lambda model, blocks, stats, plan: cka_map(capture_units(model, blocks, BATCHES, progress=False), blocks),
    "perplexity": lambda model, blocks, stats, plan: m.perplexity(model, WINDOWS, progress=False),
    "compare": lambda model, blocks, stats, plan: m.compare(model, {"": plan}, WINDOWS, progress=False)[""].mean_kl,
    "generate": lambda model, blocks, stats, plan: generate_windows(model, TOKENIZER, n_windows=4, seq_len=8),
    "damage": lambda model, blocks, stats, plan: second_order_damage(model, {b: [r] for b, r in plan.items()}, WINDOWS),
    "allocate": lambda model, blocks, stats, plan: m.allocate(model, stats, 0.2, "search", windows=WINDOWS, progress=False),
    "refit": lambda model, blocks, stats, plan: m.refit(model, plan, WINDOWS, progress=False),
    "heal": lambda model, blocks, stats, plan: m.heal(model, plan, WINDOWS, WINDOWS[:4], HOW, progress=False),
    "tune": lambda model, blocks, stats, plan: tune(model, plan, BATCHES, BATCHES, Tuning(steps=2), progress=False),
    "nested": lambda model, blocks, stats, plan: narrowed(nest(stats, {0.1: plan, 0.2: plan}, progress=False), 0.1),
    "splice": lambda model, blocks, stats, plan: m.splice(model, plan),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", USES)
def test_a_default_changes_no_result(name, setting, case):
    expected = USES[name](*case)
    with default(setting):
        found = USES[name](*case)
    assert_same(found, expected)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("training", [None, Training(epochs=1)], ids=["closed form", "trained"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_a_default_changes_no_fit(family, training, setting, case):
    _, blocks, stats, _ = case
    expected = m.fit(blocks[1], stats, family, training=training, progress=False)
    with default(setting):
        found = m.fit(blocks[1], stats, family, training=training, progress=False)
        found(WINDOWS.new_ones(1, 4, 32, dtype=torch.float32))
    assert_same(found, expected)
    assert_same(found.report.validation, expected.report.validation)
