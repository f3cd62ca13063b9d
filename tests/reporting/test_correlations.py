"""Rank correlations of estimates."""

import numpy as np
import pandas as pd
import pytest

from mlpreplace.reporting import rank_correlations


def rows_of(groups: int, each: int) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    measured = draw.random((groups, each))
    noisy = measured + 0.3 * draw.standard_normal(measured.shape)
    columns = {"same": np.exp(measured), "opposite": -measured, "noisy": noisy, "kl": measured}
    return pd.DataFrame({"layer": np.repeat(np.arange(groups), each)} | {name: c.ravel() for name, c in columns.items()})


def test_it_is_spearmans_and_its_interval_holds_it():
    rows = rows_of(30, 2)
    found = rank_correlations(rows, ["same", "opposite", "noisy"], "kl", by="layer")
    assert (found["same"].value, found["same"].low) == pytest.approx((1, 1)) and found["opposite"].value == pytest.approx(-1)
    noisy = found["noisy"]
    assert noisy.value == pytest.approx(rows["noisy"].corr(rows["kl"], "spearman"))
    assert noisy.low < noisy.value < noisy.high and noisy.tokens == 60


def test_rows_of_a_group_are_drawn_together():
    """Each row three times over is no more evidence, and its interval is as wide."""
    rows = rows_of(30, 1)
    often = pd.concat([rows] * 3).sample(frac=1, random_state=0)
    once, thrice = (rank_correlations(r, ["noisy"], "kl", by="layer")["noisy"] for r in (rows, often))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
