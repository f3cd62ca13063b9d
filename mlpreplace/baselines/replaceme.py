"""ReplaceMe (arXiv 2505.02819): a span of layers becomes one linear map, fused into the MLP before it.

With M what the MLP before the span gives and Y the stream that it is added to, the n layers behind are dropped and T makes
M T + Y what left them: r_stop. T goes into the MLP's output projection, W ← TᵀW (weights [out, in]): no parameter is added.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from ..algebra import least_squares
from ..blocks import Block, NotApplicable, find_blocks
from ..capture import BlockStatistics, Sample
from ..layers import without_layers
from ..replacements import NarrowMLP, Replacement
from ..reports import FitReport, TrainingReport
from ..stream import Span, SpanStatistics, StreamStatistics
from ..train import Training, train
from .calibration import Calibration, Plan, nearest_choice
from .layer_drop import nearest_ends

OBJECTIVES = ("least_squares", "cosine")
RIDGE = 1e-4
TRAINING = Training(loss="cosine", epochs=10, learning_rate=1e-4, batch_tokens=1024)  # faster overfits a few thousand tokens


def replaceme_spans(model: nn.Module, stream: StreamStatistics, sparsity: float) -> list[Span]:
    """The one span, behind an MLP, of least cosine distance between its ends; as long as comes nearest to ``sparsity``."""
    layers = nearest_choice(model, sparsity, lambda n: nearest_ends(stream.distance, n, first=1).layers, lambda layers: 0)
    return [Span(layers[0], layers[-1] + 1)]


def least_squares_map(block: Block, s: BlockStatistics, ridge: float = RIDGE) -> Tensor:
    """T = (MᵀM + λI)⁻¹Mᵀ(r_stop − Y), [hidden, hidden], in float64; the paper's α is absolute, λ is relative.

    Args:
        block: the MLP before the span.
        s: statistics of M, with outputs r_stop − r_start; r_stop − Y is M more than these, since Y = r_start − M.
    """
    s.require(block, "input")
    return least_squares(block, s.xx, s.xx + s.xy, ridge)


class _Map(nn.Module):
    """M T + Y for M and Y side by side, [..., 2 · hidden] → [..., hidden]. T starts at the identity."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(hidden))

    def forward(self, x: Tensor) -> Tensor:
        m, y = x.chunk(2, -1)
        return m @ self.weight + y


def cosine_map(
    block: Block, s: SpanStatistics, training: Training = TRAINING, *, seed: int = 0, progress: bool = True
) -> tuple[Tensor, TrainingReport]:
    """T of least mean 1 − cos(M T + Y, r_stop) over sampled tokens, [hidden, hidden], by Adam from the identity on.

    Raises ValueError where no windows were sampled.
    """
    if None in (s.mlp.train, s.mlp.validation):
        raise ValueError(f"{block.name}: the cosine map is trained on sampled tokens: sample_windows and validation_windows > 0.")
    body = _Map(block.hidden_size).to(device=block.device, dtype=torch.promote_types(block.dtype, torch.float32))
    pairs = [_pairs(*samples) for samples in ((s.mlp.train, s.stream.train), (s.mlp.validation, s.stream.validation))]
    report = train(body, *pairs, training, seed=seed, progress=progress)
    return body.weight.detach().double(), report


def _pairs(mlp: Sample, stream: Sample) -> Sample:
    leaving = stream.x + stream.y
    return Sample(torch.cat([mlp.x, stream.x - mlp.x], -1), leaving, stream.residual_energy, stream.mask)


def fused(block: Block, t: Tensor) -> Replacement:
    """The MLP ``block`` with T [hidden, hidden] fused into its output projection: f(x) T, as many parameters as before.

    Raises ValueError for a block without an output projection (experts).
    """
    own = block.weights()
    t = t.to(device=own.down.device, dtype=torch.float64)
    state = {"up.weight": own.up, "up.bias": own.up_bias, "gate.weight": own.gate, "gate.bias": own.gate_bias}
    state |= {"down.weight": t.T @ own.down.double(), "down.bias": None if own.down_bias is None else own.down_bias.double() @ t}
    replacement = Replacement(NarrowMLP(block.intermediate_size), block)
    replacement.body.load_state_dict({name: value for name, value in state.items() if value is not None})
    return replacement


def replaceme(
    model: nn.Module,
    calibration: Calibration,
    sparsity: float,
    *,
    objective: str = "least_squares",
    ridge: float = RIDGE,
    training: Training = TRAINING,
    progress: bool = False,
) -> Plan:
    """A span of layers dropped, and a linear map for it in the MLP before. The number of layers is the nearest one.

    Args:
        objective: "least_squares", in closed form over all calibration tokens, or "cosine", trained on the sampled ones.
        ridge: of least squares, relative to the mean of MᵀM's diagonal.
        training: of "cosine"; its loss must be "cosine".

    Raises:
        ValueError: an unknown objective, a sparsity that cannot be reached, statistics that are missing or of another model.
        NotApplicable: an MLP without output projection (experts) or with a norm between it and the stream (Gemma 2).
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"Unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}.")
    if training.loss != "cosine":
        raise ValueError(f"Expected a training with loss='cosine', got {training.loss!r}.")
    (span,) = replaceme_spans(model, calibration.of_stream(model), sparsity)
    s, block = calibration.of_span(span), find_blocks(model)[span.start - 1]
    if s.mlp is None:
        raise NotApplicable(f"{block.name}: a norm stands between the MLP and the stream, so that no map can be fused into it.")
    start, trained = time.perf_counter(), None
    if objective == "cosine":
        t, trained = cosine_map(block, s, training, progress=progress)
    else:
        t = least_squares_map(block, s.mlp, ridge)
    replacement = fused(block, t)
    seconds = time.perf_counter() - start
    replacement.report = FitReport(s.mlp.tokens, seconds if trained is None else 0.0, None, None, training=trained)
    return {block: replacement} | without_layers(model, span.layers)
