"""Every method of the comparison by name: a function (model, calibration, sparsity) → plan.

To add one, write that function and name it: ``METHODS["mine"] = Method(mine)``. Where it fits stand-ins for spans of layers,
it says which, so that :func:`calibrate` captures them for all methods in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ..allocate import allocate
from ..blocks import find_blocks
from ..capture import Statistics, capture
from ..replacements import Linear
from ..stream import Span, StreamStatistics, capture_spans, capture_stream
from .calibration import Calibration, Plan
from .layer_drop import shortgpt, shortgpt_spans, uidl, uidl_spans
from .replaceme import replaceme, replaceme_spans
from .streamline import streamline, streamline_spans
from .subfit import subfit


@dataclass(frozen=True)
class Method:
    """How a plan is made, and which spans of layers must be captured for it."""

    plan: Callable[[nn.Module, Calibration, float], Plan]
    spans: Callable[[nn.Module, StreamStatistics, float], Iterable[Span]] | None = None

    def __call__(self, model: nn.Module, calibration: Calibration, sparsity: float) -> Plan:
        """A plan that removes ``sparsity`` of all attention and MLP parameters, or the nearest whole number of layers.

        Raises ValueError for a sparsity that cannot be reached, and for statistics that are missing or of another model.
        """
        return self.plan(model, calibration, sparsity)


def uniform(model: nn.Module, calibration: Calibration, sparsity: float) -> Plan:
    """Every MLP narrowed to one width."""
    return allocate(model, calibration.of_kinds("mlp"), sparsity, "uniform")


def allocated(model: nn.Module, calibration: Calibration, sparsity: float) -> Plan:
    """Of ``calibration.candidates``, for attention and MLP blocks alike, those of least damage: the exact knapsack.

    With ``calibration.validation`` attention is tried at several prices, and the plan of least KL measured there is the one.
    Damages are ``calibration.damages``; by default of second order on the validation windows, or those of the fit reports.
    """
    if not calibration.candidates:
        raise ValueError("There are no candidates to allocate: calibration.candidates = fit_all(blocks, stats, families).")
    strategy = "milp" if calibration.validation is None else "joint"
    choices = dict(candidates=calibration.candidates, damages=calibration.damages, windows=calibration.validation)
    return allocate(model, calibration.blocks, sparsity, strategy, **choices)


METHODS: dict[str, Method] = {
    "uniform": Method(uniform),
    "allocated": Method(allocated),
    "subfit": Method(subfit),
    "shortgpt": Method(shortgpt),
    "shortgpt_linear": Method(partial(shortgpt, bypass=Linear()), partial(shortgpt_spans, bypass=Linear())),
    "uidl": Method(uidl),
    "uidl_linear": Method(partial(uidl, bypass=Linear()), partial(uidl_spans, bypass=Linear())),
    "replaceme": Method(replaceme, replaceme_spans),
    "replaceme_cosine": Method(partial(replaceme, objective="cosine"), replaceme_spans),
    "streamline_layer": Method(partial(streamline, stand_in="layer"), partial(streamline_spans, stand_in="layer")),
    "streamline_mlp": Method(partial(streamline, stand_in="mlp"), partial(streamline_spans, stand_in="mlp")),
}


def calibrate(
    model: nn.Module,
    windows: Tensor,
    sparsities: Iterable[float],
    *,
    methods: Iterable[str] = tuple(METHODS),
    blocks: Statistics | None = None,
    mask: Tensor | None = None,
    choose_windows: int | None = 16,
    validation_windows: int = 4,
    sample_windows: int | None = 8,
    batch_size: int = 4,
    cached: bool = False,
    progress: bool = True,
) -> Calibration:
    """What ``methods`` need to know of the calibration text to remove ``sparsities`` of the dense ``model``.

    At most three passes: over ``choose_windows`` of the windows for how the stream moves, which decides the spans of layers;
    over all of them for these spans; and over all of them for the blocks.

    Args:
        windows: token ids [windows, seq_len]; the last ``validation_windows`` of them enter no moment.
        methods: names in :data:`METHODS`.
        blocks: statistics of MLP and attention blocks, where they were captured already; otherwise they are captured here, with
            validation windows and without training samples.
        choose_windows: so many windows, evenly spaced, to choose layers and submodules by; None for all that are fitted on.
        sample_windows: so many windows are kept as pairs for the spans' stand-ins to be trained on; None for all.
        mask, batch_size, cached: as :func:`~mlpreplace.capture.capture` takes them.

    Raises:
        ValueError: a method that is not known, a sparsity that a method cannot reach, and what ``capture`` raises.
    """
    methods, sparsities = list(methods), list(sparsities)
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"Unknown method {unknown[0]!r}; known are {', '.join(METHODS)}.")
    n_fit = len(windows) - validation_windows
    step = 1 if choose_windows is None else max(1, n_fit // choose_windows)
    some = slice(0, max(n_fit, 0), step)
    options = dict(batch_size=batch_size, cached=cached, progress=progress)
    stream = capture_stream(model, windows[some], None if mask is None else mask[some], **options)
    choices = [METHODS[name].spans for name in methods if METHODS[name].spans]
    spans = {span for choice in choices for sparsity in sparsities for span in choice(model, stream, sparsity)}
    options |= dict(validation_windows=validation_windows)
    of_spans = capture_spans(model, spans, windows, mask, sample_windows=sample_windows, **options)
    if blocks is None:
        mlps, attentions = find_blocks(model), find_blocks(model, "attention")
        pairs = sample_windows if any(block.holds_experts for block in mlps) else 0  # a TwoLayerMLP is solved on them
        blocks = capture(model, mlps + attentions, windows, mask, sample_windows=pairs, **options)
    return Calibration(stream, of_spans, blocks)
