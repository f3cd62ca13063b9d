"""Perplexity ratios across, a line a plan and a mark a domain: what differs by one thing stands below each other."""

from __future__ import annotations

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .looks import INK, TEXT_LOOKS, Look, readable
from .style import error_bars, legend_above, log_ticks, note, panels, parts_by

COARSE = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 7)  # ticks of a decade
FINE = (1, 1.05, 1.1, 1.2, 1.3, 1.4, 9, 9.5)  # the last ones are 0.9 and 0.95
WIDE = 1.6  # ratio from which on FINE ticks would overlap
ASIDE = 0.15  # of the domains, from the middle of their line


def calibration_texts(rows: pd.DataFrame) -> plt.Figure:
    """Perplexity ratio by what the fits saw: a line a calibration text, a mark a text that is measured on.

    Args:
        rows: method (the calibration text), split ("validation" or "heldout"), domain, perplexity_ratio, ci_low, ci_high,
            log_damage.
    """
    places = _places(rows["method"])
    figure, axes = plt.subplots(figsize=(6.8, 0.9 + 0.27 * len(places)))
    _draw_ratios(axes, rows[rows["split"] == "heldout"], places)
    chosen_by = np.exp(rows[rows["split"] == "validation"].groupby("method")["log_damage"].mean())
    tick = {"linestyle": "", "marker": "|", "markersize": 11, "color": "0.1"}
    axes.plot(chosen_by, chosen_by.index.map(places), label="validation windows of prose, mean", **tick)
    log_ticks(axes.xaxis, "×{x:g}", (1, 1.5, 2, 2.5, 3, 4, 5, 7))
    axes.set_yticks(list(places.values()), map(readable, places))
    legend_above(figure, 3)
    return figure


def ablation(rows: pd.DataFrame) -> plt.Figure:
    """Perplexity ratio of recipes that differ by one ingredient, a line a recipe, a mark a domain.

    Args:
        rows: method (the recipe), note (what it adds and to which), domain, perplexity_ratio, ci_low, ci_high; one sparsity.
    """
    places = _places(rows["method"])
    notes = rows.drop_duplicates("method").set_index("method")["note"]
    figure, axes = plt.subplots(figsize=(6.8, 1.0 + 0.29 * len(places)))
    _draw_ratios(axes, rows, places)
    for part, side in zip(parts_by(rows, "domain").values(), cycle(((0, 4), (0, -9))), strict=False):
        for method, value in zip(part["method"], part["perplexity_ratio"], strict=True):
            note(axes, f"{value:.2f}", (value, places[method]), side, fontsize=6, ha="center")
    log_ticks(axes.xaxis, "×{x:g}", (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7))
    axes.set_yticks(list(places.values()), [f"{readable(n)}: {notes[n]}" if notes[n] else readable(n) for n in places])
    axes.set_ylim(0.4, len(places) + 0.6)
    axes.tick_params(axis="y", labelsize=7)
    legend_above(figure, 2)
    return figure


def ingredients(rows: pd.DataFrame) -> plt.Figure:
    """What a recipe gains by each ingredient and loses without it: a panel for each list of recipes, one below the other.

    Marks are means over draws of the calibration windows, with their intervals; bare strokes are single draws.

    Args:
        rows: panel (its title), method, domain, draw (None for the mean of all), perplexity_ratio, ci_low, ci_high.
    """
    parts = parts_by(rows, "panel")
    deep = [part["method"].nunique() for part in parts.values()]
    options = dict(down=True, gridspec_kw={"height_ratios": [n + 1 for n in deep]})
    figure, drawn = panels(parts, (6.8, 1.6 + 0.34 * sum(deep)), **options)
    for axes, title, part in drawn:
        places = _places(part["method"])
        for (domain, found), look, side in zip(parts_by(part, "domain").items(), TEXT_LOOKS, (1, -1), strict=False):
            _draw_draws(axes, found, {name: place + side * ASIDE for name, place in places.items()}, domain, look)
        axes.axvline(1, color=INK, linewidth=0.8, zorder=0)
        axes.grid(axis="y", linewidth=0.4, color="0.9")
        axes.set_xscale("log")
        log_ticks(axes.xaxis, "×{x:g}", COARSE if part["perplexity_ratio"].max() > WIDE else FINE)
        axes.set_yticks(list(places.values()), map(readable, places))
        axes.set(ylim=(0.4, len(places) + 0.6), title=title)
        axes.tick_params(axis="y", labelsize=7)
    legend_above(figure, 2)
    return figure


def _draw_draws(axes: plt.Axes, rows: pd.DataFrame, places: dict[str, float], domain: str, look: Look) -> None:
    """The mean of the draws with its interval and its value, and each draw."""
    mean, single = rows[rows["draw"].isna()], rows[rows["draw"].notna()]
    x, y = mean["perplexity_ratio"], mean["method"].map(places)
    large = look | {"linestyle": "", "label": readable(domain)}
    error_bars(axes, x, y, mean["ci_low"], mean["ci_high"], across=True, **large)
    small = {"linestyle": "", "marker": "|", "markersize": 9, "color": look["color"]}
    axes.plot(single["perplexity_ratio"], single["method"].map(places), **small)
    for value, place in zip(x, y, strict=True):
        note(axes, f"{value:.3f}", (value, place), (0, 4 if place > round(place) else -9), fontsize=5.5, ha="center")


def _places(methods: pd.Series) -> dict[str, int]:
    """{method: its height}, the first on top."""
    names = methods.unique()
    return {name: len(names) - i for i, name in enumerate(names)}


def _draw_ratios(axes: plt.Axes, rows: pd.DataFrame, places: dict[str, int]) -> None:
    """Perplexity ratios across with their intervals, a mark a domain."""
    for (domain, part), look in zip(parts_by(rows, "domain").items(), cycle(TEXT_LOOKS), strict=False):
        x, y = part["perplexity_ratio"], part["method"].map(places)
        error_bars(axes, x, y, part["ci_low"], part["ci_high"], across=True, label=readable(domain), **look | {"linestyle": ""})
    axes.set(xscale="log", xlabel="perplexity ÷ dense perplexity")
    axes.grid(axis="y", linewidth=0.4, color="0.9")
