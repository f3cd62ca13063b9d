"""LLM-Streamline (arXiv 2403.19135): a span of layers is replaced by one small network, trained by squared error.

The span is the one whose ends are nearest in cosine. The stand-in reads the residual stream that enters the span and is trained
towards the one that leaves it, on captured pairs of the dense model. It is a transformer layer that starts as the span's first,
or an MLP with one hidden layer. The paper's MLP is of a fixed size and starts at random; ours starts at its closed form.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from ..fitting.fit import fit
from ..fitting.training import Training, train
from ..models.blocks import Block
from ..models.forward import Beside, eval_mode, hidden_states, run_layers, watching
from ..models.inputs import input_device
from ..models.layers import find_layers, find_parts, layer_parameters
from ..replacements.families import Replacement, TwoLayerMLP
from ..replacements.records import FitReport
from ..replacements.splice import Plan
from ..replacements.whole_layers import Tuned, without_layers
from ..statistics.moments import BlockStatistics
from ..statistics.residual_stream import Span, StreamStatistics
from .calibration import Calibration, preferred, target_parameters
from .layer_drop import nearest_ends, nearest_runs
from .registry import Needs, method

STAND_INS = ("layer", "mlp")
TRAINING = Training(epochs=8, learning_rate=3e-4)
LEAST = 0.1  # of a layer's parameters: a smaller MLP is not worth its place


def streamline_spans(model: nn.Module, stream: StreamStatistics, sparsity: float, *, stand_in: str = "layer") -> list[list[Span]]:
    """Choices of one span to replace, those of least distance between their ends.

    "layer": one layer more than comes nearest to ``sparsity``, for one is put back. "mlp": as few as remove a tenth of a layer
    more than ``sparsity``; the MLP has what may be put back.
    """
    if stand_in not in STAND_INS:
        raise ValueError(f"Unknown stand-in {stand_in!r}; expected one of {', '.join(STAND_INS)}.")
    if stand_in == "layer":
        found = nearest_runs(model, sparsity, lambda n: [span.layers[1:] for span in nearest_ends(stream.distance, n + 1)])
        return [[Span(removed.start - 1, removed.stop)] for (removed,) in found]
    weights, target = layer_parameters(model), target_parameters(model, sparsity)
    for n in range(1, len(weights) + 1):
        spans = nearest_ends(stream.distance, n)
        spare = {span: sum(weights[i] for i in span.layers) - target for span in spans}
        if enough := [[span] for span in spans if spare[span] >= LEAST * weights[span.start]]:
            return enough
    raise ValueError(f"sparsity={sparsity} cannot be reached: without all layers there is no room for an MLP in their place.")


class _Layer(nn.Module):
    """A copy of a layer as a map of the residual stream to what is added to it, [windows, seq_len, hidden]."""

    def __init__(self, model: nn.Module, block: Block, seq_len: int):
        super().__init__()
        seen: list[Beside] = []  # masks and positions of one window serve any number of windows
        with torch.no_grad(), eval_mode(model), watching(block.host, enter=lambda x, beside: seen.append(beside)):
            run_layers(model, {"input_ids": torch.zeros(1, seq_len, dtype=torch.long, device=input_device(model))})
        dtype = torch.promote_types(block.dtype, torch.float32)
        self.args = _cast(seen[0][0], dtype)
        self.kwargs = {name: _cast(value, dtype) for name, value in seen[0][1].items()}
        self.layer = copy.deepcopy(block.host).to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        return hidden_states(self.layer(x, *self.args, **self.kwargs)) - x


def _cast(value, dtype: torch.dtype):
    """Floating-point masks and positions follow the layer's precision."""
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def trained_layer(model: nn.Module, layer: int, s: BlockStatistics, training: Training = TRAINING, *, progress=True) -> Plan:
    """The plan that gives ``layer`` weights of its own: from those it has, trained to add to the stream what ``s`` says.

    Raises ValueError without sampled windows, and for windows that are padded on the left.
    """
    block = find_layers(model)[layer]
    if s.train is None or s.validation is None:
        raise ValueError(f"{block.name}: training needs samples: sample_windows and validation_windows > 0.")
    if s.train.left_padded or s.validation.left_padded:
        raise ValueError(f"{block.name}: attention would read padding before the text: pad calibration windows on the right.")
    body = _Layer(model, block, s.train.x.shape[1])
    report = train(body, s.train, s.validation, training, whole_windows=True, progress=progress)
    plan = {part: Replacement(Tuned(), part) for part in find_parts(model, layer)}
    for part, replacement in plan.items():
        modules = [body.layer.get_submodule(path.removeprefix(f"{block.name}.")) for path in part.paths]
        trained = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        replacement.body.load_state_dict(trained.state_dict())
    next(iter(plan.values())).report = FitReport(s.tokens, 0.0, None, None, training=report)
    return plan


ABOUT = dict(removes="a span of layers", paper="2403.19135")
WITH_MLP = Needs(spans=partial(streamline_spans, stand_in="mlp"))


@method("streamline_mlp", title="LLM-Streamline, MLP", needs=WITH_MLP, stand_in="mlp", **ABOUT)
@method("streamline_layer", title="LLM-Streamline", needs=Needs(spans=streamline_spans), **ABOUT)
def streamline(
    model: nn.Module,
    calibration: Calibration,
    sparsity: float,
    *,
    stand_in: str = "layer",
    training: Training = TRAINING,
) -> Plan:
    """A span of layers replaced by one trained stand-in.

    The three spans of least distance between their ends are measured on the validation windows, if there are any.

    Args:
        stand_in: "layer" (the number of layers is the nearest one) or "mlp" (a TwoLayerMLP, sized so that the sparsity is met).
        training: on the sampled windows; the best check on the validation windows is kept, the start if need be.

    Raises:
        ValueError: an unknown stand-in, a sparsity that cannot be reached, what is missing or of another model, no samples.
    """
    spans = [span for (span,) in streamline_spans(model, calibration.of_stream(model), sparsity, stand_in=stand_in)]

    def planned(span: Span) -> Plan:
        s = calibration.of_span(span).stream
        if stand_in == "layer":
            trained = trained_layer(model, span.start, s, training, progress=calibration.progress)
            return trained | without_layers(model, span.layers[1:])
        block, weights = find_layers(model)[span.start], layer_parameters(model)
        spare = sum(weights[i] for i in span.layers) - target_parameters(model, sparsity)
        fitted = fit(block, {block: s}, TwoLayerMLP.nearest(block, spare), training=training, progress=calibration.progress)
        return without_layers(model, span.layers, {span.start: fitted})

    return preferred(model, calibration, spans, planned)
