"""What capture and sweeps cost and what compression gains, in ratios: each pair is timed interleaved in one process, since
machines drift.

make bench
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F

from . import NarrowMLP, allocate, capture, compare, find_blocks, fit, load_model, load_windows
from .provenance import peak_memory_mb
from .speed import interleaved, latency, speed_rows
from .splice import splice, spliced

ROUNDS = 3


def show(title: str, seconds: Mapping[str, list[float]], base: str) -> None:
    """Median seconds, and the median and range of the per-round ratio to ``base``."""
    print(f"\n{title}")
    for name, values in seconds.items():
        ratios = [v / b for v, b in zip(values, seconds[base], strict=True)]
        spread = f"×{statistics.median(ratios):.2f} (×{min(ratios):.2f}–×{max(ratios):.2f})"
        print(f"  {name:<42} {statistics.median(values):7.2f} s   {spread}")


def bench_capture(model, blocks, windows) -> None:
    @torch.inference_mode()
    def forward():
        for start in range(0, len(windows), 4):
            model(windows[start : start + 4], use_cache=False)

    @torch.inference_mode()
    def backbone():
        for start in range(0, len(windows), 4):
            model.base_model(windows[start : start + 4], use_cache=False)

    def captured(*moments):
        return lambda: capture(model, blocks, windows, moments=moments, progress=False)

    functions = {
        "plain forward pass": forward,
        "the same without the LM head": backbone,
        "capture, d × d moments": captured("input"),
        "capture, every moment": captured("input", "hidden"),
    }
    show(f"capture: {windows.numel():,} tokens, {len(blocks)} blocks", interleaved(functions, ROUNDS), "plain forward pass")


def bench_sweeps(model, blocks, windows) -> None:
    stats = capture(model, blocks, windows[:3], validation_windows=1, progress=False)
    small = {block: fit(block, stats, NarrowMLP(block.intermediate_size // 2)) for block in blocks}
    some = blocks[:: max(1, len(blocks) // 6)][:6]
    singles = {block.layer: {block: small[block]} for block in blocks}
    pairs = {(a.layer, b.layer): {a: small[a], b: small[b]} for a, b in combinations(some, 2)}
    bench_sweep(f"sweep of {len(singles)} single-block replacements", model, singles, windows)
    bench_sweep(f"sweep of all {len(pairs)} pairs of {len(some)} of them", model, pairs, windows)


def bench_sweep(title: str, model, plans, windows) -> None:
    """One batch: NLL and KL of every plan and of the dense model, by :func:`compare` and as one would write it down."""
    plans = {"dense": {}} | plans
    n_tokens = windows[:, 1:].numel()
    found: dict[str, torch.Tensor] = {}  # [plans, 2] nats per token

    @torch.inference_mode()
    def naive():
        log_p = model(windows, use_cache=False).logits[:, :-1].log_softmax(-1)
        rows = []
        for plan in plans.values():
            log_q = log_p
            if plan:
                with spliced(model, plan):
                    log_q = model(windows, use_cache=False).logits[:, :-1].log_softmax(-1)
            nll = -log_q.gather(-1, windows[:, 1:, None]).mean()
            kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / n_tokens
            rows.append((nll, kl))
        found["naive"] = torch.tensor(rows)

    def shared():
        measured = compare(model, plans, windows, batch_size=len(windows), progress=False).values()
        found["shared"] = torch.tensor([(m.nll.sum() / m.n_tokens, m.mean_kl) for m in measured])

    functions = {"naive: every pass from the first layer": naive, "compare: common prefixes shared": shared}
    seconds = interleaved(functions, rounds=1)
    show(f"{title}, {windows.numel():,} tokens each", seconds, "compare: common prefixes shared")
    print(f"  largest difference {(found['naive'] - found['shared']).abs().max():.1e} nats per token")


def bench_speed(model, blocks, windows, sparsities: tuple[float, ...] = (0.25, 0.375)) -> None:
    """Prefill and decoding of compressed models against the dense one, and against what FLOPs and bytes promise."""
    stats = capture(model, blocks, windows[:5], validation_windows=1, progress=False)
    plans = {
        f"{s:.1%} {how}": allocate(model, stats, s, how, progress=False) for s in sparsities for how in ("uniform", "greedy")
    }
    models = {"dense": model} | {label: splice(model, plan) for label, plan in plans.items()}
    print(f"\nspeed-up over the dense model, prompt of {windows.shape[1]} tokens: measured, ideal, share of the ideal")
    for row in speed_rows(models, latency(models, windows))[1:]:
        for phase in ("prefill", "decode"):
            value, ideal = row[f"{phase}_speedup"], row[f"{phase}_ideal"]
            print(f"  {row['method']:<16} {phase:<8} ×{value:.2f}   ×{ideal:.2f}   {value / ideal:4.0%}")


def _peak_of_capture(n_windows: int, queue) -> None:
    model, tokenizer = load_model()
    windows = load_windows("bundled/wiki", tokenizer, n_windows=n_windows)
    capture(model, find_blocks(model), windows, progress=False)
    queue.put(peak_memory_mb())


def bench_memory(counts: tuple[int, ...] = (32, 64)) -> None:
    """Each capture in a process of its own, since a peak is never forgotten."""
    context = multiprocessing.get_context("spawn")
    print("\ncapture, every moment: peak memory of the process")
    for n_windows in counts:
        queue = context.Queue()
        process = context.Process(target=_peak_of_capture, args=(n_windows, queue))
        process.start()
        print(f"  {n_windows * 512:>7,} tokens {queue.get():8,.0f} MB")
        process.join()


def main() -> None:
    model, tokenizer = load_model()
    blocks = find_blocks(model)
    windows = load_windows("bundled/wiki", tokenizer, n_windows=12)  # batches of 4, as capture makes them by default
    print(f"{model.source.id}, {torch.get_num_threads()} threads, medians over interleaved rounds")
    bench_memory()
    bench_capture(model, blocks, windows)
    bench_sweeps(model, blocks, windows[:4, :256])
    bench_speed(model, blocks, windows[:, :256])


if __name__ == "__main__":
    main()
