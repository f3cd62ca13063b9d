"""Tables to figures. A figure is saved as pdf and png together with the json of the rows it shows and their provenance."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .assets import ROOT
from .cache import write_atomically
from .provenance import Run

STYLE = Path(__file__).with_name("thesis.mplstyle")

# A name keeps its colour, marker and line in every figure; markers and lines tell them apart in greyscale.
LOOKS = {
    "Mean": {"color": "#999999", "marker": "X", "linestyle": ":"},
    "Linear": {"color": "#E69F00", "marker": "D", "linestyle": ":"},
    "LowRank": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "NarrowMLP": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
}


def use_style() -> None:
    """Draw everything that follows in the style of the thesis."""
    plt.style.use(STYLE)


def save_figure(figure: Figure, name: str, *, claim: str, rows: pd.DataFrame, run: Run, folder: str | Path = "figures") -> Path:
    """Write ``<folder>/<name>.pdf``, ``.png`` and ``.json``; the json holds the claim, the rows and the run's record.

    Args:
        name: "<nn>_<claim>", as in "04_pareto".
        claim: one sentence that the figure proves.
        rows: tidy table of everything drawn; missing values become null.
        folder: relative to the repository's root.

    Returns:
        Path of the json.
    """
    folder = ROOT / folder
    records = json.loads(rows.to_json(orient="records", double_precision=10))
    content = json.dumps({"claim": claim, "rows": records, "provenance": run.record()}, indent=1, ensure_ascii=False)
    with plt.style.context(STYLE):
        # no date inside: the same rows give the same file
        write_atomically(folder / f"{name}.pdf", lambda path: figure.savefig(path, metadata={"CreationDate": None}))
        write_atomically(folder / f"{name}.png", lambda path: figure.savefig(path, metadata={"Software": None}))
    path = folder / f"{name}.json"
    write_atomically(path, lambda scratch: scratch.write_text(content + "\n"))
    return path


def label_lines(axes: mpl.axes.Axes, labels: dict[str, tuple[float, float]], **options) -> None:
    """Names beside the lines' ends instead of a legend: {name: (x, y)}."""
    for name, (x, y) in labels.items():
        color = LOOKS.get(name, {}).get("color", "0.2")
        axes.annotate(name, (x, y), xytext=(5, 0), textcoords="offset points", va="center", color=color, fontsize=8, **options)
