"""What figures share: the style, panels, marks and legends; and how a figure is saved together with its rows and their record."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from ...runtime.files import ROOT, strict_json, write_atomically
from ..record import Run
from .looks import Look, readable

STYLE = Path(__file__).with_name("thesis.mplstyle")
AVERAGE = "average"  # of the tasks
WIDEST = (-0.75, 1.75)  # of the axis of accuracy retained: an error bar may be longer


def use_style() -> None:
    """Draw all later figures in the style of the thesis."""
    plt.style.use(STYLE)


def save_figure(
    figure: plt.Figure, name: str, *, claim: str, rows: pd.DataFrame, run: Run, folder: str | Path = "figures"
) -> Path:
    """Write ``<folder>/<name>.pdf``, ``.png`` and ``.json``; the json holds the claim, the rows and the run's record.

    Args:
        name: "<nn>_<claim>", as in "04_pareto".
        claim: one sentence that the figure proves.
        rows: tidy records of everything drawn; missing values become null, as do infinite ones.
        folder: relative to the repository's root.

    Returns:
        Path of the json.
    """
    folder = ROOT / folder
    below = textwrap.fill(_measured_on(run), int(22 * figure.get_figwidth()))
    figure.supxlabel(below, fontsize=5.5, color="0.45", parse_math=False)  # a $ in the name of a folder is no mathematics
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    record = {"claim": claim, "rows": records, "provenance": run.record()}
    content = strict_json(record, indent=1, ensure_ascii=False)
    with plt.style.context(STYLE):
        # without a date the same rows give the same file
        write_atomically(folder / f"{name}.pdf", lambda path: figure.savefig(path, metadata={"CreationDate": None}))
        write_atomically(folder / f"{name}.png", lambda path: figure.savefig(path, metadata={"Software": None}))
    path = folder / f"{name}.json"
    write_atomically(path, lambda scratch: scratch.write_text(content + "\n", encoding="utf-8"))
    return path


def _measured_on(run: Run) -> str:
    """The line below a figure: the model, the windows of every split of every text, and what was left out."""
    splits: dict[tuple, list[str]] = {}
    for name, text in run.facts.get("texts", {}).items():
        of_text = splits.setdefault((text["text"], text["sequence_length"], text.get("bos")), [])
        of_text.append(f"{name.split('_')[0]} {text['windows']}")
    texts = [f"{readable(text)}: {', '.join(names)} × {_tokens(length, bos)}" for (text, length, bos), names in splits.items()]
    left_out = [f"left out: {', '.join(map(readable, names))}"] if (names := run.facts.get("left_out")) else []
    return "  ·  ".join([run.facts.get("model", {}).get("id", ""), *texts, *left_out])


def _tokens(length: int, bos: int | None) -> str:
    """What a window holds, "512 tokens, the first BOS"."""
    return f"{length} tokens" if bos is None else f"{length} tokens, the first BOS"


def parts_by(rows: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """{value of the column: its rows}, in the order of the rows."""
    return dict(iter(rows.groupby(column, sort=False)))


def panels(
    parts: Mapping[str, pd.DataFrame], figsize: tuple[float, float], *, down: bool = False, **options
) -> tuple[plt.Figure, list[tuple[plt.Axes, str, pd.DataFrame]]]:
    """A figure with a panel for each of ``parts``, side by side or ``down``; and (panel, name, rows) of each part."""
    shape = (len(parts), 1) if down else (1, len(parts))
    figure, grid = plt.subplots(*shape, figsize=figsize, squeeze=False, **options)
    return figure, list(zip(grid.flat, parts, parts.values(), strict=True))


def draw_lines(axes: plt.Axes, rows: pd.DataFrame, columns: Sequence[str], looks: Mapping[str, Look], **style) -> None:
    """A line for each value of the first of ``columns``; the others are x, y and, if known, both ends of the interval of y."""
    by, x, y, *interval = columns
    for name, line in parts_by(rows, by).items():
        line, look = line.sort_values(x), looks[name] | {"label": readable(name)} | style
        if interval:
            error_bars(axes, line[x], line[y], *(line[end] for end in interval), **look)
        else:
            axes.plot(line[x], line[y], **look)


def error_bars(axes: plt.Axes, x, y, low, high, *, across: bool = False, **look) -> None:
    """Marks with their intervals from ``low`` to ``high``, which are values of y, or of x where ``across``."""
    value = x if across else y
    reach = np.stack([value - low, high - value]).reshape(2, -1).clip(0)  # rounding may put an end beyond the value
    axes.errorbar(x, y, **{"xerr" if across else "yerr": reach}, **{"capsize": 2, "elinewidth": 0.8} | look)


def note(axes: plt.Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **style) -> None:
    """A text near a point; ``offset`` in points (1/72 inch)."""
    axes.annotate(text, point, xytext=offset, textcoords="offset points", **style)


def legend_above(figure: plt.Figure, columns: int, further: Mapping[str, plt.Artist] | None = None, **options) -> None:
    """One legend above all panels: every label that they use, once, and ``further`` entries."""
    entries = {label: entry for axes in figure.axes for entry, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    entries |= further or {}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns, **options)


def percent(share: float, _position: int = 0) -> str:
    """A share as tick label, "12.5 %"."""
    return f"{100 * share:g} %"


def sparsity_axis(axes: plt.Axes) -> None:
    """Sparsity across, with a tick at every eighth."""
    axes.set_xlabel("sparsity (of attention and MLP parameters)")
    axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.125))
    axes.xaxis.set_major_formatter(percent)


def log_ticks(axis: mpl.axis.Axis, form: str | Callable = "{x:g}", subs: tuple[float, ...] = (1, 2, 3, 5)) -> None:
    """0.1, 0.2, 0.3, 0.5 … instead of powers of ten."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=subs))
    axis.set_major_formatter(form)
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def kept_maps(rows: pd.DataFrame, down: str, label: Callable[[Any], str], inches: float) -> plt.Figure:
    """A map a method of the share ``kept`` by layer and by the column ``down``, whose values have a ``label``.

    Args:
        inches: height of a line of the map.
    """
    methods = parts_by(rows, "method")
    size = 6.8, 0.8 + len(methods) * (0.35 + inches * rows[down].nunique())
    figure, drawn = panels(methods, size, down=True, sharex=True)
    for axes, method, part in drawn:
        table = part.pivot(index=down, columns="layer", values="kept")
        sns.heatmap(table, ax=axes, cmap="Blues", vmin=0, vmax=1, linewidths=0.5, cbar=False)
        axes.set_yticks([i + 0.5 for i in range(len(table))], [label(value) for value in table.index], rotation=0)
        axes.set(title=readable(method), xlabel="", ylabel="")
        axes.tick_params(length=0)
    drawn[-1][0].set_xlabel("layer")
    bar = {"label": "parameters kept", "format": mpl.ticker.PercentFormatter(1), "fraction": 0.03, "pad": 0.01}
    figure.colorbar(drawn[0][0].collections[0], ax=[axes for axes, *_ in drawn], **bar)
    return figure
