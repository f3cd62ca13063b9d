"""UIDL, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887): one span of layers is dropped.

It is the span of n layers between whose ends the angle arccos(cos(r_i, r_{i+n}))/π of the residual stream is smallest, at the
last token of each text. The paper's healing is left out.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from ..replacements.families import Family, Linear
from ..replacements.splice import Plan
from ..statistics.residual_stream import Span, StreamStatistics
from .calibration import Calibration
from .layer_drop import dropped_best, nearest_ends, nearest_runs
from .registry import Needs, method

ABOUT = dict(removes="a span of layers", paper="2403.17887")
BYPASS = Linear()


def uidl_spans(model: nn.Module, stream: StreamStatistics, sparsity: float, *, bypass: Family | None = None) -> list[list[Span]]:
    """Choices of one span of least angle between its ends, as long as comes nearest to ``sparsity``."""
    return nearest_runs(model, sparsity, lambda n: [span.layers for span in nearest_ends(stream.angle, n)], bypass)


@method(
    "uidl_linear",
    title="UIDL + linear map",
    needs=Needs(spans=partial(uidl_spans, bypass=BYPASS)),
    bypass=BYPASS,
    **ABOUT,
)
@method("uidl", title="UIDL", needs=Needs(stream=True), **ABOUT)
def uidl(model: nn.Module, calibration: Calibration, sparsity: float, *, bypass: Family | None = None) -> Plan:
    """A span of layers with a small angle between its ends goes; its length is the nearest one.

    The three spans of least angle are measured on the validation windows, if there are any; maps with three ridges. Options and
    errors are those of :func:`~mlpreplace.methods.shortgpt`.
    """
    spans = uidl_spans(model, calibration.of_stream(model), sparsity, bypass=bypass)
    return dropped_best(model, calibration, spans, bypass)
