"""What a folder of a saved model holds, when it appears, and what cannot be saved."""

from functools import partial
from importlib import import_module

import pytest
import torch
import yaml
from conftest import save_locally
from saved_models import FORMS, logits, narrow_plan, record_of, three_families
from tiny_models import build
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import mlpreplace
from mlpreplace import (
    export,
    load,
    load_model,
    save,
    splice,
)
from mlpreplace.models.loading import Source


@pytest.fixture
def base(tmp_path):
    """A folder with the tiny Llama."""
    return save_locally(build("llama"), tmp_path / "base")


@pytest.fixture
def model(base):
    return load_model(base, device="cpu")[0]


@pytest.fixture
def compressed(model):
    return three_families(model)


def test_the_record_and_the_card_say_what_it_is(compressed, base, tmp_path):
    metrics = {"perplexity ratio": 1.25, "windows": "8 × 512"}
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder = save(compressed, tmp_path / "out", metrics=metrics, tokenizer=tokenizer)
    record, card = record_of(folder), (folder / "README.md").read_text()
    assert record["base"]["id"] == base and record["metrics"] == metrics and record["form"] == "delta"
    assert record["versions"]["mlpreplace"] == mlpreplace.__version__ and record["versions"]["torch"] == torch.__version__
    narrowed = record["replacements"]["model.layers.2.mlp"]
    assert (narrowed["family"], narrowed["width"]) == ("NarrowMLP", 24)
    assert record["sparsity"] == pytest.approx(
        (3 * 3 * 32 * 48 - 32 * 33 - 32 * 9 - 3 * 32 * 24) / (3 * (3 * 32 * 48 + 4 * 32 * 32))
    )
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "mlpreplace", "pipeline_tag": "text-generation", "tags": ["mlpreplace", "compression"]}
    for said in (base, record["base"]["weights"], "| perplexity ratio | 1.25 |", "| LowRank(rank=4) | `model.layers.1.mlp` |"):
        assert said in card
    assert f"{record['sparsity']:.1%} of all attention and MLP parameters are gone" in card
    assert AutoTokenizer.from_pretrained(folder)("w3 w4").input_ids == [4, 5]


@pytest.mark.parametrize("write", [partial(save, standalone=True), export], ids=["standalone", "export"])
def test_how_to_generate_is_kept_as_it_is(write, model, tmp_path):
    """save_pretrained of transformers refuses this one."""
    compressed = splice(model, narrow_plan(model, 24))
    compressed.generation_config = GenerationConfig(do_sample=False, temperature=0.5, max_new_tokens=3)
    again = load(write(compressed, tmp_path / "out"), device="cpu").generation_config
    assert (again.temperature, again.max_new_tokens) == (0.5, 3)


def test_a_class_that_transformers_does_not_have(tmp_path, windows):
    class Own(LlamaForCausalLM):
        pass

    model = build("llama")
    model.__class__ = Own
    model.source = Source.of(model, "own")
    compressed = splice(model, narrow_plan(model, 24))
    with pytest.raises(ValueError, match="no class Own"):
        save(compressed, tmp_path / "out", standalone=True)
    again = load(save(compressed, tmp_path / "out"), base=model)
    assert torch.equal(logits(again, windows), logits(compressed, windows))


@FORMS
def test_save_never_overwrites(standalone, compressed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="out cannot be a new folder.*not empty"):
        save(compressed, tmp_path / "out", standalone=standalone)
    assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [("notes", "mine")]


@FORMS
def test_an_empty_folder_is_filled(standalone, compressed, tmp_path):
    (tmp_path / "out").mkdir()
    assert load(save(compressed, tmp_path / "out", standalone=standalone), device="cpu")


@FORMS
def test_save_needs_something_to_save(standalone, model, tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        save(model, tmp_path / "out", standalone=standalone)
    assert not (tmp_path / "out").exists()


def test_save_needs_to_know_the_base(llama, tmp_path, windows):
    compressed = splice(llama, narrow_plan(llama, 24))
    with pytest.raises(ValueError, match="source is not known"):
        save(compressed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = load(save(compressed, tmp_path / "out", standalone=True), device="cpu")
    assert again.source is None and torch.equal(logits(again, windows), logits(compressed, windows))


@FORMS
def test_nothing_is_left_when_saving_fails(standalone, compressed, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(import_module("mlpreplace.storage.save"), "save_file", full)  # its room has a function of that name
    with pytest.raises(OSError, match="no space left"):
        save(compressed, tmp_path / "parent" / "out", standalone=standalone)
    assert not (tmp_path / "parent").exists()


def test_metrics_that_json_cannot_hold_leave_nothing(compressed, tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        save(compressed, tmp_path / "parent" / "out", metrics={"perplexity": torch.ones(2)})
    assert not (tmp_path / "parent").exists()


def test_transformers_does_not_take_a_standalone_model_for_its_own(compressed, tmp_path):
    """It would load the rest and leave replaced blocks at random."""
    folder = save(compressed, tmp_path / "out", standalone=True)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(folder)


NAMES = ["a\nb", "a|b", "a\r\n\n| --- |\n# b", "<script>x</script>", "`code`", "a: b #c", "- a", "'", '"', "é\u2028ü"]


@pytest.mark.parametrize("text", NAMES)
def test_no_name_breaks_the_card(text, compressed, tmp_path):
    """Neither its table nor its front matter: what a metric, or a hub id in a hostile record, is called."""
    compressed.source = Source(text, revision=text, weights=compressed.source.weights)
    card = (save(compressed, tmp_path / "out", metrics={text: text, "after": 1.0}) / "README.md").read_text()
    front = yaml.safe_load(card.split("\n---\n")[0])
    assert front["base_model"] == text and front["tags"] == ["mlpreplace", "compression"]
    lines = card.splitlines()
    table = lines[lines.index("| metric | value |") :]
    rows = [line.replace(r"\|", "") for line in table[: table.index("")]]
    assert len(rows) == 4 and all(row.count("|") == 3 for row in rows) and rows[-1] == "| after | 1 |"
    assert (
        "<script" not in card.split("\n---\n", 1)[1]
        and lines.count("```python") == 1
        and len([line for line in lines if line.startswith("# ")]) == 1
    )


def test_the_id_of_a_relative_folder_is_found_from_elsewhere(tmp_path, monkeypatch, windows):
    save_locally(build("llama"), tmp_path / "here" / "base")
    for name in ("base", "./base", "../here/base", "base/"):
        monkeypatch.chdir(tmp_path / "here")
        model, _ = load_model(name, device="cpu")
        compressed = splice(model, narrow_plan(model, 24))
        folder = save(compressed, f"../{len(list(tmp_path.iterdir()))}")
        assert folder.is_absolute() and record_of(folder)["base"]["id"] == str(tmp_path / "here" / "base")
        monkeypatch.chdir("/")
        assert torch.equal(logits(load(folder, device="cpu"), windows), logits(compressed, windows))
