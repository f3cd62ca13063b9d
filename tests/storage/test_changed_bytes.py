"""A saved folder is whole, readable by whom the umask lets, strict json, and refused where one byte is not what was written."""

import json
import os
import resource
import stat
import threading
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

import pytest
import torch
from conftest import save_locally, word_tokenizer
from forked import SERVER
from saved_models import logits, narrow_plan, record_of, three_families
from tiny_models import build
from transformers import GenerationConfig

from mlpreplace import export, load, load_model, save, splice
from mlpreplace.models.loading import Source
from mlpreplace.runtime.files import SUMS

saving = import_module("mlpreplace.storage.save")  # its room has a function of that name


def delta(model, folder, **also):
    return save(three_families(model), folder, **also)


def standalone(model, folder, **also):
    return save(three_families(model), folder, standalone=True, **also)


def plain(model, folder, **also):
    return export(splice(model, narrow_plan(model, 24)), folder, **also)


def widths(model, folder, **also):
    return export(splice(model, narrow_plan(model, 24, 16, 8)), folder, **also)


FORMS = pytest.mark.parametrize("write", [delta, standalone, plain, widths])


@pytest.fixture
def model(tmp_path):
    return load_model(save_locally(build("llama"), tmp_path / "base"), device="cpu")[0]


def read_by_load(folder) -> list:
    """Its files but the card, which is for people to edit, and SHA256SUMS itself."""
    return sorted(file for file in folder.iterdir() if file.name not in ("README.md", SUMS))


@FORMS
def test_one_flipped_bit_in_any_file_is_refused_by_its_name(write, model, tmp_path):
    folder = write(model, tmp_path / "out")
    for file in read_by_load(folder):
        content = file.read_bytes()
        for at in (0, len(content) // 3, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(ValueError, match=f"{file.name} is not what was written"):
                load(folder, device="cpu")
        file.write_bytes(content)
    (folder / "README.md").write_text("My notes.")
    assert load(folder, device="cpu")


def zero_tail(file) -> None:
    file.write_bytes(file.read_bytes()[:-100] + bytes(100))


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def grown(file) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def of_another_run(file) -> None:
    """The weights of a model with other numbers, of the same names and shapes."""
    other = build("llama", seed=1)
    folder = (delta if file.name == "replacements.safetensors" else standalone)(other_source(other), file.parent.parent / "other")
    file.write_bytes((folder / file.name).read_bytes())


def other_source(model):
    model.source = Source.of(model, "other")
    return model


@pytest.mark.parametrize("damage", [zero_tail, cut, grown, of_another_run, os.truncate], ids=lambda f: f.__name__)
@pytest.mark.parametrize("write", [delta, standalone])
def test_weights_that_are_not_whole_are_refused(write, damage, model, tmp_path):
    folder = write(model, tmp_path / "out")
    (file,) = folder.glob("*.safetensors")
    damage(file, 0) if damage is os.truncate else damage(file)
    with pytest.raises(ValueError, match=f"{file.name} is not what was written"):
        load(folder, device="cpu")


@FORMS
def test_a_file_that_is_gone_is_named(write, model, tmp_path):
    folder = write(model, tmp_path / "out")
    for file in read_by_load(folder):
        if file.name != "replacements.json":
            file.rename(folder.parent / "away")
            with pytest.raises(ValueError, match=f"has lost {file.name}"):
                load(folder, device="cpu")
            (folder.parent / "away").rename(file)
    (folder / SUMS).unlink()
    with pytest.raises(ValueError, match=f"no {SUMS}"):
        load(folder, device="cpu")


# what is written


@FORMS
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_who_may_read_it_is_what_the_umask_says(umask, write, model, tmp_path):
    before = os.umask(umask)
    try:
        folder = write(model, tmp_path / "out", tokenizer=word_tokenizer(["a", "b"]))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask} and stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


def refuse(constant: str):
    raise AssertionError(f"{constant} is no json")


@FORMS
def test_every_json_is_one_that_all_readers_take(write, model, tmp_path):
    model.generation_config = GenerationConfig(temperature=float("inf"), max_new_tokens=3)
    metrics = {"ratio": float("nan"), "of each": [1.0, float("inf")], "nested": {"kl": -float("inf"), "n": 3}}
    folder = write(model, tmp_path / "out", metrics=metrics)
    for file in folder.glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    assert record_of(folder)["metrics"] == {"ratio": None, "of each": [1.0, None], "nested": {"kl": None, "n": 3}}
    again = load(folder, device="cpu")
    assert again.generation_config.max_new_tokens == 3 or write is delta


# at once, and on a full disk


@pytest.mark.parametrize("write", [delta, standalone])
def test_of_two_saves_into_one_folder_one_wins_whole(write, tmp_path, monkeypatch, windows):
    """Both have claimed the empty folder and written their files before the first of them gives them their name."""
    models, outcomes, together = [other_source(build("llama", seed=seed)) for seed in (0, 1)], {}, threading.Barrier(2)
    written = saving.write_record

    def together_written(*args):
        written(*args)
        together.wait(timeout=60)

    def run(i: int) -> None:
        try:
            outcomes[i] = write(models[i], tmp_path / "out")
        except Exception as error:
            outcomes[i] = error

    monkeypatch.setattr(saving, "write_record", together_written)
    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lost,) = [i for i, outcome in outcomes.items() if isinstance(outcome, Exception)]
    assert isinstance(outcomes[lost], FileExistsError) and "meanwhile" in str(outcomes[lost])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = load(tmp_path / "out", device="cpu", **({"base": build("llama", seed=1 - lost)} if write is delta else {}))
    assert torch.equal(logits(again, windows), logits(three_families(models[1 - lost]), windows))


def on_a_full_disk(write, folder, limit: int, tokenizer: bool) -> tuple[str, str, list]:
    """What it raises, and what is left, where no file may have more than ``limit`` bytes."""
    torch.set_num_threads(1)
    model = other_source(build("llama"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(model, folder, tokenizer=word_tokenizer(map(str, range(20_000))) if tokenizer else None)
    except Exception as error:
        return type(error).__name__, str(error), [path.name for path in folder.parent.iterdir()]
    return "", "", []


@pytest.fixture(scope="module")
def elsewhere():
    with ProcessPoolExecutor(1, mp_context=SERVER) as pool:
        yield lambda *given: pool.submit(on_a_full_disk, *given).result(timeout=120)


@pytest.mark.parametrize("tokenizer", [False, True])
@FORMS
def test_a_full_disk_is_one_error_and_nothing_is_left(write, tokenizer, elsewhere, tmp_path):
    limit = 250_000 if tokenizer else 2_000
    kind, said, left = elsewhere(write, tmp_path / "out", limit, tokenizer)
    assert kind == "OSError" and "out could not be written" in said and "Make room" in said and left == []
