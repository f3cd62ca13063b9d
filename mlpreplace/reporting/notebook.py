"""What a notebook begins with, shows and concludes: its run, figures under their claims, and statements that check themselves."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import pandas as pd

from .plots.style import save_figure, use_style
from .record import NOTEBOOKS, Run, seed_everything


class Text:
    """Markdown, which a notebook sets as text."""

    def __init__(self, markdown: str):
        self.markdown = markdown

    def __repr__(self) -> str:
        return self.markdown

    def _repr_markdown_(self) -> str:
        return self.markdown


def start(notebook: str, values: Mapping[str, object]) -> Run:
    """Seed everything, draw in the style of the thesis, and begin the record of a run.

    Args:
        notebook: its name without suffix, "02_single_block".
        values: ``globals()``; the record holds those that the notebook's parameters cell assigns.
    """
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    names = [target.id for node in ast.parse(tagged).body if isinstance(node, ast.Assign) for target in node.targets]
    run = Run(notebook, {name: values[name] for name in names})
    seed_everything(run.parameters["SEED"])
    use_style()
    return run


def show(figure: plt.Figure, name: str, claim: str, rows: pd.DataFrame, run: Run) -> Text:
    """Save a figure with its claim and rows in the run's folder FIGURES, and return the claim, to stand above the figure."""
    save_figure(figure, name, claim=claim, rows=rows, run=run, folder=run.parameters["FIGURES"])
    return Text(claim)


def conclusions(statements: Mapping[str, Callable[[], bool]]) -> Text:
    """A list of statements about the rows above, each with the condition that makes it true.

    What was written about one model need not hold for another. A statement whose condition is false here is crossed out, and one
    whose rows were not measured here is marked.
    """
    return Text("\n".join(f"- {_checked(statement, holds)}" for statement, holds in statements.items()))


def _checked(statement: str, holds: Callable[[], bool]) -> str:
    try:
        return statement if holds() else f"Not here: ~~{statement}~~"
    except (LookupError, TypeError, ValueError):  # of a method, a size or a layer that another run does not have
        return f"Not measured here: {statement}"
