"""What all methods of a comparison are given, and how many parameters a sparsity asks to remove."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

from torch import Tensor, nn

from ..models.blocks import Block
from ..models.layers import layer_parameters
from ..models.parameters import block_parameters
from ..planning.candidates import Candidates
from ..planning.knapsack import Damages
from ..statistics.groups import only
from ..statistics.moments import Statistics
from ..statistics.residual_stream import Span, SpanStatistics, StreamStatistics


@dataclass
class Calibration:
    """Statistics of the calibration text, the same for all methods. A method raises ValueError for what it lacks."""

    stream: StreamStatistics | None = None  # capture_stream
    spans: dict[Span, SpanStatistics] = field(default_factory=dict)  # capture_spans, of the spans that methods chose
    blocks: Statistics = field(default_factory=dict)  # capture, of MLP and attention blocks
    effects: Mapping[Block, Tensor] = field(default_factory=dict)  # fisher_effects, of their neurons and heads
    windows: Tensor | None = None  # token ids [windows, seq_len] of the statistics
    validation: Tensor | None = None  # token ids [windows, seq_len] to measure plans on, never held-out ones
    candidates: Candidates = field(default_factory=dict)  # for an allocation to choose from, by default candidate_families
    damages: Damages | None = None  # what each candidate costs, by default second_order_damage on the validation windows
    cached: bool = False  # keep on disk what a method takes minutes for, and take it from there
    progress: bool = False  # show how far that is

    def of_stream(self, model: nn.Module) -> StreamStatistics:
        """Raises ValueError where the stream was not captured, or that of a model with another number of layers."""
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

    def of_text(self) -> tuple[Tensor, Tensor]:
        """The windows of the statistics and those of validation; raises ValueError where either is not known."""
        if self.windows is None or self.validation is None:
            raise ValueError("No windows to fit and to measure plans on: calibrate(model, windows, sparsities), without a mask.")
        return self.windows, self.validation

    def of_kinds(self, *kinds: str) -> Statistics:
        """Statistics of blocks of ``kinds``; raises ValueError where a kind was not captured."""
        for kind in kinds:
            if not any(block.kind == kind for block in self.blocks):
                raise ValueError(f"No {kind} block was captured: Calibration(blocks=capture(model, blocks, windows)).")
        return only(self.blocks, [block for block in self.blocks if block.kind in kinds])


def target_parameters(model: nn.Module, sparsity: float) -> float:
    """How many parameters ``sparsity`` asks to remove. Raises ValueError outside (0, 1)."""
    if not isinstance(sparsity, Real) or not 0 < sparsity < 1:
        raise ValueError(f"Expected 0 < sparsity < 1, got {sparsity!r}.")
    return sparsity * block_parameters(model)
