"""Exported models are plain checkpoints: transformers loads them where mlpreplace cannot be imported."""

import copy
import json

import pytest
import torch
from conftest import save_locally
from hybrid_blocks import shaken
from layer_blocks import deep
from safetensors.torch import load_file, save_file
from saved_models import logits, narrow_plan, run_python
from tiny_models import MODELS, build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mlpreplace import NarrowMLP, export, find_blocks, load, load_model, save, splice
from mlpreplace.models.layers import find_layers
from mlpreplace.models.loading import empty_model
from mlpreplace.planning.distil import with_rest
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.splice import replacements_of
from mlpreplace.replacements.whole_layers import Tuned, without_layers

MODELS_OF_ONE_WIDTH = {
    "llama": {},  # gated
    "llama with biases": {"mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma": {},
    "gpt2": {},  # ungated, in Conv1D layers
    "opt": {},  # in three modules
    "falcon with biases": {"bias": True},  # which it adds apart
    "gpt_neox": {},  # whose checkpoints have other names for weights
}
PLAIN = ["README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "replacements.json"]


def built(name: str):
    return build(name.replace(",", "").split()[0], **MODELS_OF_ONE_WIDTH[name])


def narrow(model, *widths: int):
    return splice(model, narrow_plan(model, *widths))


def all_logits(model, windows) -> torch.Tensor:
    """Of whole windows and of single tokens: a product with one row is computed in another way."""
    return torch.cat([logits(model, windows).flatten(0, 1), logits(model, windows[:1, :1])[0]])


# one width

CODE = """
import sys

class NoMLPReplace:
    def find_spec(self, name, *about):
        if name.partition(".")[0] == "mlpreplace":
            raise ImportError(name)

sys.meta_path.insert(0, NoMLPReplace())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
windows = load_file(sys.argv[1])["windows"]
found = {}
for i, folder in enumerate(sys.argv[3:]):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        whole = model(windows).logits.flatten(0, 1)
        for parameter in model.parameters():  # mapped from the file they are aligned otherwise, which may change the last bits
            parameter.data = parameter.data.clone()
        found[str(i)] = torch.cat([whole, model(windows[:1, :1]).logits[0]])
save_file(found, sys.argv[2])
try:
    import mlpreplace
except ImportError:
    sys.exit()
sys.exit("mlpreplace could be imported")
"""


def test_transformers_loads_it_where_mlpreplace_cannot_be_imported(tmp_path, windows):
    save_file({"windows": windows}, tmp_path / "windows")
    models = {name: narrow(built(name), 24) for name in MODELS_OF_ONE_WIDTH}
    folders = [export(model, tmp_path / name) for name, model in models.items()]
    run_python(CODE, tmp_path / "windows", tmp_path / "logits", *folders)
    found = load_file(tmp_path / "logits")
    for i, (name, model) in enumerate(models.items()):
        assert torch.equal(found[str(i)], all_logits(model, windows)), name
        assert not torch.equal(found[str(i)], all_logits(built(name), windows)), name


def test_a_plain_folder(tmp_path, windows):
    folder = save_locally(build("llama"), tmp_path / "base")
    model, tokenizer = load_model(folder, device="cpu")
    compressed = narrow(model, 24)
    folder = export(compressed, tmp_path / "out", metrics={"ratio": 1.25}, tokenizer=tokenizer)
    assert set(PLAIN) < {file.name for file in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == 24 and config["architectures"] == ["LlamaForCausalLM"]
    assert "per_layer_config" not in config and str(tmp_path) not in (folder / "config.json").read_text()
    size = (folder / "model.safetensors").stat().st_size
    assert 0 < size - 4 * sum(p.numel() for p in compressed.parameters()) < 8192
    assert json.loads((folder / "replacements.json").read_text())["metrics"] == {"ratio": 1.25}
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card and "LlamaForCausalLM.from_pretrained(folder)" in card
    assert AutoTokenizer.from_pretrained(folder)("w3 w4").input_ids == [4, 5]
    assert torch.equal(logits(load_model(str(folder), device="cpu")[0], windows), logits(compressed, windows))
    again = load(folder, device="cpu")
    assert torch.equal(logits(again, windows), logits(compressed, windows))
    assert again.source.id == str(folder) and not again.training


@pytest.mark.parametrize("name", ["gpt2", "falcon with biases"])
def test_the_precision_is_exported(name, tmp_path, windows):
    model, _ = load_model(save_locally(built(name), tmp_path / "base"), device="cpu", dtype=torch.bfloat16)
    compressed = narrow(model, 24)
    again = AutoModelForCausalLM.from_pretrained(export(compressed, tmp_path / "out")).eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(all_logits(again, windows), all_logits(compressed, windows))


def test_what_was_tuned_is_the_block_again(tmp_path, windows):
    model = build("llama")
    plan = with_rest(model, narrow_plan(model, 24))
    compressed = splice(model, {b: shaken(r, i) for i, (b, r) in enumerate(plan.items())})
    again = AutoModelForCausalLM.from_pretrained(export(compressed, tmp_path / "out")).eval()
    assert torch.equal(logits(again, windows), logits(compressed, windows))
    assert not torch.equal(again.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)


def test_tuned_mlps_keep_their_width(tmp_path, windows):
    model = build("opt")
    compressed = splice(model, {b: shaken(Replacement(Tuned(), b)) for b in find_blocks(model)})
    again = AutoModelForCausalLM.from_pretrained(export(compressed, tmp_path / "out")).eval()
    assert torch.equal(logits(again, windows), logits(compressed, windows))
    assert again.config.ffn_dim == 48


# several widths


WIDTH = {"llama": "intermediate_size", "gpt2": "n_inner", "opt": "ffn_dim", "gpt_neox": "intermediate_size"}


@pytest.mark.parametrize("name", WIDTH)
def test_several_widths_are_in_the_configuration(name, tmp_path, windows):
    model = build(name)
    compressed = splice(model, {b: r for b, r in narrow_plan(model, 24, 16, 8).items() if b.layer != 1})
    folder = export(compressed, tmp_path / "out")
    config = AutoConfig.from_pretrained(folder)
    assert [getattr(layer, WIDTH[name]) for layer in config.per_layer_config] == [24, 48, 8]
    again = load(folder, device="cpu")
    assert torch.equal(all_logits(again, windows), all_logits(compressed, windows))
    assert [b.intermediate_size for b in find_blocks(again)] == [24, 48, 8] and not replacements_of(again)
    assert again.generate(windows[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert "mlpreplace import load" in (folder / "README.md").read_text()


def test_transformers_refuses_several_widths(tmp_path):
    """It would otherwise leave MLPs at random. Once this fails, transformers reads them, and load has no work left."""
    folder = export(narrow(build("llama"), 24, 16, 8), tmp_path / "out")
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_only_widths_differ_by_layer():
    model = build("llama")
    model.config.per_layer_config = {1: {"num_attention_heads": 2}}
    with pytest.raises(ValueError, match="Layer 1 has num_attention_heads of its own"):
        empty_model(type(model), model.config)


def test_tied_embeddings_of_several_widths(tmp_path, windows):
    compressed = narrow(build("llama", tie_word_embeddings=True), 24, 16, 8)
    again = load(export(compressed, tmp_path / "out"), device="cpu")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again, windows), logits(compressed, windows))


def test_an_exported_model_can_be_compressed_again(tmp_path, windows):
    """Several widths become others, and one."""
    model = load(export(narrow(build("llama"), 24, 16, 8), tmp_path / "out"), device="cpu")
    for widths in ((12, 9, 8), (8,)):
        compressed = narrow(model, *widths)
        for folder in (
            export(compressed, tmp_path / f"plain{widths}"),
            save(compressed, tmp_path / f"{widths}", standalone=True),
        ):
            assert torch.equal(logits(load(folder, device="cpu"), windows), logits(compressed, windows))
        assert AutoConfig.from_pretrained(tmp_path / f"plain{widths}").is_heterogeneous == (len(widths) > 1)


# fewer layers


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "mixtral"])
def test_without_layers(name, tmp_path, windows):
    model = deep(name, 4).float()
    compressed = splice(model, without_layers(model, [0, 2]))
    folder = export(compressed, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert len(find_layers(again)) == again.config.num_hidden_layers == 2
    assert torch.equal(logits(again, windows), logits(compressed, windows))
    tokens = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(windows[:2], **tokens), compressed.generate(windows[:2], **tokens))


def test_types_of_layers_go_with_them(tmp_path):
    """Where layers attend in different ways, those that stay do so in theirs."""
    types = ["sliding_attention", "full_attention", "full_attention"]
    model = build("gemma2", layer_types=types, sliding_window=4)
    windows = torch.arange(3, 33)[None]
    compressed = splice(model, without_layers(model, [0]))
    again = AutoModelForCausalLM.from_pretrained(export(compressed, tmp_path / "out")).eval()
    assert again.config.layer_types == types[1:]
    assert torch.equal(logits(again, windows), logits(compressed, windows))


def test_the_one_width_that_is_left(tmp_path, windows):
    model = load(export(narrow(build("llama"), 24, 16, 24), tmp_path / "first"), device="cpu")
    compressed = splice(model, without_layers(model, [1]))
    again = AutoModelForCausalLM.from_pretrained(export(compressed, tmp_path / "out")).eval()
    assert torch.equal(logits(again, windows), logits(compressed, windows)) and again.config.intermediate_size == 24


def test_fewer_layers_of_several_widths(tmp_path, windows):
    model = build("llama")
    plan = {b: r for b, r in narrow_plan(model, 24, 16, 8).items() if b.layer != 1} | without_layers(model, [1])
    compressed = splice(model, plan)
    folder = export(compressed, tmp_path / "out")
    assert [layer.intermediate_size for layer in AutoConfig.from_pretrained(folder).per_layer_config] == [24, 8]
    assert torch.equal(logits(load(folder, device="cpu"), windows), logits(compressed, windows))


# the folder


def test_there_is_something_to_export(llama, tmp_path):
    with pytest.raises(ValueError, match="nothing to"):
        export(llama, tmp_path / "out")


def test_export_never_overwrites_and_leaves_nothing_half(llama, tmp_path, monkeypatch):
    compressed = narrow(llama, 24)
    folder = export(compressed, tmp_path / "deep" / "out")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileExistsError, match="out cannot be a new folder"):
        export(compressed, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(TypeError, match="JSON"):
        export(compressed, tmp_path / "deep" / "other", metrics={"perplexity": torch.ones(2)})
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]


def test_export_changes_nothing(llama, windows, tmp_path):
    compressed = narrow(llama, 24, 16, 8)
    before, config = logits(compressed, windows), copy.deepcopy(compressed.config.to_dict())
    export(compressed, tmp_path / "out")
    assert torch.equal(logits(compressed, windows), before) and compressed.config.to_dict() == config
    assert all(r.family == NarrowMLP(width) for r, width in zip(replacements_of(compressed).values(), (24, 16, 8), strict=True))
    assert MODELS["llama"][1].intermediate_size == 48
