"""LLM-Streamline (arXiv 2403.19135): a span of layers is replaced by one small network, trained by squared error.

The span is the one whose ends are nearest in cosine. The stand-in is given the residual stream that enters the span and
trained towards the one that leaves it, on captured pairs of the dense model: either a transformer layer that starts as the
span's first, or an MLP with one hidden layer around the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..capture import BlockStatistics, _backbone, _tensor
from ..fit import fit
from ..layers import Tuned, find_layers, find_parts, layer_parameters, without_layers
from ..models import eval_mode, input_device
from ..replacements import Family, Replacement, TwoLayerMLP
from ..reports import FitReport
from ..stream import Span, StreamStatistics
from ..train import Training, train
from .calibration import Calibration, Plan, nearest_choice, target_parameters
from .layer_drop import nearest_ends

STAND_INS = ("layer", "mlp")
TRAINING = Training(epochs=8, learning_rate=3e-4)
LEAST = 0.1  # of a layer's parameters: a smaller MLP is not worth its place


def streamline_spans(model: nn.Module, stream: StreamStatistics, sparsity: float, *, stand_in: str = "layer") -> list[Span]:
    """The one span that the stand-in takes the place of.

    "layer": one layer more than comes nearest to ``sparsity``, since one is put back. "mlp": as few as remove more than
    ``sparsity``, by at least a tenth of a layer; the MLP has the parameters that may be put back.
    """
    if stand_in not in STAND_INS:
        raise ValueError(f"Unknown stand-in {stand_in!r}; expected one of {', '.join(STAND_INS)}.")
    weights, target = layer_parameters(model), target_parameters(model, sparsity)
    if stand_in == "layer":
        removed = nearest_choice(model, sparsity, lambda n: nearest_ends(stream.distance, n + 1).layers[1:], lambda layers: 0)
        return [Span(removed[0] - 1, removed[-1] + 1)]
    spans = [nearest_ends(stream.distance, n) for n in range(1, len(weights) + 1)]
    enough = [span for span in spans if _spare(weights, span, target) >= LEAST * weights[span.start]]
    if not enough:
        raise ValueError(f"sparsity={sparsity} cannot be reached: without all layers there is no room for an MLP in their place.")
    return enough[:1]


def _spare(weights: Sequence[int], span: Span, target: float) -> float:
    """Parameters that may be put back when ``span`` is removed."""
    return sum(weights[i] for i in span.layers) - target


class _Layer(nn.Module):
    """A copy of a layer as a map of the residual stream to what is added to it, [windows, seq_len, hidden]."""

    def __init__(self, model: nn.Module, block: Block, seq_len: int):
        super().__init__()
        self.args, self.kwargs = _called_with(model, block, seq_len)
        dtype = torch.promote_types(block.dtype, torch.float32)
        self.layer = copy.deepcopy(block.host).to(dtype).eval()
        self.kwargs = {name: _cast(value, dtype) for name, value in self.kwargs.items()}
        self.args = tuple(_cast(value, dtype) for value in self.args)

    def forward(self, x: Tensor) -> Tensor:
        return _tensor(self.layer(x, *self.args, **self.kwargs)) - x


def _cast(value, dtype: torch.dtype):
    """Floating-point masks and positions follow the layer's precision."""
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def _called_with(model: nn.Module, block: Block, seq_len: int) -> tuple[tuple, dict]:
    """What the model gives a layer beside the stream for one window of ``seq_len`` tokens: it serves any number of them."""
    seen: list[tuple[tuple, dict]] = []

    def enter(module, args, kwargs) -> None:
        beside = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        seen.append((args[1:], beside))

    handle = block.host.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with eval_mode(model):
            _backbone(model)(torch.zeros(1, seq_len, dtype=torch.long, device=input_device(model)), None)
    finally:
        handle.remove()
    return seen[0]


def trained_layer(
    model: nn.Module, layer: int, s: BlockStatistics, training: Training = TRAINING, *, seed: int = 0, progress: bool = True
) -> Plan:
    """The plan that gives ``layer`` weights of its own, trained to add to the stream what ``s`` says, from those it has.

    Raises ValueError without sampled windows, and for windows that are padded on the left.
    """
    block = find_layers(model)[layer]
    if s.train is None or s.validation is None:
        raise ValueError(f"{block.name}: training needs samples: sample_windows and validation_windows > 0.")
    if any((~p.mask[:, :-1] & p.mask[:, 1:]).any() for p in (s.train, s.validation)):
        raise ValueError(f"{block.name}: attention would read padding before the text: pad calibration windows on the right.")
    body = _Layer(model, block, s.train.x.shape[1])
    report = train(body, s.train, s.validation, training, whole_windows=True, seed=seed, progress=progress)
    plan, prefix = {}, f"{block.name}."
    for part in find_parts(model, layer):
        replacement = Replacement(Tuned(), part)
        modules = [body.layer.get_submodule(path.removeprefix(prefix)) for path in part.paths]
        trained = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        replacement.body.load_state_dict(trained.state_dict())
        plan[part] = replacement
    first = next(iter(plan.values()))
    first.report = FitReport(s.tokens, 0.0, None, None, training=report)
    return plan


def streamline(
    model: nn.Module,
    calibration: Calibration,
    sparsity: float,
    *,
    stand_in: str = "layer",
    training: Training = TRAINING,
    family: type[Family] = TwoLayerMLP,
    progress: bool = False,
) -> Plan:
    """A span of layers replaced by one trained stand-in.

    Args:
        stand_in: "layer" (the number of layers is the nearest one) or "mlp" (sized so that the sparsity is met).
        training: on the sampled windows; the best check on the validation windows is kept, the start if need be.
        family: of "mlp". The paper's MLP is of a fixed size and starts at random; ours starts at its closed form.

    Raises:
        ValueError: an unknown stand-in, a sparsity that cannot be reached, statistics that are missing or of another model,
            no sampled windows.
    """
    (span,) = streamline_spans(model, calibration.of_stream(model), sparsity, stand_in=stand_in)
    s = calibration.of_span(span).stream
    if stand_in == "layer":
        tuned = trained_layer(model, span.start, s, training, progress=progress)
        return tuned | without_layers(model, span.layers[1:])
    block = find_layers(model)[span.start]
    spare = _spare(layer_parameters(model), span, target_parameters(model, sparsity))
    fitted = fit(block, {block: s}, family.nearest(block, spare), training=training, progress=progress)
    return without_layers(model, span.layers, {span.start: fitted})
