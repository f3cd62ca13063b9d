"""Peak memory of compressing a random Llama of 1 billion parameters, and of the same with twice the layers.

python benchmarks/depth.py [--layers 16 32] [--memory-budget 2GB]

Memory beside the model is the peak of the whole process less the bytes of the weights. Two hours on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_llama import write_model

ASKED = "--sparsity 0.25 --windows 8 --validation-windows 2 --seq-len 256 --heldout-windows 8 --device cpu"


def compressed(folder: Path, out: Path, budget: list[str]) -> tuple[int, float]:
    """Peak resident bytes and seconds of the command. Raises SystemExit where it fails."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "mlpreplace", "compress", str(folder), "--out", str(out), *ASKED.split(), *budget]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            last = said.read().splitlines()[-1:]
            raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}: {''.join(last)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--memory-budget", default=None)
    options = parser.parse_args()
    budget = [] if options.memory_budget is None else ["--memory-budget", options.memory_budget]
    beside = {}
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            weights = write_model(Path(folder) / "model", layers)
            peak, seconds = compressed(Path(folder) / "model", Path(folder) / "small", budget)
        beside[layers] = peak - weights
        print(f"{layers} layers: model {weights / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, ", end="")
        print(f"beside the model {beside[layers] / 1e9:.2f} GB, {seconds / 60:.0f} minutes", flush=True)
    shallow, deep = min(beside), max(beside)
    print(f"{deep} layers instead of {shallow}: memory beside the model × {beside[deep] / beside[shallow]:.3f}")


if __name__ == "__main__":
    main()
