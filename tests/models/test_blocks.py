"""Where the blocks are and what they weigh, against sums over the state dict and the modules' own forward pass."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import HIDDEN, INTERMEDIATE, MODELS, VOCABULARY, build
from transformers import LlamaForCausalLM

from mlpreplace import find_blocks
from mlpreplace.models.blocks import evenly
from mlpreplace.models.parameters import count_parameters


def test_an_encoder_decoder_has_the_encoder_first_and_its_cross_attention():
    model = build("marian")
    assert [("decoder" in b.name) for b in find_blocks(model)] == [False, False, True, True]
    assert sum("encoder_attn" in b.name for b in find_blocks(model, "attention")) == 2


@pytest.mark.parametrize(("tied", "head"), [(True, 0), (False, VOCABULARY * HIDDEN)])
def test_a_tied_head_is_counted_once(tied, head):
    parts = count_parameters(build("llama", tie_word_embeddings=tied))
    assert (parts["embedding"], parts["head"]) == (VOCABULARY * HIDDEN, head)


@pytest.mark.parametrize(
    ("most", "layers"), [(1, [0]), (2, [0, 4]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (6, [0, 2, 4, 6]), (7, range(7))]
)
def test_evenly_is_at_most_so_many_at_equal_distances(most, layers):
    blocks = find_blocks(build("llama", num_hidden_layers=7))
    assert [b.layer for b in evenly(blocks, most)] == list(layers)


def test_evenly_takes_some():
    with pytest.raises(ValueError, match="most ≥ 1, got 0"):
        evenly(find_blocks(build("llama")), 0)


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


def no_neurons_in_attention(model):
    find_blocks(model, "attention")[0].weights()


def no_width_of_attention(model):
    _ = find_blocks(model, "attention")[0].intermediate_size


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (unknown_kind, ["'ffn'", "mlp", "attention"]),
        (no_neurons_in_attention, ["model.layers.0.self_attn", "no up/down MLP"]),
        (no_width_of_attention, ["model.layers.0.self_attn", "no up/down MLP"]),
    ],
)
def test_errors_say_what_is_wrong(act: Callable, words, llama):
    with pytest.raises(ValueError) as error:
        act(llama)
    assert all(word in str(error.value) for word in words)
