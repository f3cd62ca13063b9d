"""A cached result is the very result, of this call and of no other; a file is whole or not there."""

import importlib
from contextlib import ExitStack
from itertools import count

import pytest
import torch
from forked import SERVER

from mlpreplace.runtime import cache
from mlpreplace.runtime.cache import Entry, code_hash

hashes = importlib.import_module("mlpreplace.runtime.fingerprint")  # the room has a function of this name

# what an entry depends on


def test_results_depend_on_the_code(tmp_path, results, monkeypatch, fresh_assets):
    monkeypatch.setattr(hashes, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("from .c import x\n")
    (tmp_path / "c.py").write_text("x = 1\n")
    before = Entry("name", "a", 1).path
    assert before != Entry("name", "a", 2).path
    assert before == Entry("name", "a", 1).path
    (tmp_path / "c.py").write_text("x = 2\n")
    code_hash.cache_clear()
    assert before != Entry("name", "a", 1).path


def test_results_depend_on_the_versions(results, monkeypatch):
    before = Entry("name", "runtime/cache").path
    monkeypatch.setattr(cache.transformers, "__version__", "0")
    assert before != Entry("name", "runtime/cache").path


def test_an_entry_of_an_unknown_module_is_an_error(results):
    with pytest.raises(ValueError, match="no module 'statistics/typo'"):
        Entry("name", "statistics/typo", 1)


# entries


def test_an_entry_comes_back(results):
    entry, tensors = Entry("name", "runtime/cache", 1), {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(2.5)}
    assert entry.load() is None
    entry.save(tensors)
    stored = Entry("name", "runtime/cache", 1).load()
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    assert Entry("name", "runtime/cache", 2).load() is None
    assert [f.suffix for f in results.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"not a result", b"\xff" * 64])
def test_a_file_that_is_not_whole_is_no_result(content, results):
    entry = Entry("name", "runtime/cache")
    entry.save({"a": torch.zeros(3)})
    entry.path.write_bytes(content)
    assert entry.load() is None
    entry.save({"a": torch.ones(3)})
    assert torch.equal(entry.load()["a"], torch.ones(3))


def test_an_entry_in_which_any_byte_changed_is_no_result(results):
    """Also in the header: in a name, a shape, a number of the record, the checksum itself."""
    entry = Entry("name", "runtime/cache")
    entry.save({"a": torch.arange(12.0), "seven": 7})
    content = entry.path.read_bytes()
    for at in range(len(content)):
        entry.path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert entry.load() is None, at
    entry.path.write_bytes(content)
    assert entry.load()["seven"] == 7


@pytest.mark.parametrize("damage", ["cut", "zeroed", "longer"])
def test_an_entry_with_another_end_is_no_result(damage, results):
    """As after a power cut, or on a disk that was full."""
    entry = Entry("name", "runtime/cache")
    entry.save(torch.arange(1000.0))
    content = entry.path.read_bytes()
    ends = {"cut": content[:-512], "zeroed": content[:-512] + bytes(512), "longer": content + bytes(8)}
    entry.path.write_bytes(ends[damage])
    assert entry.load() is None


def replaced_for_ever(entry: Entry) -> None:
    for i in count():
        entry.save({"a": torch.full((500,), float(i)), "b": torch.full((i % 18 + 1, 3), float(i))})


def test_an_entry_that_is_replaced_while_it_is_read_is_one_or_the_other(results):
    entry = Entry("name", "runtime/cache")
    entry.save({"a": torch.zeros(500)})
    process = SERVER.Process(target=replaced_for_ever, args=(entry,), daemon=True)
    process.start()
    found = set()
    try:
        while len(found) < 20:
            values = torch.cat([t.flatten() for t in entry.load().values()])
            assert len(values.unique()) == 1
            found.add(values[0].item())
    finally:
        process.kill()
        process.join()


def test_an_entry_that_cannot_be_written_leaves_nothing(results, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"a part of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(cache, "_write", full)
    with pytest.raises(OSError, match=r"could not be kept in .*no space left.*Make room"):
        Entry("name", "runtime/cache").save({"a": torch.zeros(3)})
    assert not any(results.iterdir())


@pytest.mark.parametrize("setting", ["default dtype", "matmul precision", "autocast"])
def test_results_depend_on_the_settings_of_torch(setting, results):
    def path() -> str:
        return Entry("name", "runtime/cache").path

    before = path()
    with ExitStack() as stack:
        if setting == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        elif setting == "default dtype":
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("medium")
        assert path() != before
    assert path() == before
