"""Attention with as many heads in every layer is a plain checkpoint; other narrowed attention is refused."""

import pytest
import torch
from saved_models import logits, narrow_plan
from tiny_models import DECODERS, build
from transformers import AutoModelForCausalLM

from mlpreplace import export, find_blocks, splice
from mlpreplace.models.attention import attention_weights
from mlpreplace.replacements import NarrowAttention, Replacement
from mlpreplace.replacements.whole_layers import without_layers

SAY_HEADS = ["llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "qwen3_moe"]  # have a head_dim


def plan_of(model, *sizes, value_dim=None, key_dim=None):
    """Attention of layer i narrowed to sizes[i] = (heads, groups), the last of them for all that follow, with random weights."""
    blocks = find_blocks(model, "attention")
    sizes = [*sizes, *[sizes[-1]] * len(blocks)]
    plan = {}
    for block, (heads, groups) in zip(blocks, sizes, strict=False):
        whole = attention_weights(block).value.shape[1]
        plan[block] = Replacement(NarrowAttention(heads, groups, value_dim or whole, key_dim), block)
    return plan


def fewer(model) -> set[tuple[int, int]]:
    """Half of the groups, whole; and, where a group has several heads, one head of each."""
    weights = attention_weights(find_blocks(model, "attention")[0])
    heads, groups = len(weights.query), len(weights.key)
    halves = {(heads // 2, groups // 2)} if groups > 1 else set()
    return halves | ({(groups, groups)} if groups < heads else set())


@pytest.mark.parametrize("name", SAY_HEADS)
def test_as_many_heads_everywhere(name, tmp_path, windows):
    model = build(name)
    for heads in fewer(model):
        compressed = splice(model, plan_of(model, heads))
        folder = export(compressed, tmp_path / f"{heads}")
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert (again.config.num_attention_heads, again.config.num_key_value_heads) == heads
        assert torch.equal(logits(again, windows), logits(compressed, windows))
        assert again.num_parameters() == compressed.num_parameters() < model.num_parameters()


def test_beside_narrower_mlps_and_without_a_layer(tmp_path, windows):
    model = build("llama")
    plan = plan_of(model, (2, 2)) | narrow_plan(model, 24)
    gone = without_layers(model, [1])
    compressed = splice(model, {b: r for b, r in plan.items() if b.layer != 1} | gone)
    again = AutoModelForCausalLM.from_pretrained(export(compressed, tmp_path / "out")).eval()
    assert torch.equal(logits(again, windows), logits(compressed, windows))


def test_heads_read_by_unequal_numbers(tmp_path):
    model = build("mistral")
    plan = plan_of(model, (3, 2))
    for replacement in plan.values():
        replacement.body.read_by(torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"read by unequal numbers of heads.*standalone=True"):
        export(splice(model, plan), tmp_path / "out")


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in SAY_HEADS])
def test_what_no_configuration_says(name, tmp_path):
    """How many heads there are beside a hidden size, or which part of a fused projection is whose."""
    model = build(name)
    with pytest.raises(ValueError, match=r"has no |does not have.*standalone=True"):
        export(splice(model, plan_of(model, *fewer(model))), tmp_path / "out")


def test_different_and_narrower_heads(tmp_path):
    model = build("llama")
    refused = {
        r"different numbers of heads \(NarrowAttention.*": plan_of(model, (1, 1), (2, 2)),
        "different numbers of heads.*all heads": dict(list(plan_of(model, (2, 2)).items())[1:]),
        "value_dim=4.*does not have": plan_of(model, (4, 4), value_dim=4),
        "key_dim=4.*does not have": plan_of(model, (4, 4), key_dim=4),
    }
    for said, plan in refused.items():
        with pytest.raises(ValueError, match=said + r".*standalone=True"):
            export(splice(model, plan), tmp_path / "out")
        assert not (tmp_path / "out").exists()
