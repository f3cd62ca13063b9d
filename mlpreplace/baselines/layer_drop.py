"""Whole layers dropped: scattered by Block Influence, or one span by the angle between its ends; with or without a linear
bypass of the residual stream.

Sources: ShortGPT (arXiv 2403.03853): drop the layers of least Block Influence, 1 − cos(r_i, r_{i+1}), mean over tokens.
UIDL, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887): drop the n layers between whose ends the
angle arccos(cos)/π is smallest, at each text's last token. The bypass is that of LinearPatch and Ghosted Layers in spirit:
r ← r + rM for what was dropped, M by least squares; ours has a bias and stands once for each run of adjacent layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..blocks import Block
from ..capture import BlockStatistics
from ..closed_form import ClosedForm, solve
from ..fit import fit
from ..layers import Removed, Tuned, find_layers, without_layers
from ..replacements import Family
from ..stream import Span, StreamStatistics
from .calibration import Calibration, Plan, nearest_choice

RIDGE = 1e-4  # of maps of the stream itself, whose massive activations raise the mean that ridge is relative to


@solve.register
def _(family: Removed, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    return {}


@solve.register
def _(family: Tuned, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    return family.build(block).state_dict()


def runs(layers: Iterable[int]) -> list[Span]:
    """Layers as spans of adjacent ones: 3, 5, 6 → Span(3, 4), Span(5, 7)."""
    ordered = sorted(set(layers))
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b > a + 1)] if ordered else []
    stops = [a + 1 for a, b in pairwise([*ordered, float("inf")]) if b > a + 1]
    return [Span(start, stop) for start, stop in zip(starts, stops, strict=True)]


def nearest_ends(distance: Tensor, n: int, first: int = 0) -> Span:
    """The span of ``n`` layers with the least ``distance`` [layers + 1, layers + 1] between its ends; none before ``first``."""
    of_spans = distance.diagonal(n)[first:]  # [layers + 1 - n - first]
    if not len(of_spans):
        raise ValueError(f"There is no span of {n} layers from layer {first} on in a model of {len(distance) - 1}.")
    start = first + int(of_spans.argmin())
    return Span(start, start + n)


def _added(model: nn.Module, bypass: Family | None) -> Callable[[Sequence[int]], int]:
    """Layers removed → parameters of their bypasses, one for each run."""
    found = find_layers(model)
    return lambda layers: sum(bypass.n_params(found[run.start]) for run in runs(layers)) if bypass else 0


def shortgpt_spans(model: nn.Module, stream: StreamStatistics, sparsity: float, *, bypass: Family | None = None) -> list[Span]:
    """Runs of the layers of least Block Influence, as many as come nearest to ``sparsity``."""
    order = stream.influence.argsort(stable=True).tolist()
    return runs(nearest_choice(model, sparsity, lambda n: order[:n], _added(model, bypass)))


def uidl_spans(model: nn.Module, stream: StreamStatistics, sparsity: float, *, bypass: Family | None = None) -> list[Span]:
    """The one span of least angle between its ends, as long as comes nearest to ``sparsity``."""
    return runs(nearest_choice(model, sparsity, lambda n: nearest_ends(stream.angle, n).layers, _added(model, bypass)))


def drop(
    model: nn.Module, calibration: Calibration, spans: Iterable[Span], bypass: Family | None = None, *, ridge: float = RIDGE
) -> Plan:
    """The plan without the layers of ``spans``.

    Args:
        bypass: Linear(), LowRank(rank) …, fitted in closed form to what each span adds to the residual stream of the dense
            model; None for nothing in its place.
        ridge: relative to the mean of the Gram matrix's diagonal.

    Raises:
        ValueError: a span that was not captured, layers that the model does not have.
    """
    found, stand_ins = find_layers(model), {}
    for span in spans if bypass else ():
        block = found[span.start]
        stand_ins[span.start] = fit(block, {block: calibration.of_span(span).stream}, bypass, ridge=ridge)
    return without_layers(model, [layer for span in spans for layer in span.layers], stand_ins)


def shortgpt(model: nn.Module, calibration: Calibration, sparsity: float, *, bypass: Family | None = None) -> Plan:
    """ShortGPT: the layers of least Block Influence go, wherever they are. The number of layers is the nearest one.

    Raises ValueError for a sparsity that cannot be reached, and for statistics that are missing or of another model.
    """
    spans = shortgpt_spans(model, calibration.of_stream(model), sparsity, bypass=bypass)
    return drop(model, calibration, spans, bypass)


def uidl(model: nn.Module, calibration: Calibration, sparsity: float, *, bypass: Family | None = None) -> Plan:
    """UIDL without healing: the span of layers with the least angle between its ends goes. Options and errors are those of
    :func:`shortgpt`.
    """
    spans = uidl_spans(model, calibration.of_stream(model), sparsity, bypass=bypass)
    return drop(model, calibration, spans, bypass)
