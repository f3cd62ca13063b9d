"""Memory: what is free, what is given back, how many windows run at a time, and what happens when it runs out."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn

from .files import cache_dir

WINDOWS = 4  # that run at a time on a CPU
MOST_WINDOWS = 16  # that run at a time on a GPU; more are not faster
VARIABLE = "MLPREPLACE_MEMORY_BUDGET"
MOST_BUDGET = 3 * 1024**3  # of a model on a CPU by default: what more would save is passes over text
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Result = TypeVar("Result")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU, including those that PyTorch has reserved and does not use; None for a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def memory_budget(given: int | str | None, devices: Collection[torch.device]) -> int:
    """Bytes that statistics and candidates may take at a time, beside the model and what is chosen for it.

    Args:
        given: bytes, or a text like "500MB" or "2GiB"; None is what ``MLPREPLACE_MEMORY_BUDGET`` says, and by default half of
            what is free on the host and on each of ``devices``, but at most 3 GiB where a CPU is among them.

    Raises ValueError for what is no size.
    """
    given = os.environ.get(VARIABLE) or None if given is None else given
    if given is None:
        free = [free for device in devices if (free := free_bytes(device)) is not None]
        most = [] if len(free) == len(devices) else [MOST_BUDGET]
        return min([psutil.virtual_memory().available // 2, *(bytes_free // 2 for bytes_free in free), *most])
    found = re.fullmatch(r"\s*([\d_.]+)\s*([A-Za-z]*)\s*", str(given))
    if not found or found[2].upper() not in UNITS or not re.fullmatch(r"\d+(\.\d+)?", number := found[1].replace("_", "")):
        raise ValueError(
            f'Expected a memory budget in bytes, or like "500MB" or "2GiB", got {given!r} ({VARIABLE}, or an argument).'
        )
    return int(float(number) * UNITS[found[2].upper()])


def on_disk(tensor: Tensor) -> Tensor:
    """The same tensor of a CPU, mapped from a file that nobody else sees: it takes no memory until it is read.

    Raises OSError where it cannot be written.
    """
    tensor = tensor.detach().contiguous()
    folder = cache_dir() / "results"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:  # whose content stays until the tensor goes
            file.write(tensor.view(-1).view(torch.uint8).numpy())
            file.flush()
            return torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    except OSError as error:
        raise OSError(
            f"{tensor.nbytes:,} bytes could not be left in {folder} ({error}). Make room (make clean empties it) or name another "
            "folder by MLPREPLACE_CACHE."
        ) from error


def put_away(module: nn.Module) -> None:
    """Leave the weights of ``module`` that are on the CPU on disk, see :func:`on_disk`."""
    for weight in module.parameters():
        if weight.device.type == "cpu":
            weight.data = on_disk(weight.data)
    give_back()


def give_back() -> None:
    """Return memory of the host to the system, also that of tensors which only the garbage collector frees."""
    gc.collect()
    trim()


def trim() -> None:
    """Return freed memory of the host to the system. The C library of Linux keeps freed tensors of less than 32 MB."""
    if sys.platform == "linux" and (trims := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trims(0)


def windows_at_once(devices: Collection[torch.device], window_bytes: int) -> int:
    """Windows that run at a time: 4 on a CPU; on GPUs as many of ``window_bytes`` as fit half of the free memory, up to 16."""
    free = [free_bytes(device) for device in devices]
    if None in free or not free:
        return WINDOWS
    return max(1, min(MOST_WINDOWS, min(free) // (2 * window_bytes)))


def is_full(error: Exception) -> bool:
    """Whether memory ran out: of a GPU, or of the host, of which PyTorch says so in a plain RuntimeError."""
    of_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_host or isinstance(error, MemoryError | torch.OutOfMemoryError)


def halving(run: Callable[[int], Result], number: int, unit: str = "window") -> Result:
    """``run(number)`` of windows at a time. Where memory runs out, start again with half as many, and so on, down to one.

    Args:
        unit: of what runs, in messages.

    Raises what says that memory ran out where not even one at a time fits, see :func:`is_full`.
    """
    while True:
        try:
            return run(number)
        except (MemoryError, RuntimeError) as error:
            if not is_full(error):
                raise
            if number == 1:
                hint = "shorter windows, fewer blocks at a time, or more devices do."
                error.add_note(f"Not even one {unit} at a time fits: {hint}")
                raise
        number //= 2  # outside of the except clause, since the error keeps the tensors of the run alive
        warnings.warn(f"Out of memory: going on with {number} {unit}s at a time.", stacklevel=3)
        gc.collect()


class AtOnce:
    """How many run at a time in a loop: :func:`halving`, where the smaller number stays for the rest of the loop."""

    def __init__(self, most: int, unit: str = "window"):
        self.most, self.unit = most, unit

    def __call__(self, run: Callable[[int], Result]) -> Result:
        """``run(most)``, or with fewer; raises as :func:`halving`."""

        def kept(number: int) -> Result:
            self.most = number
            return run(number)

        return halving(kept, self.most, self.unit)
