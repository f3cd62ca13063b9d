"""Figures of single blocks show every row they were given, where its numbers say."""

import numpy as np
import pandas as pd
import pytest
from drawing import closed, labels, pairs, points, titles  # noqa: F401

from mlpreplace.reporting.plots import (
    calibration_curves,
    error_vs_parameters,
    loss_curves,
    objectives,
    output_concentration,
    selections,
    training_gain,
)

BLOCKS = pd.DataFrame({"layer": [9, 2], "position": ["late", "early"]})  # figures put them in order of depth
TITLES = ["early: layer 2", "late: layer 9"]
SIZES = (0.1, 0.2, 0.4)


def legend(figure) -> list[str]:
    return labels(figure.legends[0].get_texts())


def a_block(**columns) -> pd.DataFrame:
    """These rows for each of the blocks; the column ``value`` is larger in the deeper block."""
    rows = BLOCKS.merge(pd.DataFrame(columns), how="cross")
    return rows.assign(value=rows["value"] * (1 + rows["layer"] / 10))


def of(rows: pd.DataFrame, layer: int) -> pd.DataFrame:
    return rows[rows["layer"] == layer]


def test_concentration_has_a_bar_and_two_errors_a_layer():
    rows = pd.DataFrame({"layer": [0, 1], "top_share": [0.2, 0.9], "pooled": [0.5, 0.01], "median": [0.4, 0.3]})
    left, right = output_concentration(rows).axes
    assert [bar.get_height() for bar in left.patches] == [0.2, 0.9]
    assert points(right) == {(0, 0.5), (1, 0.01), (0, 0.4), (1, 0.3)}


@pytest.mark.parametrize("reference", ["NarrowMLP", "TwoLayerMLP"])
def test_closed_forms_stand_above_and_ratios_to_them_below(reference):
    solved = a_block(family=reference, trained=None, share_of_block=SIZES, value=[0.8, 0.4, 0.2])
    train = solved.assign(split="train", value=solved["value"] / 2)
    trained = a_block(family="MixtureOfExperts", trained="mse", share_of_block=SIZES, value=[0.4, 0.2, 0.1])
    rows = pd.concat([solved.assign(split="heldout"), train, trained.assign(split="heldout")], ignore_index=True)
    rows = rows.assign(median=rows["value"], q25=0.9 * rows["value"], q75=1.1 * rows["value"])
    rows["active_share_of_block"] = rows["share_of_block"] / np.where(rows["family"] == reference, 1, 2)
    figure = error_vs_parameters(rows)
    assert titles(figure) == TITLES
    grid = np.array(figure.axes).reshape(2, 2)
    for (above, below), layer in zip(grid.T, (2, 9), strict=True):
        closed_form = rows[rows["trained"].isna() & (rows["layer"] == layer)]
        assert pairs(closed_form["share_of_block"], closed_form["median"]) <= points(above)
        assert {(share, 0.5) for share in SIZES} <= points(below)  # half the error at each size
        (hollow,) = [line for line in below.lines if line.get_markerfacecolor() == "white"]
        # at half the size the error of the closed form is twice as large: below the smallest size there is none
        assert pairs(*hollow.get_data()) == {(0.1, 0.25), (0.2, 0.25)}
    assert legend(figure) == [reference, "MixtureOfExperts", "on fitting tokens", "active parameters"]


def test_losses_have_two_lines_a_family():
    rows = a_block(family="Linear", curve_tokens=[0, 4096, 8192], value=[1.0, 0.5, 0.4]).rename(columns={"value": "train_loss"})
    rows["validation_loss"] = 1.5 * rows["train_loss"]
    figure = loss_curves(rows)
    assert titles(figure) == TITLES and legend(figure) == ["Linear", "thin: training loss"]
    for axes, layer in zip(figure.axes, (2, 9), strict=True):
        part = of(rows, layer)
        tokens = part["curve_tokens"]
        assert points(axes) == pairs(tokens, part["train_loss"]) | pairs(tokens, part["validation_loss"])


def test_an_arrow_leads_from_the_closed_form_to_the_trained_one():
    rows = a_block(label="NarrowMLP(8)", share_of_block=0.25, trained=[None, "mse"], fit_seconds=[0.1, 20], value=[0.4, 0.3])
    rows = rows.rename(columns={"value": "median"}).assign(trained_tokens=16_384)
    figure = training_gain(rows)
    assert titles(figure) == TITLES
    assert legend(figure) == ["closed form", "trained on 16,384 tokens (epochs × fitting tokens)"]
    for axes, layer in zip(figure.axes, (2, 9), strict=True):
        start, end = (tuple(row) for row in of(rows, layer)[["fit_seconds", "median"]].to_numpy())
        assert points(axes) == pairs(*zip(start, end, strict=True))
        arrow, text = axes.texts
        assert (arrow.xyann, arrow.xy) == (start, end) and text.get_text() == "25%: −25%"


def test_objectives_are_ratios_to_the_closed_form():
    values = {"closed form": 0.5, "mse": 0.25, "cosine": 0.4, "both": 0.3}
    rows = a_block(objective=list(values), value=list(values.values()))
    figure = objectives(rows.assign(pooled=rows["value"], cosine=2 * rows["value"], kl=rows["value"] ** 2))
    assert legend(figure) == ["trained with mse", "trained with cosine", "trained with both"]
    for axes, power in zip(figure.axes, (1, 1, 2), strict=True):
        ratios = {(at + shift, ratio**power) for at in (0, 1) for shift, ratio in ((-0.2, 0.5), (0, 0.8), (0.2, 0.6))}
        assert pairs(*zip(*ratios, strict=True)) <= points(axes)
        assert labels(axes.get_xticklabels()) == [title.replace(": ", "\n") for title in TITLES]


def test_selections_have_a_line_a_rule_and_below_what_a_rule_costs_the_model_in_two_domains():
    parts = [
        a_block(selection=rule, share_of_block=SIZES, value=[x, x / 2, x / 4]) for rule, x in (("obs", 0.3), ("random", 0.8))
    ]
    rows = pd.concat(parts).rename(columns={"value": "median"})
    for factor, name in enumerate(("kl", "kl_other"), 2):
        kl = (rows["median"] * factor).where(rows["share_of_block"] == SIZES[1])
        rows = rows.assign(**{name: kl, f"{name}_low": kl / 2, f"{name}_high": 2 * kl})
    figure = selections(rows)
    assert titles(figure) == TITLES and legend(figure) == ["OBS", "random", "hollow: another domain"]
    for above, below, layer in zip(figure.axes[:2], figure.axes[2:], (2, 9), strict=True):
        assert points(above) == pairs(of(rows, layer)["share_of_block"], of(rows, layer)["median"])
        of_model = of(rows, layer).dropna(subset="kl")
        assert points(below) >= pairs(of_model["kl"], [0, 1]) | pairs(of_model["kl_other"], [0, 1])
    assert labels(figure.axes[2].get_yticklabels()) == ["OBS", "random"]


@pytest.mark.parametrize("fitted_on", [("wiki", "both"), ("a", "b", "c", "d")], ids=len)
def test_calibration_has_a_panel_a_block_and_tested_text_and_a_line_a_fitted_text(fitted_on):
    parts = [
        a_block(tested_on=tested, fitted_on=fitted, split=split, tokens=[1024, 2048], value=[0.1 * f + t + s, 0.1 * f + t])
        for t, tested in enumerate(("wiki", "speeches"), 1)
        for f, fitted in enumerate(fitted_on)
        for s, split in enumerate(("heldout", "train"), 2)
    ]
    rows = pd.concat(parts).rename(columns={"value": "median"})
    figure = calibration_curves(rows)
    assert titles(figure) == TITLES
    assert legend(figure) == [*(f"fitted on {text}" for text in fitted_on), "thin: on fitting tokens"]
    for row, tested in zip(np.array(figure.axes).reshape(2, 2), ("wiki", "speeches"), strict=True):
        for axes, layer in zip(row, (2, 9), strict=True):
            part = of(rows[rows["tested_on"] == tested], layer)
            assert points(axes) == pairs(part["tokens"], part["median"])
