"""A pass refuses a block whose weights are not what it computes, and no other."""

import types
from contextlib import ExitStack

import pytest
import torch
from conftest import capture_quietly
from tiny_models import INTERMEDIATE, batches_for, build
from torch import nn

from mlpreplace import NarrowMLP, capture, find_blocks, fit
from mlpreplace.models.inputs import token_batches
from mlpreplace.statistics.unit_similarity import capture_units

NAME = "model.layers.1.mlp"


def hook_on(path, change):
    """A forward hook, which no module shows."""

    def put(model):
        model.get_submodule(f"{NAME}.{path}".rstrip(".")).register_forward_hook(lambda module, args, y: change(y))

    return put


def scaled_inputs(model):
    model.get_submodule(f"{NAME}.up_proj").register_forward_pre_hook(lambda module, args: (0.9 * args[0],))


def scaled_forward(model):
    """As of an architecture with a multiplier."""
    mlp = model.get_submodule(NAME)
    mlp.forward = types.MethodType(lambda self, x: 1.1 * type(self).forward(self, x), mlp)


def clamped_neurons(model):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))

    mlp = model.get_submodule(NAME)
    mlp.forward = types.MethodType(forward, mlp)


def another_activation(model):
    """Beside the one that the module holds."""
    mlp = model.get_submodule(NAME)
    mlp.forward = types.MethodType(lambda self, x: self.down_proj(nn.functional.relu(self.gate_proj(x)) * self.up_proj(x)), mlp)


def merged_calls(model):
    """As a fused kernel, which reads the weights of modules that it does not call."""
    mlp = model.get_submodule(NAME)

    def forward(self, x):
        return nn.functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    mlp.forward = types.MethodType(forward, mlp)


WRONG = {
    "output projection": hook_on("down_proj", lambda y: 1.05 * y),
    "whole block": hook_on("", lambda y: y + 0.1),
    "gate": hook_on("gate_proj", lambda y: y - 0.2),
    "inputs": scaled_inputs,
    "multiplier": scaled_forward,
    "clamp": clamped_neurons,
    "function": another_activation,
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_block_that_computes_something_else_is_refused(change, llama, windows):
    blocks = find_blocks(llama)
    change(llama)
    for moments in (("input", "hidden"), ()):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: its weights are not what it computes"):
            capture(llama, blocks, windows, moments=moments, progress=False)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: its weights are not what it computes"):
        capture_units(llama, blocks, token_batches(windows), progress=False)
    capture(llama, [blocks[0], blocks[2], *find_blocks(llama, "attention")], windows, progress=False)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()) <= 1


def test_an_output_projection_that_is_not_called_is_refused(llama, windows):
    merged_calls(llama)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp does not call its output projection"):
        capture_quietly(llama, windows)


def test_a_padded_first_batch_is_no_reason_not_to_look(llama, windows):
    """The check waits for a real token."""
    mask = torch.ones_like(windows)
    mask[:2] = 0
    blocks = find_blocks(llama)
    capture(llama, blocks, windows, mask, batch_size=2, sample_windows=0, progress=False)
    hook_on("down_proj", lambda y: 1.05 * y)(llama)
    with pytest.raises(ValueError, match="not what it computes"):
        capture(llama, blocks, windows, mask, batch_size=2, sample_windows=0, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "falcon", "gemma2", "bert", "t5", "t5_gated", "vit"])
def test_rounding_is_no_difference(name, dtype):
    model = build(name).to(dtype)
    (batch,) = batches_for(name, n=4, batch_size=4)
    batch = {k: t.to(dtype) if t.is_floating_point() else t for k, t in batch.items()}
    capture_quietly(model, batch, validation_windows=1, sample_windows=0)


def test_neither_is_autocast(llama, windows):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        capture_quietly(llama, windows, sample_windows=0)


def test_a_hook_that_only_looks_is_harmless(llama, windows):
    seen = []
    with ExitStack() as hooks:
        hooks.callback(llama.get_submodule(NAME).register_forward_hook(lambda module, args, y: seen.append(y)).remove)
        blocks, stats = capture_quietly(llama, windows)
    assert seen and fit(blocks[1], stats, NarrowMLP(INTERMEDIATE)).report.validation.pooled < 1e-6


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_a_block_that_runs_twice_in_one_pass_is_refused(kind, llama, windows):
    """As in a looped transformer: its modules are in one place, its inputs are not."""
    layers = llama.model.layers
    layer = layers[1]
    once = type(layer).forward
    layer.forward = types.MethodType(lambda self, *args, **kwargs: once(self, once(self, *args, **kwargs), **kwargs), layer)
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* runs several times in one pass"):
        capture_quietly(llama, windows, kind, moments=("input",))
