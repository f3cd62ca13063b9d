"""ShortGPT (arXiv 2403.03853): the layers that change the residual stream least are dropped, wherever they are.

Block Influence of layer i is 1 − cos(r_i, r_{i+1}), mean over tokens, r_i the stream that enters it.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from ..replacements.families import Family, Linear
from ..replacements.splice import Plan
from ..statistics.residual_stream import Span, StreamStatistics
from .calibration import Calibration
from .layer_drop import dropped_best, least_sets, nearest_runs
from .registry import Needs, method

ABOUT = dict(removes="scattered layers", paper="2403.03853")
BYPASS = Linear()


def shortgpt_spans(
    model: nn.Module, stream: StreamStatistics, sparsity: float, *, bypass: Family | None = None
) -> list[list[Span]]:
    """Choices of layers of least Block Influence, as runs, as many layers as come nearest to ``sparsity``."""
    return nearest_runs(model, sparsity, lambda n: least_sets(stream.influence, n), bypass)


@method(
    "shortgpt_linear",
    title="ShortGPT + linear maps",
    needs=Needs(spans=partial(shortgpt_spans, bypass=BYPASS)),
    bypass=BYPASS,
    **ABOUT,
)
@method("shortgpt", title="ShortGPT", needs=Needs(stream=True), **ABOUT)
def shortgpt(model: nn.Module, calibration: Calibration, sparsity: float, *, bypass: Family | None = None) -> Plan:
    """Layers of least Block Influence go; their number is the nearest one.

    The three sets of least influence are measured on the validation windows, if there are any; maps with three ridges.

    Args:
        bypass: what stands in for each run of adjacent layers, see :func:`~mlpreplace.methods.drop`.

    Raises ValueError for a sparsity that cannot be reached, and for statistics that are missing or of another model.
    """
    spans = shortgpt_spans(model, calibration.of_stream(model), sparsity, bypass=bypass)
    return dropped_best(model, calibration, spans, bypass)
