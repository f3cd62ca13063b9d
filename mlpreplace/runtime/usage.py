"""What this process has used so far."""

from __future__ import annotations

import resource
import sys


def peak_memory_mb() -> float:
    """Largest resident set size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux kilobytes
