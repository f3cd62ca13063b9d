"""Where the blocks are and what they weigh, against sums over the state dict and the modules' own forward pass."""

import re
from collections.abc import Callable

import pytest
import torch
from tiny_models import HIDDEN, INTERMEDIATE, MODELS, VOCABULARY, build
from transformers import LlamaForCausalLM

import mlpreplace.architectures
from mlpreplace import Stack, count_parameters, find_blocks, register_architecture

NEURONS = [name for name in MODELS if name != "mixtral"]
# what belongs to a block, as patterns over the names of parameters inside a layer
MLP = {
    "opt": r"\.fc[12]\.",
    "marian": r"\.fc[12]\.",
    "bert": r"layer\.\d+\.(intermediate|output)\.dense",
    "t5": r"DenseReluDense",
}
ATTENTION = {"t5": r"SelfAttention\.|EncDecAttention\.", "bert": r"\.attention\."}


def sum_of(model, pattern: str) -> int:
    """Parameters whose name matches, norms excluded."""
    return sum(p.numel() for n, p in model.named_parameters() if re.search(pattern, n) and "norm" not in n.lower())


@pytest.fixture
def registry(monkeypatch):
    """A registry of architectures that a test may write into."""
    monkeypatch.setattr(mlpreplace.architectures, "ARCHITECTURES", dict(mlpreplace.architectures.ARCHITECTURES))


@pytest.mark.parametrize("name", MODELS)
def test_block_parameters_are_those_of_the_state_dict(name):
    model = build(name)
    mlps, attentions = find_blocks(model, "mlp"), find_blocks(model, "attention")
    assert sum(b.n_params for b in mlps) == sum_of(model, MLP.get(name, r"\.mlp\."))
    pattern = ATTENTION.get(name, r"\.(self_attn|attn|attention|self_attention|encoder_attn)\.")
    assert sum(b.n_params for b in attentions) == sum_of(model, pattern)
    assert all(b.n_params > 0 for b in mlps + attentions)


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_has_one_mlp_in_order_of_depth(name):
    model = build(name)
    blocks = find_blocks(model)
    depth = sum(len(layers) for _, _, layers in mlpreplace.blocks.layer_lists(model))
    assert len({b.name for b in blocks}) == len(blocks) == depth
    assert all(model.get_submodule(path) is module for b in blocks for path, module in zip(b.paths, b.modules, strict=True))
    for stack in dict.fromkeys(b.stack for b in blocks):
        assert [b.layer for b in blocks if b.stack == stack] == list(range(sum(b.stack == stack for b in blocks)))


def test_an_encoder_decoder_has_the_encoder_first_and_its_cross_attention():
    model = build("marian")
    assert [("decoder" in b.name) for b in find_blocks(model)] == [False, False, True, True]
    assert sum("encoder_attn" in b.name for b in find_blocks(model, "attention")) == 2


@pytest.mark.parametrize("name", NEURONS)
def test_sizes(name):
    for block in find_blocks(build(name)):
        assert (block.hidden_size, block.intermediate_size) == (HIDDEN, INTERMEDIATE)
        weights = block.weights()
        assert weights.up.shape == (INTERMEDIATE, HIDDEN)
        assert weights.down.shape == (HIDDEN, INTERMEDIATE)


@pytest.mark.parametrize("name", NEURONS)
def test_weights_reproduce_the_block(name):
    """Any layer class, Conv1D included: down(act(up x)) or down(act(gate x) · up x) by hand is the modules' own output."""
    block = find_blocks(build(name))[1]
    w = block.weights()
    x = torch.randn(5, HIDDEN)

    def affine(weight, bias):
        return x @ weight.T + (0 if bias is None else bias)

    up = affine(w.up, w.up_bias)
    h = block.activation(up) if w.gate is None else block.activation(affine(w.gate, w.gate_bias)) * up
    by_hand = h @ w.down.T + (0 if w.down_bias is None else w.down_bias)
    with torch.no_grad():
        output = x
        for module in block.modules:
            output = module(output)
    torch.testing.assert_close(by_hand, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_parts_sum_to_the_total(name):
    model = build(name)
    parts = count_parameters(model)
    total = parts.pop("total")
    assert total == sum(p.numel() for p in model.parameters()) == sum(parts.values())
    assert min(parts.values()) >= 0


@pytest.mark.parametrize(("tied", "head"), [(True, 0), (False, VOCABULARY * HIDDEN)])
def test_a_tied_head_is_counted_once(tied, head):
    parts = count_parameters(build("llama", tie_word_embeddings=tied))
    assert (parts["embedding"], parts["head"]) == (VOCABULARY * HIDDEN, head)


def test_norms_are_in_no_block():
    """Qwen3 normalises queries and keys inside its attention block."""
    model = build("qwen3")
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert count_parameters(model)["other"] == norms


def test_a_mixture_of_experts_uses_a_part_of_its_parameters():
    block = find_blocks(build("mixtral"))[0]
    experts, router = 4 * 3 * HIDDEN * INTERMEDIATE, 4 * HIDDEN
    assert block.n_params == experts + router
    assert block.n_active_params == experts // 2 + router
    dense = find_blocks(build("llama"))[0]
    assert dense.n_active_params == dense.n_params


def test_blocks_are_found_on_the_meta_device():
    with torch.device("meta"):
        model = LlamaForCausalLM(MODELS["llama"][1])
    assert [b.n_params for b in find_blocks(model)] == [b.n_params for b in find_blocks(build("llama"))]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_block_survives_reloading_the_model(name):
    first, again = find_blocks(build(name)), find_blocks(build(name, seed=1))
    assert first == again
    assert {first[0]: "found"}[again[0]] == "found"
    assert first[0] != again[1]


def unknown_kind(model):
    find_blocks(model, "ffn")


def unknown_architecture(model):
    model.config.model_type = "nobody"
    find_blocks(model)


def no_neurons_in_attention(model):
    find_blocks(model, "attention")[0].weights()


def no_width_of_attention(model):
    _ = find_blocks(model, "attention")[0].intermediate_size


def no_stack(model):
    register_architecture("empty")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (unknown_kind, ["'ffn'", "mlp", "attention"]),
        (unknown_architecture, ["nobody", "llama", "gpt2", "register_architecture"]),
        (no_neurons_in_attention, ["model.layers.0.self_attn", "no up/down MLP"]),
        (no_width_of_attention, ["model.layers.0.self_attn", "no up/down MLP"]),
        (no_stack, ["empty", "Stack"]),
    ],
)
def test_errors_say_what_is_wrong(act: Callable, words, llama):
    with pytest.raises(ValueError) as error:
        act(llama)
    assert all(word in str(error.value) for word in words)


def test_an_architecture_can_be_registered(registry, llama):
    llama.config.model_type = "my_llama"
    stack = Stack("layers", ("mlp",), ("self_attn",), "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "mlp.act_fn")
    register_architecture("my_llama", stack)
    mine, known = find_blocks(llama), find_blocks(build("llama"))
    assert [(b.name, b.n_params, b.intermediate_size) for b in mine] == [(b.name, b.n_params, b.intermediate_size) for b in known]


def test_a_stack_that_is_not_there_is_an_error(registry, llama):
    register_architecture("llama", Stack("blocks", ("mlp",), ("self_attn",)))
    with pytest.raises(ValueError, match="'blocks', found 0"):
        find_blocks(llama)
