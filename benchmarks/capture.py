"""What a capture costs: time beside that of a plain forward pass, and peak memory."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from common import show
from torch import Tensor, nn

from mlpreplace import capture, find_blocks, load_model, load_windows
from mlpreplace.evaluation.speed import interleaved
from mlpreplace.runtime.usage import peak_memory_mb

BATCH = 4  # windows, as capture takes them on a CPU


def bench_time(model: nn.Module, windows: Tensor, rounds: int) -> None:
    blocks = find_blocks(model)

    def passes(module: nn.Module):
        @torch.inference_mode()
        def run():
            for ids in windows.split(BATCH):
                module(ids, use_cache=False)

        return run

    def captures(*moments: str):
        return lambda: capture(model, blocks, windows, moments=moments, progress=False)

    functions = {
        "plain forward pass": passes(model),
        "the same without the LM head": passes(model.base_model),
        "capture, d × d moments": captures("input"),
        "capture, every moment": captures("input", "hidden"),
    }
    seconds = interleaved(functions, rounds)
    show(f"capture: {windows.numel():,} tokens, {len(blocks)} blocks", seconds, "plain forward pass")


def bench_memory(name: str, counts: Iterable[int], seq_len: int) -> None:
    """Each capture runs in a process of its own: the peak of a process never goes down."""
    print("\ncapture, every moment: peak memory of the process")
    for n_windows in counts:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            peak = process.submit(_peak_of_capture, name, n_windows, seq_len).result()
        print(f"  {n_windows * seq_len:>7,} tokens {peak:8,.0f} MB")


def _peak_of_capture(name: str, n_windows: int, seq_len: int) -> float:
    model, tokenizer = load_model(name)
    windows = load_windows("bundled/wiki", tokenizer, seq_len=seq_len, n_windows=n_windows)
    capture(model, find_blocks(model), windows, progress=False)
    return peak_memory_mb()
