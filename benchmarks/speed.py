"""How much faster compressed models are: prefill and decoding, beside what FLOPs and bytes promise."""

from __future__ import annotations

from itertools import product

from torch import Tensor, nn

from mlpreplace import allocate, capture, find_blocks, splice
from mlpreplace.evaluation import latency, speed_rows

SPARSITIES = (0.25, 0.375)
STRATEGIES = ("uniform", "greedy")


def bench_speed(model: nn.Module, windows: Tensor, rounds: int) -> None:
    stats = capture(model, find_blocks(model), windows[:5], validation_windows=1, progress=False)
    models = {"dense": model}
    for sparsity, strategy in product(SPARSITIES, STRATEGIES):
        models[f"{sparsity:.1%} {strategy}"] = splice(model, allocate(model, stats, sparsity, strategy, progress=False))
    print(f"\nspeed-up over the dense model, prompt of {windows.shape[1]} tokens: measured, ideal, share of the ideal")
    for row in speed_rows(models, latency(models, windows, rounds=rounds))[1:]:
        for phase in ("prefill", "decode"):
            value, ideal = row[f"{phase}_speedup"], row[f"{phase}_ideal"]
            print(f"  {row['method']:<16} {phase:<8} ×{value:.2f}   ×{ideal:.2f}   {value / ideal:4.0%}")
