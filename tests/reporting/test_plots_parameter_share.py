"""The bars of every model are as long as its shares."""

import pandas as pd
import pytest
from drawing import closed, labels, points  # noqa: F401

from mlpreplace.reporting.plots import parameter_share


def test_bars_are_shares_sorted_by_the_mlp_share_of_blocks():
    rows = pd.DataFrame(
        {
            "model": ["much", "little"], "measured": [True, False], "total": [100, 200], "mlp": [60, 40], "attention": [20, 40],
            "embedding": [10, 60], "head": [0, 40], "other": [10, 20], "mlp_share_of_blocks": [0.75, 0.5],
            "mlp_share_of_all": [0.6, 0.2], "mlp_share_of_flops": [0.7, 0.3], "context": [2048, 1024],
        }
    )  # fmt: skip
    left, right = parameter_share(rows, claimed=0.8).axes
    assert labels(left.get_yticklabels()) == ["little", "much"]
    assert [label.get_fontweight() for label in left.get_yticklabels()] == ["normal", "bold"]
    parts = [[bar.get_width() for bar in bars] for bars in left.containers]
    assert parts == [pytest.approx(part) for part in ([0.2, 0.6], [0.2, 0.2], [0.5, 0.1], [0.1, 0.1])]
    assert [bar.get_width() for bar in right.containers[0]] == [0.3, 0.7]
    assert {(0.5, 0), (0.75, 1)} <= points(left)
    assert [text.get_text() for text in right.texts] == ["30", "70", "claimed: 80 %"]
    assert right.get_xlabel() == "per token, context up to 2,048"
