"""What the benchmarks share: how timings are shown."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median


def show(title: str, seconds: Mapping[str, list[float]], base: str) -> None:
    """Print median seconds, and the median and range of the ratio to ``base``, taken round by round."""
    print(f"\n{title}")
    for name, values in seconds.items():
        ratios = [v / b for v, b in zip(values, seconds[base], strict=True)]
        spread = f"×{median(ratios):.2f} (×{min(ratios):.2f}–×{max(ratios):.2f})"
        print(f"  {name:<42} {median(values):7.2f} s   {spread}")
