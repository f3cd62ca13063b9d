"""Architectures that are registered, nested in others, not what was registered, or guessed: what is found, said and refused."""

import doctest
import re
import warnings

import pytest
import torch
import transformers as t
from conftest import capture_quietly
from tiny_models import GROUPED, INTERMEDIATE, MODELS, SIZES, VOCABULARY, build, outputs, random_windows
from torch import nn
from torch.testing import assert_close

from mlpreplace import LowRank, NarrowMLP, Stack, find_blocks, fit, load, register_architecture, save, splice, spliced
from mlpreplace.models.loading import Source

UNKNOWN = {  # of no registered type; with neurons or not
    "stablelm": (t.StableLmForCausalLM, t.StableLmConfig(**GROUPED), True),
    "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config(**GROUPED), True),
    "starcoder2": (t.Starcoder2ForCausalLM, t.Starcoder2Config(**GROUPED), True),
    "gptj": (
        t.GPTJForCausalLM,
        t.GPTJConfig(n_embd=32, n_inner=48, n_layer=3, n_head=4, rotary_dim=4, n_positions=64, vocab_size=VOCABULARY),
        True,
    ),
    "modernbert-decoder": (  # gate and up are one projection
        t.ModernBertDecoderForCausalLM,
        t.ModernBertDecoderConfig(**SIZES, local_attention=8, pad_token_id=0),
        True,
    ),
    "bitnet": (t.BitNetForCausalLM, t.BitNetConfig(**GROUPED), False),  # a norm stands before its output projection
}


@pytest.fixture
def unknown(registry, monkeypatch):
    """Tiny models of unknown types can be built."""
    for name, (model_class, config, _) in UNKNOWN.items():
        assert name not in registry
        monkeypatch.setitem(MODELS, name, (model_class, config))


class MLP(nn.Module):
    """Gated, with names that say nothing, and ``scale``."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.a, self.b = nn.Linear(48, 32), nn.Linear(32, 48)
        self.c, self.d = nn.Linear(32, 48), nn.Dropout(0.5)
        self.e, self.scale = nn.SiLU(), scale

    def forward(self, x):
        return self.scale * self.a(self.d(self.e(self.b(x)) * self.c(x)))


def of_unknown_type(model, mlp=None):
    model.config.model_type = "nobody"
    for layer in model.model.layers if mlp else ():
        layer.mlp = mlp()
    return model


# guessed


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_guess_says_so_and_what_it_took(name, unknown, registry):
    model, has_neurons = build(name), UNKNOWN[name][2]
    with pytest.warns(UserWarning, match=f"'{name}' .* is no registered architecture. Its blocks were guessed") as said:
        mlps = find_blocks(model)
    (call,) = re.findall(r"(register_architecture\(.*\)) says the same", str(said[0].message))
    guessed = registry.pop(name)
    eval(call)
    assert registry[name] == guessed and (guessed[0].up is not None) == has_neurons
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attentions = find_blocks(model, "attention")
    assert len(mlps) == len(attentions) == 3 and all(b.has_neurons == has_neurons for b in mlps)
    layers = model.get_submodule(mlps[0].stack)
    norms = sum(p.numel() for m in layers.modules() if "norm" in type(m).__name__.lower() for p in m.parameters())
    assert sum(b.n_params for b in (*mlps, *attentions)) == sum(p.numel() for p in layers.parameters()) - norms


@pytest.mark.filterwarnings("ignore:.*is no registered architecture")
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_was_guessed_is_captured_fitted_replaced_and_saved(name, unknown, registry, tmp_path):
    model = build(name)
    model.source = Source.of(model, "hub/somewhere")
    dense, (mlps, stats) = outputs(model, name), capture_quietly(model, random_windows())
    if UNKNOWN[name][2]:
        with spliced(model, {b: fit(b, stats, NarrowMLP(INTERMEDIATE)) for b in mlps}):
            assert_close(outputs(model, name), dense, rtol=0, atol=1e-3)
    attentions, of_attention = capture_quietly(model, random_windows(), "attention", moments=("input",))
    plan = {b: fit(b, stats | of_attention, LowRank(4)) for b in (*mlps, *attentions[:2])}
    compressed = splice(model, plan)
    assert find_blocks(compressed) == mlps and not any(b.has_neurons for b in find_blocks(compressed))
    delta, alone = save(compressed, tmp_path / "delta"), save(compressed, tmp_path / "alone", standalone=True)
    for folder, base in ((delta, build(name)), (alone, None)):
        registry.pop(name)  # another process is told, and need not guess again
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(outputs(load(folder, device="cpu", base=base), name), outputs(compressed, name))
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached, full = (compressed.generate(random_windows(2), use_cache=u, **options) for u in (True, False))
    assert torch.equal(cached, full) and not torch.equal(outputs(compressed, name), dense)


@pytest.mark.filterwarnings("ignore:.*is no registered architecture")
def test_neurons_are_found_by_what_they_do(registry, llama):
    """Not by names, and not where an MLP does more than its projections and its activation."""
    block = find_blocks(of_unknown_type(llama, MLP))[0]
    mlp = block.modules[0]
    assert (block.up, block.down, block.gate, block.activation) == (mlp.c, mlp.a, mlp.b, mlp.e)
    registry.pop("nobody")
    blocks = find_blocks(of_unknown_type(llama, lambda: MLP(2.0)))
    assert len(blocks) == 3 and not any(b.has_neurons for b in blocks)


def takes_the_residual():
    config = t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    return t.BloomForCausalLM(config).eval()


def no_single_mlp():
    return build("bert")


def two_lists():
    return build("t5")


def without_weights():
    with torch.device("meta"):
        return t.LlamaForCausalLM(t.LlamaConfig(**SIZES))


@pytest.mark.parametrize("make", [takes_the_residual, no_single_mlp, two_lists, without_weights])
def test_what_cannot_be_guessed_is_an_error(make, registry):
    model = make()
    model.config.model_type = "nobody"
    with pytest.raises(ValueError, match="Unknown architecture 'nobody'") as error:
        find_blocks(model)
    found = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [name for name in found if not re.search(r"\.\d+\.", name)]
    assert all(word in str(error.value) for word in ("llama", "register_architecture('nobody', Stack(...))", *found))
    assert "nobody" not in registry


def test_no_configuration_no_blocks():
    with pytest.raises(ValueError, match=r"Unknown architecture None \(Linear\)"):
        find_blocks(nn.Linear(2, 2))


# registered


def test_the_example_of_register_architecture(unknown, recwarn):
    tests = doctest.DocTestFinder().find(register_architecture, globs={})
    assert sum(len(test.examples) for test in tests) == 2
    assert not any(doctest.DocTestRunner().run(test).failed for test in tests)
    blocks = find_blocks(build("stablelm"))
    assert len(blocks) == 3 and all(b.gate is not None for b in blocks) and not recwarn.list


def test_a_registered_architecture_is_found_as_a_known_one(registry, llama):
    of_unknown_type(llama)
    register_architecture("nobody", *registry["llama"])
    mine, known = find_blocks(llama), find_blocks(build("llama"))
    assert [(b.name, b.n_params, b.intermediate_size) for b in mine] == [(b.name, b.n_params, b.intermediate_size) for b in known]


def test_registering_needs_a_stack():
    with pytest.raises(ValueError, match=r"register_architecture\('empty'\) needs at least one Stack"):
        register_architecture("empty")


LLAMA = dict(layers="layers", mlp=("mlp",), attention=("self_attn",))


@pytest.mark.parametrize("some", [dict(up="mlp.a"), dict(up="mlp.a", down="mlp.b"), dict(gate="mlp.a")])
def test_neurons_are_registered_whole(some):
    with pytest.raises(ValueError, match="need up, down and activation together"):
        Stack(**LLAMA, **some)


@pytest.mark.parametrize(
    ("wrong", "missing", "found"),
    [
        (dict(layers="blocks"), r"one module list named 'blocks', found 0", "model.layers"),
        (dict(mlp=("feed_forward",)), r"model\.layers\.0 \(LlamaDecoderLayer\) has no 'feed_forward'", "mlp"),
        (dict(attention=("attn",)), r"model\.layers\.0 \(LlamaDecoderLayer\) has no 'attn'", "self_attn"),
        (dict(attention=(("self_attn", "out"),)), r"has no 'out'", "self_attn"),
        (dict(up="mlp.fc1", down="mlp.down_proj", activation="mlp.act_fn"), r"has no 'mlp\.fc1'", "mlp.up_proj"),
    ],
)
def test_what_is_registered_and_not_there_is_named(wrong, missing, found, registry, llama):
    register_architecture("llama", Stack(**LLAMA | wrong))
    with pytest.raises(ValueError, match=missing) as error:
        [find_blocks(llama, kind) for kind in ("mlp", "attention")]
    assert found in str(error.value) and "register_architecture('llama', Stack(...))" in str(error.value)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(t.Phi4MultimodalForCausalLM, t.Phi4MultimodalConfig()), (t.Glm4vForConditionalGeneration, t.Glm4vConfig())],
)
def test_published_models_that_see_have_their_neurons_in_one_projection(model_class, config, recwarn):
    with torch.device("meta"):
        blocks = find_blocks(model_class(config))
    text = config.get_text_config()
    assert len(blocks) == text.num_hidden_layers and all(b.gate is b.up for b in blocks) and not recwarn.list
    assert {(b.hidden_size, b.intermediate_size) for b in blocks} == {(text.hidden_size, text.intermediate_size)}


# nested


def test_blocks_of_a_model_that_sees_are_those_of_its_language_model():
    model = build("llava")
    (config,) = (MODELS["llava"][1].text_config,)
    text = t.LlamaForCausalLM(config)
    inside = [(b.name.replace("model.language_model.", "model."), b.n_params, b.hidden_size) for b in find_blocks(model)]
    assert inside == [(b.name, b.n_params, b.hidden_size) for b in find_blocks(text)]


def test_a_nested_language_model_is_guessed(unknown):
    config = t.LlavaConfig(text_config=UNKNOWN["stablelm"][1], vision_config=MODELS["llava"][1].vision_config)
    model = t.LlavaForConditionalGeneration(config)
    with pytest.warns(UserWarning, match=r"'stablelm' \(LlavaForConditionalGeneration\) is no registered"):
        blocks = find_blocks(model)
    assert [b.name for b in blocks] == [f"model.language_model.layers.{i}.mlp" for i in range(3)]
