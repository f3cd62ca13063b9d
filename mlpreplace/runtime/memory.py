"""Memory of an accelerator: what is free, how many windows run at a time, and what happens when it runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Collection
from typing import TypeVar

import torch

WINDOWS = 4  # that run at a time on a CPU
MOST_WINDOWS = 16  # that run at a time on a GPU; more are not faster

Result = TypeVar("Result")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU, including those that PyTorch has reserved and does not use; None for a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def windows_at_once(devices: Collection[torch.device], window_bytes: int) -> int:
    """Windows that run at a time: 4 on a CPU; on GPUs as many of ``window_bytes`` as fit half of the free memory, up to 16."""
    free = [free_bytes(device) for device in devices]
    if None in free or not free:
        return WINDOWS
    return max(1, min(MOST_WINDOWS, min(free) // (2 * window_bytes)))


def halving(run: Callable[[int], Result], windows: int) -> Result:
    """``run(windows)``. Where memory runs out, start again with half as many windows at a time, and so on, down to one.

    Raises torch.OutOfMemoryError where not even one window at a time fits.
    """
    while True:
        try:
            return run(windows)
        except torch.OutOfMemoryError as error:
            if windows == 1:
                error.add_note("Not even one window at a time fits: shorter windows, fewer blocks at a time, or more devices do.")
                raise
        windows //= 2  # outside of the except clause, since the error keeps the tensors of the run alive
        warnings.warn(f"Out of memory: going on with {windows} windows at a time.", stacklevel=3)
        gc.collect()
