"""Every method of the comparison by name, and the calibration that captures what the asked ones need.

A method is a function (model, calibration, sparsity) → plan; the decorator :func:`method` puts it into :data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from ..models.blocks import find_blocks
from ..replacements.splice import Plan
from ..statistics.fisher import fisher_effects
from ..statistics.moments import Statistics, capture
from ..statistics.residual_stream import Span, StreamStatistics, capture_spans, capture_stream
from .calibration import Calibration

CHOICE_WINDOWS = 16  # choose layers, neurons and heads: means of cosines and of effects settle within a few thousand tokens


@dataclass(frozen=True)
class Needs:
    """Which statistics of the calibration text a method reads."""

    stream: bool = False  # how the residual stream moves
    spans: Callable[[nn.Module, StreamStatistics, float], Iterable[Iterable[Span]]] | None = None  # choices at a sparsity
    moments: Mapping[str, Collection[str]] = field(default_factory=dict)  # {kind of block, "mlp" or "attention": its moments}
    effects: bool = False  # what the loss feels of neurons and heads, instead of pairs of input and output of validation windows

    def __str__(self) -> str:
        """In a few words."""
        words = ["residual stream"] if self.stream or self.spans else []
        words += ["spans of layers"] if self.spans else []
        words += [f"{' and '.join(moments)} moments of {kind} blocks" for kind, moments in self.moments.items()]
        words += ["effects of neurons and heads"] if self.effects else []
        return ", ".join(words).replace("mlp", "MLP") or "nothing"


@dataclass(frozen=True)
class Method:
    """One entry of :data:`METHODS`."""

    name: str
    title: str  # for people to read
    removes: str  # in a few words
    paper: str | None  # its arXiv id
    needs: Needs
    plan: Callable[[nn.Module, Calibration, float], Plan]

    @property
    def unit(self) -> str:
        """What is removed as a whole: "layers", "blocks", or "widths" of what stays."""
        return next((unit for unit in ("layers", "blocks") if unit in self.removes), "widths")

    def __call__(self, model: nn.Module, calibration: Calibration, sparsity: float) -> Plan:
        """A plan that removes ``sparsity`` of all attention and MLP parameters, or the nearest whole number of layers.

        Raises ValueError for a sparsity that cannot be reached, and for statistics that are missing or of another model.
        """
        return self.plan(model, calibration, sparsity)


METHODS: dict[str, Method] = {}  # filled by the files of this room, one a published method


def method(
    name: str, *, title: str, removes: str, paper: str | None = None, needs: Needs = Needs(), **options
) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Put the decorated function into :data:`METHODS` and leave it as it is.

    A name that is registered again is replaced, so that a notebook's cell can be run twice.

    Args:
        options: keywords that the function is called with: a variant is one more registration.
    """

    def register(function: Callable[..., Plan]) -> Callable[..., Plan]:
        METHODS[name] = Method(name, title, removes, paper, needs, partial(function, **options))
        return function

    return register


def methods_table() -> str:
    """All methods as a table in Markdown."""
    lines = ["| code name | method | paper | removes | needs |", "|---|---|---|---|---|"]
    for m in METHODS.values():
        paper = f"[arXiv](https://arxiv.org/abs/{m.paper})" if m.paper else "–"
        lines.append(f"| `{m.name}` | {m.title} | {paper} | {m.removes} | {m.needs} |")
    return "\n".join(lines)


def calibrate(
    model: nn.Module,
    windows: Tensor,
    sparsities: Iterable[float],
    *,
    methods: Iterable[str] | None = None,
    blocks: Statistics | None = None,
    mask: Tensor | None = None,
    validation_windows: int = 4,
    sample_windows: int | None = 8,
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    cached: bool = False,
    progress: bool = True,
) -> Calibration:
    """What ``methods`` need to know of the calibration text to remove ``sparsities`` of the dense ``model``, and no more.

    At most four passes. The first, over the first 16 windows, which have the shares of a mixture, measures how the residual
    stream moves, which decides the spans of layers. The second captures these spans, the third the blocks, both over all windows.
    The fourth goes backward, too, for effects: over the first 16 windows again.

    Args:
        windows: token ids [windows, seq_len]; the last ``validation_windows`` of them enter no moment.
        methods: names in :data:`METHODS`, by default all.
        blocks: statistics of MLP and attention blocks that were captured already; the third pass is left out.
        sample_windows: so many windows are kept as pairs for the spans' stand-ins to be trained on; None for all.
        mask, batch_size, memory_budget, cached: as :func:`~mlpreplace.statistics.capture` takes them.

    Raises:
        ValueError: a method that is not known, a sparsity that a method cannot reach, padded windows or none of validation for a
            method that needs effects, and what ``capture`` raises.
    """
    methods, sparsities = list(METHODS if methods is None else methods), list(sparsities)
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"Unknown method {unknown[0]!r}; known are {', '.join(METHODS)}.")
    needs = [METHODS[name].needs for name in methods]
    fitted, validation = windows.tensor_split([max(len(windows) - validation_windows, 0)])
    if any(n.effects for n in needs) and (mask is not None or not len(validation)):
        raise ValueError("Effects are felt on whole windows, plans chosen on validation ones: validation_windows > 0, no mask.")
    options, stream = dict(batch_size=batch_size, cached=cached, progress=progress), None
    some = slice(0, min(len(fitted), CHOICE_WINDOWS))
    if any(n.stream or n.spans for n in needs):
        stream = capture_stream(model, windows[some], None if mask is None else mask[some], **options)
    spans = {span for n in needs if n.spans for s in sparsities for choice in n.spans(model, stream, s) for span in choice}
    sampled = dict(mask=mask, sample_windows=sample_windows, validation_windows=validation_windows)
    found = Calibration(stream=stream, cached=cached, progress=progress)
    found.spans = capture_spans(model, spans, windows, **sampled, **options)
    found.blocks = blocks or _capture_blocks(model, needs, windows, **sampled, memory_budget=memory_budget, **options)
    if any(n.effects for n in needs):
        found.effects = fisher_effects(model, list(found.blocks), fitted[some], **options)
    if mask is None:
        found.windows, found.validation = fitted, validation if len(validation) else None
    return found


def _capture_blocks(
    model: nn.Module,
    needs: Collection[Needs],
    windows: Tensor,
    *,
    mask: Tensor | None,
    sample_windows: int | None,
    validation_windows: int,
    **options,
) -> Statistics:
    """One pass for blocks of all kinds that are asked for, with the moments that any of them is asked for."""
    blocks = [b for kind in ("mlp", "attention") if any(kind in n.moments for n in needs) for b in find_blocks(model, kind)]
    if not blocks:
        return {}
    asked = {moment for n in needs for of_kind in n.moments.values() for moment in of_kind}
    opaque = any(block.opaque for block in blocks)  # what stands in for them is solved on inputs and sampled pairs
    if opaque:
        asked.add("input")
    if not any(n.moments and not n.effects for n in needs):  # pairs of validation windows, gigabytes, serve nobody
        windows, validation_windows = windows[: max(len(windows) - validation_windows, 0)], 0
    options |= dict(mask=mask, validation_windows=validation_windows, sample_windows=sample_windows if opaque else 0)
    return capture(model, blocks, windows, moments=sorted(asked), **options)
