"""How much memory statistics may take, and tensors that take none until they are read."""

import gc
import sys

import psutil
import pytest
import torch

from mlpreplace.runtime import memory
from mlpreplace.runtime.memory import MOST_BUDGET, VARIABLE, give_back, memory_budget, on_disk, put_away

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0, 0), (5_000, 5_000), ("500MB", 5 * 10**8), ("2 GiB", 2**31), ("1.5gb", 15 * 10**8), ("1_000", 1_000), ("64KiB", 2**16)],
)
def test_a_budget_that_was_given_is_taken(given, expected, monkeypatch):
    assert memory_budget(given, [CPU]) == expected
    monkeypatch.setenv(VARIABLE, str(given))
    assert memory_budget(None, [CPU]) == expected
    assert memory_budget("7MB", [CPU]) == 7 * 10**6


@pytest.mark.parametrize("given", ["", "much", "-1", "1.2.3GB", "5 TB", "GB", "1e9"])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(ValueError, match=f"memory budget.*{VARIABLE}"):
        memory_budget(given, [CPU])


def test_by_default_it_is_half_of_what_is_free(monkeypatch):
    class Host:
        available = 2**40

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", Host)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None if device.type == "cpu" else 10**10)
    assert memory_budget(None, [CPU]) == memory_budget(None, [CPU, GPU]) == MOST_BUDGET
    assert memory_budget(None, [GPU]) == 5 * 10**9
    Host.available = 10**6
    assert memory_budget(None, [GPU]) == memory_budget(None, [CPU]) == 5 * 10**5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_tensor_on_disk_has_the_same_bits_and_leaves_no_file(dtype, results):
    tensor = torch.randn(6, 5).mul(100).to(dtype).T
    found = on_disk(tensor)
    assert torch.equal(found, tensor) and found.dtype == dtype and not list(results.parent.rglob("tmp*"))
    found[0] = 1  # its own, as any tensor's content
    assert torch.equal(found[1:], tensor[1:]) and not torch.equal(found[0], tensor[0])


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take freed memory back themselves")
def test_freed_memory_goes_back_to_the_system():
    def tensors() -> list[torch.Tensor]:
        return [torch.ones(2**18) for _ in range(64)]  # 1 MB each

    tensors()  # from now on glibc takes such sizes from its heap
    many = tensors()
    pins = many[::8]  # which keep the end of the heap where it is
    with_them = resident()
    del many
    give_back()
    assert with_them - resident() > 40e6 and all(pin.all() for pin in pins)


def test_a_tensor_on_disk_takes_no_memory_until_it_is_read(results):
    tensor = torch.ones(2**24)  # 64 MB
    with_it = resident()
    tensor = on_disk(tensor)
    assert resident() < with_it - 2**25
    assert tensor.sum() == 2**24


def test_a_module_that_was_put_away_computes_the_same_and_takes_no_memory(results):
    module = torch.nn.Linear(2**12, 2**12)  # 64 MB
    x = torch.randn(3, 2**12)
    expected, with_it = module(x), resident()
    put_away(module)
    assert resident() < with_it - 2**25
    assert torch.equal(module(x), expected)


def test_where_there_is_no_room_the_error_says_how_much_and_where(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"4,000 bytes .*file.*MLPREPLACE_CACHE"):
        on_disk(torch.ones(1000))
