"""What capture and sweeps cost, and how much faster compressed models are.

    make bench
    python benchmarks/bench.py speed --rounds 3

Results are ratios. What is compared is timed in one process, in turns, because the speed of a machine drifts.
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import torch
from capture import bench_memory, bench_time
from speed import bench_speed
from sweep import bench_sweeps

from mlpreplace import load_model, load_windows

PARTS = ("memory", "capture", "sweep", "speed")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", default=PARTS, help=f"what to run, of {', '.join(PARTS)}")
    parser.add_argument("--model", default="bundled/smollm2-135m", help="bundled, hub id or folder")
    parser.add_argument("--windows", type=int, default=12, help="windows of text, at least 5")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window; sweeps and speed take half of it")
    parser.add_argument("--rounds", type=int, help="rounds that count; without it 3 for capture, 5 for speed")
    parser.add_argument("--memory-windows", type=int, nargs="+", default=(32, 64), help="windows of each capture of memory")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; known are {', '.join(PARTS)}")

    model, tokenizer = load_model(options.model)
    windows = load_windows("bundled/wiki", tokenizer, seq_len=options.seq_len, n_windows=options.windows)
    half = options.seq_len // 2
    print(f"{model.source.id}, {torch.get_num_threads()} threads, medians over rounds in turns")
    if "memory" in options.parts:
        bench_memory(options.model, options.memory_windows, options.seq_len)
    if "capture" in options.parts:
        bench_time(model, windows, options.rounds or 3)
    if "sweep" in options.parts:
        bench_sweeps(model, windows[:4, :half])
    if "speed" in options.parts:
        bench_speed(model, windows[:, :half], options.rounds or 5)


if __name__ == "__main__":
    main()
