"""What notebooks begin with, show and conclude."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from mlpreplace import reporting
from mlpreplace.reporting import notebook, record


def begin(monkeypatch, tmp_path, **values):
    cells = [
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["SEED = 1\n", "FIGURES = 'x'\n", "SIZES = [1]"]},
        {"cell_type": "code", "metadata": {}, "source": "OTHER = 2"},
    ]
    (tmp_path / "07_test.ipynb").write_text(json.dumps({"cells": cells}))
    for module in (notebook, record):
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path)
    return reporting.start("07_test", {"SEED": 1, "FIGURES": str(tmp_path), "SIZES": [2], "OTHER": 2} | values)


def test_a_run_records_its_parameters_as_they_are(monkeypatch, tmp_path):
    """Also those that were injected; nothing else."""
    assert begin(monkeypatch, tmp_path).parameters == {"SEED": 1, "FIGURES": str(tmp_path), "SIZES": [2]}


def test_a_run_is_seeded(monkeypatch, tmp_path):
    drawn = []
    for seed in (3, 3, 4):
        begin(monkeypatch, tmp_path, SEED=seed)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_figure_stands_under_its_claim(monkeypatch, tmp_path):
    run = begin(monkeypatch, tmp_path)
    text = reporting.show(plt.figure(), "07_claim", "One is one.", pd.DataFrame({"x": [1]}), run)
    assert text._repr_markdown_() == json.loads((tmp_path / "07_claim.json").read_text())["claim"] == "One is one."


def test_conclusions_check_themselves():
    rows = pd.Series({"a": 1.0})
    text = reporting.conclusions(
        {
            "**a** is one.": lambda: rows["a"] == 1,
            "a is two.": lambda: rows["a"] == 2,
            "b is one.": lambda: rows["b"] == 1,
        }
    )
    assert str(text).splitlines() == ["- **a** is one.", "- Not here: ~~a is two.~~", "- Not measured here: b is one."]
