"""Checkpoints whose tensors are not exactly those of their model: no weight is random, and one error names the tensor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as t
from checkpoint_files import checkpoint, edit_json, edit_weights, refused
from conftest import save_locally
from safetensors.torch import load_file
from tiny_models import DECODERS, MODELS, SIZES, VISION, build
from transformers import AutoModelForCausalLM

from mlpreplace import load_model
from mlpreplace.models.checkpoints import pretrained

UP, NORM, INDEX = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return checkpoint(tmp_path)


def drop(part: str):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


TENSORS = {
    "one tensor missing": ("llama", drop(UP), f"1 missing.*{UP}"),
    "a norm missing": ("llama", drop(NORM), f"1 missing.*{NORM}"),
    "a head missing that is not tied": ("llama", drop("lm_head"), "1 missing.*lm_head"),
    "head and embedding missing that are tied": ("gpt2", drop("wte"), "missing.*wte"),
    "a whole layer missing": ("qwen2", drop("layers.2."), "12 missing.*layers.2"),
    "an expert of a mixture missing": ("mixtral", drop("layers.1.block_sparse_moe.experts.1."), r"lacks.*layers\.1.*experts\.1"),
    "a tensor of an expert missing": ("qwen3_moe", drop("layers.2.mlp.experts.2.up_proj"), r"lacks.*layers\.2.*experts\.2\.up"),
    "the last expert of all layers missing": ("mixtral", drop(".experts.3."), "of another shape.*experts"),
    "another shape": ("llama", lambda w: w.update({NORM: torch.ones(3)}), rf"{NORM}: \[3\], expected \[32\]"),
    "a transposed weight": ("llama", lambda w: w.update({UP: w[UP].T.contiguous()}), rf"{UP}: \[32, 48\], expected \[48, 32\]"),
    "an extra layer": (
        "llama",
        lambda w: w.update({n.replace("layers.2.", "layers.3."): t.clone() for n, t in w.items() if "layers.2." in n}),
        "9 unexpected.*layers.3",
    ),
    "a bias that the model does not have": (
        "llama",
        lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        "1 unexpected.*q_proj.bias",
    ),
    "codes of integers": ("llama", lambda w: w.update({UP: w[UP].to(torch.int8)}), f"{UP} as I8"),
    "codes of eight bits": ("llama", lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)}), f"{UP} as F8"),
}


@pytest.mark.parametrize(("name", "edit", "message"), TENSORS.values(), ids=TENSORS)
def test_a_checkpoint_that_is_not_of_its_model_is_refused_by_name(name, edit, message, tmp_path):
    folder = checkpoint(tmp_path, name)
    edit_weights(folder, edit)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_hidden_layers=4), "9 missing.*layers.3"),
        (dict(num_hidden_layers=2), "9 unexpected.*layers.2"),
        (dict(intermediate_size=64), r"9 of another shape.*\[48, 32\], expected \[64, 32\]"),
        (dict(attention_bias=True), "12 missing.*bias"),
        (dict(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "missing.*unexpected"),
    ],
)
def test_a_configuration_of_another_model_is_refused(changes, message, folder):
    edit_json(folder / "config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize("name", DECODERS)
def test_what_transformers_wrote_is_loaded_twice_alike(name, tmp_path):
    folder = checkpoint(tmp_path, name)
    one, other = (load_model(folder, device="cpu")[0] for _ in range(2))
    assert one.source.weights == other.source.weights and one.source.as_dict()["weights"]
    assert all(torch.equal(t, build(name).state_dict()[key]) for key, t in one.state_dict().items())


def test_what_the_model_computes_itself_may_be_stored_beside(folder):
    """Checkpoints of former versions hold positions and causal masks."""
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    edit_weights(folder, lambda tensors: tensors.update(old))
    assert load_model(folder, device="cpu")


def test_the_text_part_of_a_larger_checkpoint_is_a_model(tmp_path):
    text = SIZES | dict(num_key_value_heads=4, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, moe_layers=[1])
    vision = VISION | dict(projector_input_dim=16, projector_output_dim=16, vision_output_dim=16)
    whole = t.Llama4ForConditionalGeneration(t.Llama4Config(text_config=text | dict(pad_token_id=0), vision_config=vision))
    folder = Path(save_locally(whole, tmp_path / "whole"))
    model, _ = load_model(folder, device="cpu")
    assert torch.equal(model.lm_head.weight, whole.language_model.lm_head.weight) and not hasattr(model, "vision_model")
    edit_weights(folder, lambda w: w.update({"language_model.model.layers.3.input_layernorm.weight": torch.ones(32)}))
    refused(folder, "1 unexpected.*layers.3")


def test_every_class_of_models_is_read_in_the_same_way(tmp_path):
    for name in ("vit", "t5", "bert", "gemma3"):
        folder, model_class = checkpoint(tmp_path, name), MODELS[name][0]
        assert all(torch.equal(t, build(name).state_dict()[k]) for k, t in pretrained(model_class, folder).state_dict().items())
        lost = [key for key in load_file(folder / "model.safetensors") if "norm" in key.lower()][0]
        edit_weights(folder, drop(lost))
        with pytest.raises(ValueError, match="1 missing"):
            pretrained(model_class, folder)


# files that do not go together


@pytest.fixture
def sharded(folder):
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert load_model(folder, device="cpu") and len(list(folder.glob("*.safetensors"))) > 5
    return folder


def edit_index(folder: Path, edit) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def copy_tensor(folder: Path) -> None:
    """A tensor in two shards, with two values."""
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    other = max(set(where.values()) - {where[NORM]})
    edit_weights(folder, lambda tensors: tensors.update({NORM: torch.ones(32)}), other)


SHARDS = {
    "a shard that is not there": (lambda d: next(d.glob("model-00002-*")).unlink(), "lacks model-00002-of.*index.json"),
    "an index that names no such shard": (lambda d: edit_index(d, lambda m: m.update({UP: "other.safetensors"})), "lacks other"),
    "an index that lists a tensor in the wrong shard": (
        lambda d: edit_index(d, lambda m: m.update({UP: m[NORM]})),
        f"disagree.*{UP}",
    ),
    "an index without a shard": (
        lambda d: edit_index(d, lambda m: [m.pop(n) for n, file in list(m.items()) if "-00002-" in file]),
        "missing.*layers.0",
    ),
    "a tensor in two shards": (copy_tensor, f"disagree.*{NORM}"),
    "a broken index": (lambda d: (d / INDEX).write_text("{"), "JSONDecodeError"),
    "an index of nothing": (lambda d: (d / INDEX).write_text("{}"), "no weight_map"),
    "no index": (lambda d: (d / INDEX).unlink(), r"holds no \.safetensors weights"),
    "a shard of a distributed checkpoint": (
        lambda d: next(d.glob("model-00002-*")).rename(d / "shard-00001-model-00001-of-00001.safetensors"),
        "distributed",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SHARDS.values(), ids=SHARDS)
def test_shards_that_do_not_go_together_are_refused(spoil, message, sharded):
    spoil(sharded)
    refused(sharded, message)


def test_weights_that_are_replaced_while_they_are_read_are_refused(folder, tmp_path, monkeypatch):
    other, read = checkpoint(tmp_path, "llama", seed=1), AutoModelForCausalLM.from_pretrained

    def replaced(*args, **options):
        found = read(*args, **options)
        shutil.copy(other / "model.safetensors", folder / "new")
        (folder / "new").replace(folder / "model.safetensors")
        return found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", replaced)
    refused(folder, "written while they were read")
