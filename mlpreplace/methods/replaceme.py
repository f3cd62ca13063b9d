"""ReplaceMe (arXiv 2505.02819): a span of layers becomes one linear map, fused into the MLP before it.

M is what the MLP before the span gives, Y the stream that it is added to, r_stop what leaves the span. The span is dropped and
T makes M T + Y ≈ r_stop. T goes into the MLP's output projection, W ← TᵀW (weights [out, in]): no parameter is added.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from ..fitting.ridge import STREAM_RIDGE, least_squares
from ..fitting.training import Training, train
from ..models.blocks import Block, NotApplicable, find_blocks
from ..replacements.families import NarrowMLP, Replacement
from ..replacements.records import FitReport, TrainingReport
from ..replacements.splice import Plan
from ..replacements.whole_layers import without_layers
from ..statistics.moments import BlockStatistics, Sample
from ..statistics.residual_stream import Span, SpanStatistics, StreamStatistics
from .calibration import Calibration, preferred
from .layer_drop import RIDGES, nearest_ends, nearest_runs
from .registry import Needs, method

OBJECTIVES = ("least_squares", "cosine")
TRAINING = Training(loss="cosine", epochs=10, learning_rate=1e-4, batch_tokens=1024)  # faster overfits a few thousand tokens


def replaceme_spans(model: nn.Module, stream: StreamStatistics, sparsity: float) -> list[list[Span]]:
    """Choices of one span, behind an MLP, of least cosine distance between its ends; as long as comes nearest to ``sparsity``."""
    return nearest_runs(model, sparsity, lambda n: [span.layers for span in nearest_ends(stream.distance, n, first=1)])


def least_squares_map(block: Block, s: BlockStatistics, ridge: float = STREAM_RIDGE) -> Tensor:
    """T = (MᵀM + λI)⁻¹Mᵀ(r_stop − Y), [hidden, hidden], in float64; the paper's α is absolute, λ is relative.

    ``s`` holds M of the MLP ``block``, with outputs r_stop − r_start; r_stop − Y is M more than these, since Y = r_start − M.
    """
    s.require(block, "input")
    return least_squares(block, s.xx.clone(), s.xx + s.xy, ridge)


class _Map(nn.Module):
    """M T + Y for M and Y side by side, [..., 2 · hidden] → [..., hidden]. T starts at the identity."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(hidden))

    def forward(self, x: Tensor) -> Tensor:
        m, y = x.chunk(2, -1)
        return m @ self.weight + y


def cosine_map(
    block: Block, s: SpanStatistics, training: Training = TRAINING, *, progress: bool = True
) -> tuple[Tensor, TrainingReport]:
    """T of least mean 1 − cos(M T + Y, r_stop) over sampled tokens, [hidden, hidden], by Adam from the identity on.

    Raises ValueError where no windows were sampled.
    """
    if None in (s.mlp.train, s.mlp.validation):
        raise ValueError(f"{block.name}: the cosine map is trained on sampled tokens: sample_windows and validation_windows > 0.")
    body = _Map(block.hidden_size).to(device=block.device, dtype=torch.promote_types(block.dtype, torch.float32))
    pairs = [_pairs(*samples) for samples in ((s.mlp.train, s.stream.train), (s.mlp.validation, s.stream.validation))]
    report = train(body, *pairs, training, progress=progress)
    return body.weight.detach().double(), report


def _pairs(mlp: Sample, stream: Sample) -> Sample:
    return Sample(torch.cat([mlp.x, stream.x - mlp.x], -1), stream.x + stream.y, stream.residual_energy, stream.mask)


def fused(block: Block, t: Tensor) -> Replacement:
    """The MLP ``block`` with T [hidden, hidden] fused into its output projection: f(x) T, as many parameters as before.

    Raises ValueError for a block without an output projection (experts).
    """
    own = block.weights()
    t = t.to(device=own.down.device, dtype=torch.float64)
    bias = None if own.down_bias is None else own.down_bias.double() @ t
    replacement = Replacement(NarrowMLP(block.intermediate_size), block)
    replacement.body.load_state_dict(replace(own, down=t.T @ own.down.double(), down_bias=bias).state())
    return replacement


ABOUT = dict(removes="a span of layers", paper="2505.02819", needs=Needs(spans=replaceme_spans))


@method("replaceme_cosine", title="ReplaceMe, cosine", objective="cosine", **ABOUT)
@method("replaceme", title="ReplaceMe", **ABOUT)
def replaceme(
    model: nn.Module,
    calibration: Calibration,
    sparsity: float,
    *,
    objective: str = "least_squares",
    training: Training = TRAINING,
) -> Plan:
    """A span of layers dropped, and a linear map for it in the MLP before. The number of layers is the nearest one.

    The three spans of least distance are measured on the validation windows, if there are any; in closed form with three ridges.

    Args:
        objective: "least_squares", in closed form over all calibration tokens, or "cosine", trained on the sampled ones.
        training: of "cosine"; its loss must be "cosine".

    Raises:
        ValueError: an unknown objective, a sparsity that cannot be reached, statistics that are missing or of another model.
        NotApplicable: an MLP without output projection (experts) or with a norm between it and the stream (Gemma 2).
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"Unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}.")
    if training.loss != "cosine":
        raise ValueError(f"Expected a training with loss='cosine', got {training.loss!r}.")
    spans = [span for (span,) in replaceme_spans(model, calibration.of_stream(model), sparsity)]

    def planned(choice: tuple[Span, float]) -> Plan:
        span, ridge = choice
        s, block = calibration.of_span(span), find_blocks(model)[span.start - 1]
        if s.mlp is None:
            raise NotApplicable(f"{block.name}: a norm stands between the MLP and the stream: no map can be fused into it.")
        start, trained = time.perf_counter(), None
        if objective == "cosine":
            t, trained = cosine_map(block, s, training, progress=calibration.progress)
        else:
            t = least_squares_map(block, s.mlp, ridge)
        replacement = fused(block, t)
        seconds = 0.0 if trained else time.perf_counter() - start
        replacement.report = FitReport(s.mlp.tokens, seconds, None, None, training=trained)
        return {block: replacement} | without_layers(model, span.layers)

    ridges = RIDGES[:1] if objective == "cosine" else RIDGES
    return preferred(model, calibration, product(spans, ridges), planned)
