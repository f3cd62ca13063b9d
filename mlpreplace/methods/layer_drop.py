"""Whole layers dropped: what ShortGPT, UIDL, ReplaceMe and LLM-Streamline share.

A linear bypass of the residual stream may stand in for each run of adjacent layers: r ← r + rM + b, M and b by least squares.
LinearPatch and Ghosted Layers have a map of that kind; ours has a bias, and one map serves a whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product

from torch import Tensor, nn

from ..fitting.fit import fit
from ..fitting.ridge import STREAM_RIDGE
from ..models.layers import find_layers, layer_parameters
from ..replacements.families import Family
from ..replacements.splice import Plan
from ..replacements.whole_layers import without_layers
from ..statistics.residual_stream import Span
from .calibration import Calibration, preferred, target_parameters

LOOKS = 3  # choices of layers that are measured on validation windows
RIDGES = (STREAM_RIDGE, 1e-6, 1e-2)  # of bypasses; validation windows decide


def runs(layers: Iterable[int]) -> list[Span]:
    """Layers as spans of adjacent ones: 3, 5, 6 → Span(3, 4), Span(5, 7)."""
    found: list[Span] = []
    for layer in sorted(set(layers)):
        start = found.pop().start if found and found[-1].stop == layer else layer
        found.append(Span(start, layer + 1))
    return found


def nearest_ends(distance: Tensor, n: int, first: int = 0) -> list[Span]:
    """The three spans of ``n`` layers with the least ``distance`` [layers + 1, layers + 1] between their ends, the least first.

    None begins before ``first``; where there are fewer, all of them.
    """
    of_spans = distance.diagonal(n)[first:]  # [layers + 1 - n - first]
    if not len(of_spans):
        raise ValueError(f"There is no span of {n} layers from layer {first} on in a model of {len(distance) - 1}.")
    starts = of_spans.argsort(stable=True)[:LOOKS] + first
    return [Span(start, start + n) for start in starts.tolist()]


def least_sets(values: Tensor, n: int) -> list[tuple[int, ...]]:
    """The three sets of ``n`` layers of least total in ``values`` [layers], the least first; where there are fewer, all."""
    order = values.argsort(stable=True).tolist()
    sure, open_ = order[: max(0, n - LOOKS)], order[max(0, n - LOOKS) : n + LOOKS]  # a set of the three differs in these alone
    sets = [(*sure, *some) for some in combinations(open_, n - len(sure))]
    return sorted(sets, key=lambda layers: sum(values[layer].item() for layer in layers))[:LOOKS]


def nearest_runs(
    model: nn.Module, sparsity: float, choices: Callable[[int], Sequence[Sequence[int]]], bypass: Family | None = None
) -> list[list[Span]]:
    """``choices(n)`` as runs, for the number n of layers at which the first of them removes nearest to ``sparsity``.

    Args:
        choices: n → sets of n layers that may go, the first choice first.
        bypass: what stands in for each run; its parameters count against what is removed.

    Raises ValueError for a sparsity outside (0, 1), or so high that no layer would be left.
    """
    weights, target = layer_parameters(model), target_parameters(model, sparsity)
    found = find_layers(model) if bypass else []

    def saved(spans: list[Span]) -> int:
        removed = sum(weights[layer] for span in spans for layer in span.layers)
        return removed - sum(bypass.n_params(found[span.start]) for span in spans) if bypass else removed

    of_number = [[runs(layers) for layers in choices(n)] for n in range(1, len(weights))]
    if not of_number:
        raise ValueError("A model of one layer has none to remove.")
    if target > (most := max(saved(first) for first, *_ in of_number)) + min(weights) / 2:
        share = most / sum(weights)
        raise ValueError(f"sparsity={sparsity} cannot be reached: without all layers but one it would be {share:.3f}.")
    return min(of_number, key=lambda of_n: abs(saved(of_n[0]) - target))


def drop(
    model: nn.Module,
    calibration: Calibration,
    spans: Iterable[Span],
    bypass: Family | None = None,
    *,
    ridge: float = STREAM_RIDGE,
) -> Plan:
    """The plan without the layers of ``spans``.

    Args:
        bypass: Linear(), LowRank(rank) …, fitted in closed form to what each span adds to the residual stream of the dense
            model; None for nothing in its place.
        ridge: relative to the mean of the Gram matrix's diagonal.

    Raises:
        ValueError: a span that was not captured, layers that the model does not have.
    """
    spans, stand_ins, found = list(spans), {}, find_layers(model)
    for span in spans if bypass else ():
        block = found[span.start]
        stand_ins[span.start] = fit(block, {block: calibration.of_span(span).stream}, bypass, ridge=ridge)
    return without_layers(model, [layer for span in spans for layer in span.layers], stand_ins)


def dropped_best(model: nn.Module, calibration: Calibration, choices: Iterable[list[Span]], bypass: Family | None = None) -> Plan:
    """Of the plans without the layers of one of ``choices`` the best on the validation windows, each with every ridge."""
    tried = product(choices, RIDGES if bypass else RIDGES[:1])
    return preferred(model, calibration, tried, lambda c: drop(model, calibration, c[0], bypass, ridge=c[1]))
