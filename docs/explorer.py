"""The rows behind the explorer: those of the figures' jsons, unchanged, for every measured plan."""

from __future__ import annotations

import json
from pathlib import Path

from mlpreplace.reporting.plots import MERGING_LOOKS, METHOD_LOOKS

LOOKS = MERGING_LOOKS | METHOD_LOOKS
GROUPS = {  # heading of the methods of a group: figures of their plans, later ones add what earlier ones do not have
    "All methods (05)": ("05_perplexity_vs_sparsity", "05_healing", "05_tasks"),
    "Allocations (04)": ("04_pareto", "04_accuracy"),
    "Shared weights (06)": ("06_language",),
}
PLANS = {"All methods (05)": "05_selection_map", "Allocations (04)": "04_widths"}  # what is kept, layer by layer
METRICS = {  # column of the rows: axis title, columns of its interval or standard error, scale
    "perplexity_ratio": {"title": "perplexity ÷ dense perplexity", "interval": ["ci_low", "ci_high"], "scale": "log"},
    "perplexity": {"title": "perplexity", "scale": "log"},
    "kl": {"title": "KL to the dense model, nats per token", "scale": "log"},
    "fit_seconds": {"title": "time of the plan, s, statistics captured before", "scale": "log"},
    "accuracy": {"title": "accuracy", "error": "accuracy_se", "scale": "linear"},
    "accuracy_retained": {"title": "share of the accuracy above chance kept", "error": "accuracy_retained_se", "scale": "linear"},
}


def colour(method: str) -> str:
    """The colour of a method in the figures, healed or not. Black becomes the colour of the page's text, white in dark mode."""
    found = LOOKS[method if method in LOOKS else method.removesuffix(" + healing")]["color"]
    return "currentColor" if found == "#000000" else found


def plan_rows(folder: Path) -> list[dict]:
    """Rows of what a plan keeps of each block: group, method, sparsity, layer, kind, kept, and family where it is known."""
    rows = []
    for group, name in PLANS.items():
        figure = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        common = {"group": group, "figure": name, "kind": "mlp"}
        if "SPARSITY" in figure["provenance"]["parameters"]:  # one for the whole figure, not a column
            common["sparsity"] = figure["provenance"]["parameters"]["SPARSITY"]
        rows += [common | row for row in figure["rows"]]
    return rows


def measured_rows(folder: Path) -> list[dict]:
    """Rows of measured plans as the figures hold them, with group, figure and ``on``: the text or task they are measured on."""
    rows: dict[tuple, dict] = {}
    for group, names in GROUPS.items():
        for name in names:
            for row in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["rows"]:
                method = row["method"] + (" + healing" if row.get("tuned") else "")
                on = row.get("domain") or row["task"]
                place = {"group": group, "figure": name, "on": on}
                rows.setdefault((group, method, on, row["sparsity"]), row | place | {"method": method})
    return list(rows.values())


def explorer_data(folder: Path) -> dict:
    """Everything that the page draws from: rows, plans, metrics, and the methods of each group with their colours."""
    rows = measured_rows(folder)
    methods = {group: {r["method"]: None for r in rows if r["group"] == group and r["method"] != "dense"} for group in GROUPS}
    return {
        "rows": rows,
        "plans": plan_rows(folder),
        "metrics": METRICS,
        "methods": {group: {method: colour(method) for method in names} for group, names in methods.items()},
    }
