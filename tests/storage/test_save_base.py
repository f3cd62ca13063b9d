"""Replacements saved alone come back only with the base model that they were made from."""

import re
import shutil

import pytest
import torch
import yaml
from conftest import save_locally
from safetensors.torch import load_file, save_file
from saved_models import FORMS, change_record, logits, narrow_plan, record_of, reseal, three_families
from tiny_models import build

from mlpreplace import (
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


def change(folder: str, name: str) -> None:
    """One number of one tensor of a checkpoint."""
    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_base_with_one_other_weight_is_refused(name, base, compressed, tmp_path):
    """Also where it is one that was replaced: the folder says what it was made from."""
    folder = save(compressed, tmp_path / "out")
    made = record_of(folder)["base"]["weights"]
    change(base, name)
    with pytest.raises(ValueError, match=f"base model differs.*{made}, found [0-9a-f]{{32}}.*base=model") as error:
        load(folder, device="cpu")
    assert len(set(re.findall("[0-9a-f]{32}", str(error.value)))) == 2


def test_a_base_that_moved_is_the_same_base(base, compressed, tmp_path, windows):
    folder = save(compressed, tmp_path / "out")
    moved = shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="Unknown model"):
        load(folder, device="cpu")
    again = load(folder, base=load_model(str(moved), device="cpu")[0])
    assert torch.equal(logits(again, windows), logits(compressed, windows))


def test_a_base_in_shards_is_the_same_base(base, compressed, tmp_path, windows):
    folder = save(compressed, tmp_path / "out")
    build("llama").save_pretrained(base, max_shard_size="20KB")
    assert torch.equal(logits(load(folder, device="cpu"), windows), logits(compressed, windows))


def test_a_base_of_another_configuration_is_refused(base, compressed, tmp_path):
    folder = save(compressed, tmp_path / "out")
    build("llama", rms_norm_eps=0.1).config.save_pretrained(base)
    with pytest.raises(ValueError, match=r"configuration.*made with rms_norm_eps=1e-06, found 0\.1"):
        load(folder, device="cpu")


def test_a_base_of_the_caller(tmp_path, windows):
    """A model that was made in memory has no files to be hashed."""
    model = build("llama")
    model.source = Source.of(model, "made in memory")
    compressed = splice(model, narrow_plan(model, 24))
    folder = save(compressed, tmp_path / "out")
    assert torch.equal(logits(load(folder, base=build("llama")), windows), logits(compressed, windows))
    with pytest.raises(ValueError, match="base model differs"):
        load(folder, base=build("llama", seed=1))
    with pytest.raises(ValueError, match="in torch.float64"):
        load(folder, base=build("llama").double())
    with pytest.raises(ValueError, match="without base="):
        load(save(compressed, tmp_path / "whole", standalone=True), base=model)


def test_a_hub_id_is_pinned_to_its_commit(tmp_path, monkeypatch, windows):
    """A repository as the hub's cache has it, and no network."""
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--owner--name"
    folder = save_locally(build("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache))
    model, _ = load_model("owner/name", device="cpu")
    assert model.source == Source("owner/name", revision=commit)
    compressed = splice(model, narrow_plan(model, 24))
    saved = save(compressed, tmp_path / "out")
    assert yaml.safe_load((saved / "README.md").read_text().split("---")[1])["base_model"] == "owner/name"
    assert torch.equal(logits(load(saved, device="cpu"), windows), logits(compressed, windows))
    change(folder, "model.norm.weight")
    with pytest.raises(ValueError, match="base model differs"):
        load(saved, device="cpu")


def test_what_was_trained_outside_the_replacements_is_not_lost(compressed, tmp_path, windows):
    compressed.model.norm.weight.data[0] += 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not what .*trained"):
        save(compressed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = load(save(compressed, tmp_path / "out", standalone=True), device="cpu")
    assert torch.equal(logits(again, windows), logits(compressed, windows))


# the folder


def test_load_refuses_a_folder_without_replacements(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no replacements\.json"):
        load(tmp_path)


def test_load_refuses_an_unknown_family(compressed, tmp_path):
    folder = save(compressed, tmp_path / "out")
    change_record(folder, lambda record: next(iter(record["replacements"].values())).update(family="Cubic"))
    with pytest.raises(ValueError, match="Unknown family 'Cubic'"):
        load(folder, device="cpu")


@FORMS
def test_load_refuses_weights_that_are_not_whole(standalone, compressed, tmp_path):
    folder = save(compressed, tmp_path / "out", standalone=standalone)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.body.down.weight"]
    save_file(tensors, path)
    reseal(folder)
    with pytest.raises(ValueError, match=r"1 tensors are missing .*\['model\.layers\.2\.mlp\.body\.down\.weight'\]"):
        load(folder, device="cpu")
