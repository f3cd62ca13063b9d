"""What all methods of a comparison are given, and how many parameters a sparsity asks to remove."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TypeVar

from torch import Tensor, nn

from ..evaluation.perplexity import compare
from ..fitting.ridge import Singular
from ..models.blocks import Block, NotApplicable
from ..models.layers import layer_parameters
from ..models.parameters import block_parameters
from ..planning.candidates import Choice, savings_of
from ..replacements.splice import Plan
from ..statistics.groups import only
from ..statistics.moments import Statistics
from ..statistics.residual_stream import Span, SpanStatistics, StreamStatistics

Choosable = TypeVar("Choosable")


@dataclass
class Calibration:
    """Statistics of the calibration text, the same for all methods. A method raises ValueError for what it lacks."""

    stream: StreamStatistics | None = None  # capture_stream
    spans: dict[Span, SpanStatistics] = field(default_factory=dict)  # capture_spans, of the spans that methods chose
    blocks: Statistics = field(default_factory=dict)  # capture, of MLP and attention blocks
    effects: Mapping[Block, Tensor] = field(default_factory=dict)  # fisher_effects, of their neurons and heads
    windows: Tensor | None = None  # token ids [windows, seq_len] of the statistics
    validation: Tensor | None = None  # token ids [windows, seq_len] to measure plans on, never held-out ones
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

    def of_insides(self) -> Statistics:
        """Statistics of MLP and attention blocks, to narrow all of them from inside.

        Raises NotApplicable where the neurons or heads of one are not known (experts), ValueError where a kind was not captured.
        """
        stats = self.of_kinds("mlp", "attention")
        if opaque := [block.name for block in stats if not block.has_neurons and block.heads is None]:
            raise NotApplicable(f"{opaque[0]}: its neurons or heads are not known, and the method narrows every block.")
        return stats


def target_parameters(model: nn.Module, sparsity: float) -> float:
    """How many parameters ``sparsity`` asks to remove. Raises ValueError outside (0, 1)."""
    if not isinstance(sparsity, Real) or not 0 < sparsity < 1:
        raise ValueError(f"Expected 0 < sparsity < 1, got {sparsity!r}.")
    return sparsity * block_parameters(model)


def least_choice(choices: Callable[[int], Choice], most: int, model: nn.Module, sparsity: float) -> Choice:
    """Of ``choices(n)``, n = 0 … ``most``, which save more and more parameters, the first that removes ``sparsity``.

    Raises ValueError for a sparsity outside (0, 1), or more than the last one removes.
    """
    target = target_parameters(model, sparsity)

    def saved(n: int) -> int:
        return sum(of_block[0] for of_block in savings_of({b: [c] for b, c in choices(n).items()}).values())

    if (n := bisect_left(range(most + 1), target, key=saved)) > most:
        raise ValueError(
            f"sparsity={sparsity} cannot be reached: at most {saved(most) / block_parameters(model):.3f} is removed."
        )
    return choices(n)


def preferred(
    model: nn.Module, calibration: Calibration, choices: Iterable[Choosable], plan: Callable[[Choosable], Plan]
) -> Plan:
    """Of ``plan(choice)`` the one that diverges least from the dense model on the validation windows.

    So every method chooses by the same windows. The first choice is taken where there are none, as with padded text. A choice
    is left out where its ridge is too small for the moments, of few tokens; raises Singular where all are.
    """
    choices = list(choices)
    if len(choices) == 1 or calibration.validation is None:
        return plan(choices[0])
    plans, singular = {}, None
    for i, choice in enumerate(choices):
        try:
            plans[i] = plan(choice)
        except Singular as error:
            singular = error
    if not plans:
        raise singular
    found = compare(model, plans, calibration.validation, cached=calibration.cached, progress=calibration.progress)
    return plans[min(found, key=lambda i: found[i].mean_kl)]
