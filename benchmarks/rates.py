"""How fast things are, assumed: a GPU like an H100 and its host, at large matrices. None of it was measured on a GPU."""

from __future__ import annotations

from mlpreplace.models.blocks import Block

BF16, FP32, FP64 = 200e12, 20e12, 20e12  # FLOPs per second
EIGEN = 0.5e12  # FLOPs per second of eigenvectors in float64, at 9 n³, half of which waits for memory
LINK = 10e9  # bytes per second between a GPU and memory of the host that is not pinned
DISK = 1e9  # bytes per second
HASH = 5e9  # bytes per second
DRAWS = 5e7  # probabilities per second from which the CPU draws tokens, on one thread


def fit_seconds(mlp: Block, width: float) -> float:
    """Of a NarrowMLP in closed form: a factorisation, its solves, and what the dropped neurons add."""
    d, m = mlp.hidden_size, mlp.intermediate_size
    return (width**3 / 3 + 2 * width**2 * d + 2 * width * (m - width) * d) / FP64


def eigen_seconds(block: Block) -> float:
    """Of the eigenvectors behind a map of reduced rank."""
    return 9 * block.hidden_size**3 / EIGEN
