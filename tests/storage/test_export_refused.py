"""Models that have no plain form are refused with a way out, and nothing is written."""

import pytest
import torch
from saved_models import logits, narrow_plan
from tiny_models import build

from mlpreplace import LowRank, NarrowMLP, export, find_blocks, load, save, splice
from mlpreplace.evaluation.int8 import quantized
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.whole_layers import Removed, without_layers


def narrow(model, *widths: int):
    return splice(model, narrow_plan(model, *widths))


def without_attention(model, layer: int):
    """Attention and MLP of a layer replaced by nothing, its norms kept: not what without_layers does."""
    found = [b for kind in ("mlp", "attention") for b in find_blocks(model, kind) if b.layer == layer]
    return {b: Replacement(Removed(), b) for b in found}


def with_low_rank(model):
    return splice(model, narrow_plan(model, 24) | dict(list(plan_of(model, LowRank(4)).items())[2:]))


def plan_of(model, family):
    return {b: Replacement(family, b) for b in find_blocks(model)}


REFUSED = {
    r"model\.layers\.2\.mlp is replaced by LowRank\(rank=4\)": with_low_rank,
    r"model\.layers\.0\.mlp is replaced by Merged": lambda model: splice(model, merge_mlps(find_blocks(model))),
    r"model\.layers\.1\.(mlp|self_attn) is replaced by Removed": lambda model: splice(model, without_attention(model, 1)),
    r"computes in int8": lambda model: quantized(narrow(model, 24)),
    r"model\.layers\.1 has lost its MLP and its norms but not its attention": lambda model: splice(
        model, {b: r for b, r in without_layers(model, [1]).items() if b.kind == "layer"}
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_has_no_plain_form_stands_alone(said, llama, tmp_path, windows):
    compressed = REFUSED[said](llama)
    with pytest.raises(ValueError, match=said + r".*standalone=True"):
        export(compressed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = load(save(compressed, tmp_path / "out", standalone=True), device="cpu")
    assert torch.equal(logits(again, windows), logits(compressed, windows))


def test_attention_that_knows_its_layer_stays_in_its_place(tmp_path):
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"depends on the number of its layer.*standalone=True"):
        export(splice(model, without_layers(model, [0])), tmp_path / "out")


def test_a_tensor_that_a_checkpoint_would_not_hold(tmp_path):
    """Sinusoids of a Marian that are none would be lost without a word."""
    model = build("marian")
    compressed = splice(model, {b: Replacement(NarrowMLP(24), b) for b in find_blocks(model)})
    with pytest.raises(ValueError, match=r"embed_positions\.weight does not come back.*standalone=True"):
        export(compressed, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_frequencies_that_were_cast(tmp_path):
    """transformers computes them in float32 again."""
    with pytest.raises(ValueError, match=r"inv_freq does not come back.*cast.*standalone=True"):
        export(narrow(build("llama").to(torch.bfloat16), 24), tmp_path / "out")


def test_several_precisions(llama, tmp_path):
    compressed = narrow(llama, 24)
    compressed.lm_head.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"one precision.*bfloat16.*float32.*standalone=True"):
        export(compressed, tmp_path / "out")


def test_several_widths_on_two_sides(tmp_path):
    model = build("marian")
    compressed = splice(model, {b: Replacement(NarrowMLP(24), b) for b in find_blocks(model)[:1]})
    with pytest.raises(ValueError, match=r"an encoder and a decoder.*standalone=True"):
        export(compressed, tmp_path / "out")
