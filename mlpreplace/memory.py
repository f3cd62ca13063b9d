"""Room on an accelerator: how many windows run at a time, where sums are kept, and what happens when memory runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import torch

from .blocks import Block

WINDOWS = 4  # at a time, where memory is the machine's own
MOST_WINDOWS = 16  # beyond which nothing gets faster

Result = TypeVar("Result")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU, those that PyTorch holds and does not use among them; None for a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def windows_at_once(blocks: Iterable[Block], seq_len: int) -> int:
    """How many windows of ``seq_len`` tokens a pass through the layers takes at a time: 4 on a CPU; on GPUs as many as half
    of the free memory holds, at most 16, by a generous estimate of what one layer needs for a token.
    """
    free = {block.device: free_bytes(block.device) for block in blocks}
    if None in free.values() or not free:
        return WINDOWS
    of_token = max(4 * (10 * b.hidden_size + 2 * b.n_active_params // b.hidden_size) for b in blocks)
    return max(1, min(MOST_WINDOWS, min(free.values()) // (2 * of_token * seq_len)))


def homes(blocks: Iterable[Block], moments: Collection[str]) -> dict[Block, torch.device]:
    """Where the float64 sums of each block are kept: on its device, or on the CPU where those of all blocks there would
    take more than half of what is free.
    """
    by_device: dict[torch.device, list[Block]] = {}
    for block in blocks:
        by_device.setdefault(block.device, []).append(block)
    found = {}
    for device, here in by_device.items():
        free = free_bytes(device)
        crowded = free is not None and sum(_sum_bytes(block, moments) for block in here) > free / 2
        found |= dict.fromkeys(here, torch.device("cpu") if crowded else device)
    return found


def _sum_bytes(block: Block, moments: Collection[str]) -> int:
    hidden, inner = block.hidden_size, block.intermediate_size if block.has_neurons else 0
    sizes = {"input": 2 * hidden**2, "hidden": inner**2, "cross": inner * hidden}
    return 8 * sum(sizes[moment] for moment in moments)


def halving(run: Callable[[int], Result], windows: int) -> Result:
    """``run(windows)``; where the device has no room for so many, from the beginning with half as many, and so on.

    Raises torch.OutOfMemoryError where not even one window at a time fits.
    """
    while True:
        try:
            return run(windows)
        except torch.OutOfMemoryError as error:
            if windows == 1:
                error.add_note("Not even one window at a time fits: shorter windows, fewer blocks at a time, or more devices do.")
                raise
        windows //= 2  # outside of the except clause, whose error holds on to the tensors of the run
        warnings.warn(f"Out of memory: going on with {windows} windows at a time.", stacklevel=3)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
