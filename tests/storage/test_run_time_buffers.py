"""What a model computes anew for the length of its inputs is no part of what is saved."""

import pytest
import torch
import transformers as t
from saved_models import logits, narrow_plan
from tiny_models import SLIDES, TOKENS, build

from mlpreplace import Mean, Stack, export, find_blocks, load, save, splice
from mlpreplace.models.loading import Source
from mlpreplace.replacements.families import Replacement

CONTEXT = 16  # of the short inputs; the long ones go beyond
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": CONTEXT}
LONG |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": CONTEXT}
BY_KIND = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}


def grouped(name: str, rope: dict, **changes):
    return build(name, rope_parameters=rope, max_position_embeddings=CONTEXT, **changes)


MODELS = {
    "dynamic": lambda: grouped("llama", DYNAMIC),
    "dynamic in GPT-NeoX": lambda: grouped("gpt_neox", DYNAMIC | {"partial_rotary_factor": 1.0}),
    "dynamic in half precision": lambda: grouped("mistral", DYNAMIC).to(torch.bfloat16),
    "dynamic by kind of layer": lambda: grouped("gemma3_text", BY_KIND, layer_types=SLIDES),
    "longrope": lambda: grouped("qwen2", LONG, num_key_value_heads=4),
    "yarn": lambda: grouped("llama", YARN),
    "default": lambda: build("qwen3", max_position_embeddings=CONTEXT),
}


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


SHORT, LONGER, LONGEST = ids(6), ids(CONTEXT + 4), ids(3 * CONTEXT)
PASSES = {
    "none": [],
    "short": [SHORT],
    "long": [LONGEST],
    "long, then short": [LONGEST, SHORT],
    "twice": [LONGER, SHORT, LONGEST],
}
WRITTEN = {
    "delta": lambda model, folder, base: load(save(model, folder), base=base),
    "standalone": lambda model, folder, base: load(save(model, folder, standalone=True), device="cpu"),
    "export": lambda model, folder, base: load(export(model, folder), device="cpu"),
}


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_the_same_whatever_was_run_before(name, form, tmp_path):
    if form == "export" and "half" in name:
        pytest.skip("a checkpoint does not hold frequencies that were cast")
    model = MODELS[name]()
    model.source = Source.of(model, "made here")
    plan = narrow_plan(model, 24)
    expected = [
        logits(splice(MODELS[name](), plan), SHORT),
        *(logits(splice(MODELS[name](), plan), x) for x in (LONGER, LONGEST)),
    ]
    for i, passes in enumerate(PASSES.values()):
        compressed = splice(model, plan)
        for x in passes:
            logits(compressed, x)
        after = logits(compressed, SHORT) if passes else expected[0]
        assert torch.equal(after, expected[0])
        for x in passes:
            logits(compressed, x)
        again = WRITTEN[form](compressed, tmp_path / str(i), MODELS[name]())
        for x, logits_of_new in zip((SHORT, LONGER, LONGEST, SHORT), (*expected, expected[0]), strict=True):
            assert torch.equal(logits(again, x), logits_of_new)


def test_a_table_of_positions_that_grew(tmp_path, registry):
    """XGLM computes more sinusoids when an input needs them."""
    registry["xglm"] = (Stack("layers", ("fc1", "activation_fn", "fc2"), ("self_attn",), "fc1", "fc2", None, "activation_fn"),)
    sizes = dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    model = t.XGLMForCausalLM(t.XGLMConfig(**sizes, **TOKENS)).eval()
    compressed = splice(model, {find_blocks(model)[0]: Replacement(Mean(), find_blocks(model)[0])})
    short = logits(compressed, SHORT)
    rows = dict(compressed.named_buffers())["model.embed_positions.weights"].shape[0]
    long = logits(compressed, LONGEST)
    assert dict(compressed.named_buffers())["model.embed_positions.weights"].shape[0] > rows
    again = load(save(compressed, tmp_path / "out", standalone=True), device="cpu")
    assert torch.equal(logits(again, SHORT), short) and torch.equal(logits(again, LONGEST), long)


def test_a_frequency_that_somebody_set_is_kept(tmp_path):
    """Positions by linear interpolation, as it was done by hand: the configuration does not know."""
    model = build("llama")
    compressed = splice(model, narrow_plan(model, 24))
    compressed.model.rotary_emb.inv_freq /= 2
    again = load(save(compressed, tmp_path / "out", standalone=True), device="cpu")
    assert torch.equal(logits(again, SHORT), logits(compressed, SHORT))
    assert not torch.equal(logits(again, SHORT), logits(splice(model, narrow_plan(model, 24)), SHORT))
