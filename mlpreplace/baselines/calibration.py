"""What all methods of a comparison are given, and how large a share of a model they are asked to remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..blocks import Block, block_parameters
from ..capture import Statistics
from ..damage import Candidates, Damages
from ..layers import layer_parameters
from ..replacements import Replacement
from ..stream import Span, SpanStatistics, StreamStatistics

Plan = dict[Block, Replacement]


@dataclass
class Calibration:
    """The calibration text as methods see it: the same for all of them. A method says what it lacks."""

    stream: StreamStatistics | None = None  # capture_stream
    spans: dict[Span, SpanStatistics] = field(default_factory=dict)  # capture_spans, of the spans that methods chose
    blocks: Statistics = field(default_factory=dict)  # capture, of MLP and attention blocks
    candidates: Candidates = field(default_factory=dict)  # fitted replacements for the allocation to choose from
    damages: Damages | None = None  # what each candidate costs, second_order_damage for instance
    validation: Tensor | None = None  # token ids [windows, seq_len] to measure plans on, never held-out ones

    def of_stream(self, model: nn.Module) -> StreamStatistics:
        """Raises ValueError where the stream was not captured, or that of a model with other layers."""
        if self.stream is None:
            raise ValueError("The residual stream was not captured: Calibration(stream=capture_stream(model, windows)).")
        if (captured := self.stream.layers) != (layers := len(layer_parameters(model))):
            raise ValueError(f"The stream is of another model: it passes {captured} layers, {type(model).__name__} has {layers}.")
        return self.stream

    def of_span(self, span: Span) -> SpanStatistics:
        """Raises ValueError where the span was not captured."""
        if span not in self.spans:
            raise ValueError(
                f"Layers {span.start} to {span.stop - 1} were not captured as a span: calibrate(model, windows, sparsities) "
                "captures what the methods choose at these sparsities, capture_spans any."
            )
        return self.spans[span]

    def of_kinds(self, *kinds: str) -> Statistics:
        """Statistics of blocks of ``kinds``; raises ValueError where a kind was not captured."""
        for kind in kinds:
            if not any(block.kind == kind for block in self.blocks):
                raise ValueError(f"No {kind} block was captured: Calibration(blocks=capture(model, blocks, windows)).")
        return {block: s for block, s in self.blocks.items() if block.kind in kinds}


def target_parameters(model: nn.Module, sparsity: float) -> float:
    """How many parameters ``sparsity`` asks to remove. Raises ValueError outside (0, 1)."""
    if not 0 < sparsity < 1:
        raise ValueError(f"Expected 0 < sparsity < 1, got {sparsity}.")
    return sparsity * block_parameters(model)


def nearest_choice(
    model: nn.Module, sparsity: float, choice: Callable[[int], Sequence[int]], added: Callable[[Sequence[int]], int]
) -> Sequence[int]:
    """Of the ``choice`` (n) of n layers, n = 1, 2, …, the one that removes nearest to ``sparsity``: layers are no small change.

    Args:
        choice: n → layers to remove.
        added: layers removed → parameters of what stands in for them.

    Raises ValueError for a sparsity outside (0, 1), or so high that no layer would be left.
    """
    weights = layer_parameters(model)
    target = target_parameters(model, sparsity)
    choices = [choice(n) for n in range(1, len(weights))]
    if not choices:
        raise ValueError("A model of one layer has none to remove.")
    removed = [sum(weights[i] for i in layers) - added(layers) for layers in choices]
    if target > max(removed) + min(weights) / 2:
        most = max(removed) / sum(weights)
        raise ValueError(f"sparsity={sparsity} cannot be reached: without all layers but one it would be {most:.3f}.")
    return min(zip(choices, removed, strict=True), key=lambda found: abs(found[1] - target))[0]
