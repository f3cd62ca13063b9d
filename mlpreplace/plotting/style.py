"""The look that figures share, and how one is written: pdf and png together with the json of its rows and their provenance."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..assets import ROOT
from ..cache import write_atomically
from ..provenance import Run

STYLE = Path(__file__).with_name("thesis.mplstyle")

# A name keeps its colour, marker and line in every figure; markers and lines tell them apart in greyscale.
LOOKS = {
    "Mean": {"color": "#999999", "marker": "X", "linestyle": ":"},
    "Linear": {"color": "#E69F00", "marker": "D", "linestyle": ":"},
    "LowRank": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "NarrowMLP": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "NarrowPlusLinear": {"color": "#56B4E9", "marker": "v", "linestyle": "-."},
    "TwoLayerMLP": {"color": "#CC79A7", "marker": "^", "linestyle": "--"},
    "ConvMLP": {"color": "#117733", "marker": "P", "linestyle": "-."},
    "AttentionMLP": {"color": "#882255", "marker": ">", "linestyle": "--"},
    "MixtureOfExperts": {"color": "#7B6FD0", "marker": "h", "linestyle": "-"},
    "NestedMLP": {"color": "#44AA99", "marker": "<", "linestyle": "-"},
    "TransformerBlock": {"color": "#000000", "marker": "*", "linestyle": ":"},
    "Removed": {"color": "#661100", "marker": "p", "linestyle": ":"},
    "Tuned": {"color": "#332288", "marker": "d", "linestyle": "-"},
    "Merged": {"color": "#AA4499", "marker": "H", "linestyle": "-"},
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
    figure.supxlabel(textwrap.fill(_measured_on(run), int(22 * figure.get_figwidth())), fontsize=5.5, color="0.45")
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    record = {"claim": claim, "rows": records, "provenance": run.record()}
    content = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    with plt.style.context(STYLE):
        # no date inside: the same rows give the same file
        write_atomically(folder / f"{name}.pdf", lambda path: figure.savefig(path, metadata={"CreationDate": None}))
        write_atomically(folder / f"{name}.png", lambda path: figure.savefig(path, metadata={"Software": None}))
    path = folder / f"{name}.json"
    write_atomically(path, lambda scratch: scratch.write_text(content + "\n"))
    return path


def _measured_on(run: Run) -> str:
    """What no number may be quoted without: the model, the windows and sequence length of every split of every text, and what
    the model is not made for.
    """
    splits: dict[tuple[str, int], list[str]] = {}
    for name, text in run.facts.get("texts", {}).items():
        of_text = splits.setdefault((text["text"], text["sequence_length"]), [])
        of_text.append(f"{name.split('_')[0]} {text['windows']}")
    texts = [f"{text}: {', '.join(names)} × {length} tokens" for (text, length), names in splits.items()]
    left_out = [f"left out: {', '.join(names)}"] if (names := run.facts.get("left_out")) else []
    return "  ·  ".join([run.facts.get("model", {}).get("id", ""), *texts, *left_out])


def plain_log_ticks(axis: mpl.axis.Axis, form: str = "%g", subs: tuple[float, ...] = (1, 2, 3, 5)) -> None:
    """0.1, 0.2, 0.3, 0.5 … instead of powers of ten."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=subs))
    axis.set_major_formatter(mpl.ticker.FormatStrFormatter(form))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())
