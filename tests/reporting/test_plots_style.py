"""A figure and the numbers behind it are written together, and the same numbers give the same files."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawing import closed, labels  # noqa: F401

from mlpreplace.reporting.plots import style
from mlpreplace.reporting.plots.style import error_bars, legend_above, save_figure

PDF, PNG = b"%PDF-", b"\x89PNG\r\n"


class FakeRun:
    """Stands in for a Run: its record is what it was given."""

    def __init__(self, **facts):
        self.facts = facts

    def record(self) -> dict:
        return {"seed": 1, **self.facts}


@pytest.fixture
def rows():
    return pd.DataFrame({"layer": [0, 1, 2], "perplexity": [1.5, np.nan, 2.25], "method": ["Linear", "Mean", None]})


def draw(rows: pd.DataFrame) -> plt.Figure:
    figure, axes = plt.subplots()
    axes.plot(rows["layer"], rows["perplexity"])
    return figure


def save(folder: Path, rows: pd.DataFrame, run=None) -> dict:
    path = save_figure(draw(rows), "09_test", claim="It is so.", rows=rows, run=run or FakeRun(), folder=folder)
    return json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON


def test_pdf_png_and_json_are_written_together(tmp_path, rows):
    save(tmp_path, rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["09_test.json", "09_test.pdf", "09_test.png"]
    assert (tmp_path / "09_test.pdf").read_bytes().startswith(PDF)
    assert (tmp_path / "09_test.png").read_bytes().startswith(PNG)


def test_the_json_holds_claim_rows_and_provenance(tmp_path, rows):
    content = save(tmp_path, rows, FakeRun(model={"id": "é"}))
    assert set(content) == {"claim", "rows", "provenance"}
    assert content["claim"] == "It is so."
    assert content["provenance"] == {"seed": 1, "model": {"id": "é"}}
    assert content["rows"][0] == {"layer": 0, "perplexity": 1.5, "method": "Linear"}


def test_missing_values_are_null(tmp_path, rows):
    content = save(tmp_path, rows)
    assert content["rows"][1]["perplexity"] is None
    assert content["rows"][2]["method"] is None


@pytest.mark.parametrize("value", [3.14159265e-8, 1 / 3, 12345678.901, 2.0e21])
def test_numbers_keep_their_digits(value, tmp_path):
    content = save(tmp_path, pd.DataFrame({"layer": [0], "perplexity": [value]}))
    assert content["rows"][0]["perplexity"] == pytest.approx(value, rel=1e-6, abs=0)


def test_the_same_rows_give_the_same_files(tmp_path, rows):
    for folder in ("one", "two"):
        save(tmp_path / folder, rows)
    for name in ("09_test.pdf", "09_test.png", "09_test.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, np.float32("inf")])
def test_what_is_no_number_is_null(number, tmp_path, rows):
    """In the rows and in the record, however deep: Infinity is no json either."""
    rows.loc[1, "perplexity"] = number
    content = save(tmp_path, rows, FakeRun(fact=number, parameters={"SIZES": [1.0, number], "deep": ({"x": number},)}))
    assert content["rows"][1]["perplexity"] is None
    assert content["provenance"] == {"seed": 1, "fact": None, "parameters": {"SIZES": [1.0, None], "deep": [{"x": None}]}}


def test_a_figure_that_cannot_be_recorded_is_not_written(tmp_path, rows):
    with pytest.raises(TypeError):
        save(tmp_path, rows, FakeRun(fact=Path()))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["my$model$", "$HOME/a$b", "a$\\frac$", "two\nlines", "a_b^c", "100%"])
def test_a_model_may_have_any_name(name, tmp_path, rows):
    """What stands below a figure is text: neither mathematics nor a table of lines."""
    content = save(
        tmp_path, rows, FakeRun(model={"id": name}, texts={"held": {"text": name, "sequence_length": 8, "windows": 4}})
    )
    assert content["provenance"]["model"]["id"] == name


def test_the_line_below_a_figure_says_where_windows_begin_with_bos():
    held = {"text": "bundled/wiki", "sequence_length": 8, "windows": 4}

    def below(**texts) -> str:
        return style._measured_on(FakeRun(model={"id": "a model"}, texts=texts))

    without = "a model  ·  Wikipedia: heldout 4 × 8 tokens"
    assert below(heldout=held) == below(heldout=held | {"bos": None}) == without  # records of before do not tell
    assert below(heldout=held | {"bos": 0}) == f"{without}, the first BOS"
    mixed = below(heldout=held | {"bos": 1}, own=held | {"bos": None}, validation=held | {"bos": 1})
    first, second = "heldout 4, validation 4 × 8 tokens, the first BOS", "own 4 × 8 tokens"
    assert mixed == f"a model  ·  Wikipedia: {first}  ·  Wikipedia: {second}"


def test_a_relative_folder_is_under_the_root(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(style, "ROOT", tmp_path)
    path = save_figure(draw(rows), "09_test", claim="It is so.", rows=rows, run=FakeRun())
    assert path == tmp_path / "figures" / "09_test.json"


@pytest.mark.parametrize("across", [False, True])
def test_an_interval_that_rounding_puts_beside_its_value_is_drawn(across):
    axes = plt.subplots()[1]
    value, low, high = np.array([0.3, 1.0]), np.array([0.2, 1 + 1e-15]), np.array([0.5, 1 - 1e-15])
    error_bars(axes, value, value, low, high, across=across)
    (segments,) = (bars.get_segments() for bars in axes.containers[0].lines[2])
    assert np.array(segments)[:, :, 0 if across else 1].tolist() == [pytest.approx([0.2, 0.5]), pytest.approx([1, 1])]


def test_a_legend_names_what_any_panel_holds_once():
    figure, (left, right) = plt.subplots(1, 2)
    for axes, names in ((left, "ab"), (right, "bc")):
        for name in names:
            axes.plot([0, 1], label=name)
    legend_above(figure, 4, {"further": plt.Line2D([], [])})
    assert labels(figure.legends[0].get_texts()) == ["a", "b", "c", "further"]
