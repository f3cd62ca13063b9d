"""The fingerprint of a module covers whatever computes in it; what it cannot cover is refused."""

import copy
import types
from functools import partial

import pytest
import torch
from conftest import capture_quietly
from tiny_models import MODELS, build, random_windows
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mlpreplace import compare, splice
from mlpreplace.models import pretrained
from mlpreplace.models.loading import Source
from mlpreplace.replacements import AttentionMLP
from mlpreplace.runtime.fingerprint import fingerprint


class Adapted(nn.Module):
    """A projection with an adapter beside it, as PEFT makes one: its strength and its switch are plain attributes."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.adapter = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self.scaling, self.disabled = {"default": 2.0}, False

    def forward(self, x):
        return self.base(x) if self.disabled else self.base(x) + self.scaling["default"] * self.adapter(x)


@pytest.fixture
def adapted():
    model = build("llama")
    model.model.layers[1].mlp.up_proj = Adapted(model.model.layers[1].mlp.up_proj)
    return model


def set_at(path: str, name: str, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


def stronger(model):
    model.model.layers[1].mlp.up_proj.scaling["default"] = 1.0


CHANGES = {
    "another activation": set_at("model.layers.1.mlp", "act_fn", nn.ReLU()),
    "another constant": set_at("model.layers.1.input_layernorm", "variance_epsilon", 0.1),
    "another scale": set_at("model.layers.1.self_attn", "scaling", 0.1),
    "a weaker adapter": stronger,
    "a disabled adapter": set_at("model.layers.1.mlp.up_proj", "disabled", True),
    "a named function": set_at("model.layers.1.mlp", "chosen", torch.tanh),
    "arguments of a function": set_at("model.layers.1.mlp", "chosen", partial(nn.functional.gelu, approximate="tanh")),
    "a buffer that is not saved": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    "another way to attend": lambda model: model.set_attn_implementation("eager"),
    "one layer more often": lambda model: model.model.layers.append(model.model.layers[0]),
    "another class": lambda model: setattr(model.model.layers[1].mlp.up_proj, "__class__", type("Other", (Adapted,), {})),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_computes_otherwise_has_another_fingerprint(change, adapted):
    before = fingerprint(adapted)
    change(adapted)
    assert fingerprint(adapted) != before


NOTHING = {
    "train mode": lambda model: model.train(),
    "a forward pass": lambda model: model(random_windows()),
    "where it is from": lambda model: setattr(model, "source", Source("elsewhere")),
    "how it generates": lambda model: setattr(model.generation_config, "temperature", 0.5),
    "a copy": copy.deepcopy,
}


@pytest.mark.parametrize("change", NOTHING.values(), ids=NOTHING)
def test_what_computes_alike_has_the_same_fingerprint(change, adapted):
    before = fingerprint(adapted)
    assert fingerprint(change(adapted) if change is copy.deepcopy else change(adapted) and adapted or adapted) == before


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_loaded_twice_has_one_fingerprint(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    first, second = (pretrained(MODELS[name][0], tmp_path) for _ in range(2))
    assert fingerprint(first) == fingerprint(second)


def test_a_class_that_was_patched_is_another(monkeypatch):
    model = build("llama")
    before = fingerprint(model)
    kind = type(model.model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    assert fingerprint(model) != before


def test_values_from_around_a_function_count(monkeypatch):
    """Of a class that a notebook defines."""

    def mine(factor: float):
        class Mine(nn.Module):
            def forward(self, x):
                return factor * x

        return Mine()

    assert fingerprint(mine(1.0)) == fingerprint(mine(1.0)) != fingerprint(mine(2.0))


def halve(module, args, output):
    return output * 0.5


UNKNOWN = {
    "a hook": lambda model: model.model.layers[1].register_forward_hook(halve),
    "a hook before": lambda model: model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (0.5 * args[0],)),
    "a hook of gradients": lambda model: model.lm_head.register_full_backward_hook(lambda *args: None),
    "a forward of its own": lambda model: setattr(model.model.layers[1].mlp, "forward", lambda x: x),
    "a method set on it": lambda model: setattr(model.lm_head, "forward", types.MethodType(lambda self, x: x, model.lm_head)),
    "a function": set_at("model.layers.1.mlp", "chosen", lambda x: x),
    "a thing without content": set_at("model.layers.1.mlp", "chosen", object()),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_what_cannot_be_covered_is_not_cached(change, llama, windows, results):
    change(llama)
    with pytest.raises(TypeError):
        fingerprint(llama)
    with pytest.raises(ValueError, match="cached=False"):
        capture_quietly(llama, windows, cached=True)
    with pytest.raises(ValueError, match="cached=False"):
        compare(llama, {"dense": {}}, windows, cached=True, progress=False)
    assert not results.exists()


def test_hooks_on_all_modules_are_not_covered(llama):
    handle = register_module_forward_hook(halve)
    try:
        with pytest.raises(TypeError, match="hooks on all modules"):
            fingerprint(llama)
    finally:
        handle.remove()
    assert fingerprint(llama)


def test_hooks_of_this_package_are_covered(captured):
    """Those that give a replacement its past."""
    from mlpreplace import fit

    model, blocks, stats = captured
    compressed = splice(model, {blocks[1]: fit(blocks[1], stats, AttentionMLP(8, 4))})
    assert any(module._forward_hooks for module in compressed.modules())
    assert fingerprint(compressed) == fingerprint(copy.deepcopy(compressed)) != fingerprint(model)
