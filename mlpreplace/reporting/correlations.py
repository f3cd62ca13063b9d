"""How well an estimate ranks what it estimates."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from ..evaluation.perplexity import Estimate, bootstrap


def rank_correlations(
    rows: pd.DataFrame, estimates: Iterable[str], measured: str, *, by: str, seed: int = 0
) -> dict[str, Estimate]:
    """Spearman's rank correlation of each column of ``estimates`` with the column ``measured``; ``tokens`` are rows.

    Args:
        by: a column. For the 95 % bootstrap interval, rows of one value of it are drawn together: replacements of one block are
            not independent.
    """
    groups = [np.asarray(places) for places in rows.reset_index(drop=True).groupby(by).indices.values()]

    def correlation(name: str, places: np.ndarray) -> float:
        return float(np.corrcoef(*(rankdata(rows[column].to_numpy()[places]) for column in (name, measured)))[0, 1])

    found = {}
    for name in estimates:
        low, high = bootstrap(
            lambda draws, name=name: np.array([correlation(name, np.concatenate([groups[i] for i in d])) for d in draws]),
            len(groups),
            seed,
        )
        found[name] = Estimate(correlation(name, np.arange(len(rows))), low, high, len(rows))
    return found
