"""What is retained of an accuracy, on planted results whose truth is known, and the figure of it."""

import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mlpreplace.evaluation.tasks.run import TaskResult
from mlpreplace.evaluation.tasks.scores import accuracy_retained, task_rows
from mlpreplace.reporting.plots import tasks as draw


def result(correct, label="model", task="piqa", n_options=2, **changes) -> TaskResult:
    correct = np.asarray(correct, float)
    fields = {"metric": "acc", "options": np.full(len(correct), n_options), "items": np.arange(len(correct))}
    return TaskResult(task, label, correct=correct, **fields | changes)


def planted(n: int, p_dense: float, p_model: float, seed: int = 0, **changes) -> tuple[TaskResult, TaskResult]:
    """(model, dense) with these chances to be right; the model is right on a part of what the dense model is right on."""
    u = np.random.default_rng(seed).random(n)
    return result(u < p_model, **changes), result(u < p_dense, label="dense", **changes)


def test_accuracy_chance_and_standard_error():
    r = result([1, 1, 1, 0], options=np.array([2, 4, 4, 0]))
    assert (r.accuracy, r.n_items) == (0.75, 4)
    assert r.chance == pytest.approx((1 / 2 + 1 / 4 + 1 / 4 + 0) / 4)
    assert r.standard_error == pytest.approx(np.std([1, 1, 1, 0], ddof=1) / 2)


def test_the_dense_model_retains_all_without_error():
    _, dense = planted(200, 0.7, 0.5)
    kept = accuracy_retained([dense], [dense])
    assert kept == {"accuracy_retained": 1, "accuracy_retained_se": 0, "accuracy_ratio": 1, "accuracy_ratio_se": 0}


def test_guessing_retains_nothing_above_chance():
    kept = accuracy_retained([result([1, 0] * 100)], [result([1] * 180 + [0] * 20, label="dense")])
    assert kept["accuracy_retained"] == pytest.approx(0)
    assert kept["accuracy_ratio"] == pytest.approx(0.5 / 0.9)


@pytest.mark.parametrize("n_options", [2, 5])
def test_the_shares_are_those_of_the_definition(n_options):
    model, dense = planted(400, 0.8, 0.7, n_options=n_options)
    kept, chance = accuracy_retained([model], [dense]), 1 / n_options
    assert kept["accuracy_ratio"] == pytest.approx(model.accuracy / dense.accuracy)
    assert kept["accuracy_retained"] == pytest.approx((model.accuracy - chance) / (dense.accuracy - chance))


def test_the_standard_error_is_the_spread_over_samples_of_items():
    """Of 100 planted pairs: what the estimates differ by is what each says of itself."""
    pairs = [planted(150, 0.8, 0.7, seed) for seed in range(100)]
    kept = pd.DataFrame([accuracy_retained([model], [dense]) for model, dense in pairs])
    for column in ("accuracy_retained", "accuracy_ratio"):
        assert kept[f"{column}_se"].mean() == pytest.approx(kept[column].std(ddof=0), rel=0.25)


def test_the_standard_error_is_paired():
    """The same accuracies: on the same items the models differ by what they differ in, on others by all of it."""
    model, dense = planted(400, 0.75, 0.7)
    shuffled = result(np.random.default_rng(1).permutation(model.correct))
    paired, unpaired = (accuracy_retained([m], [dense]) for m in (model, shuffled))
    assert unpaired["accuracy_retained"] == paired["accuracy_retained"]
    assert paired["accuracy_retained_se"] < unpaired["accuracy_retained_se"] / 2


@pytest.mark.parametrize(("n", "p_dense"), [(2000, 0.5), (50, 0.55), (400, 0.3)])
def test_nothing_is_retained_of_what_is_not_above_chance(n, p_dense):
    model, dense = planted(n, p_dense, 0.2)
    with pytest.warns(UserWarning, match=r"not reliably above chance \(0.500\)"):
        kept = accuracy_retained([model], [dense])
    assert np.isnan([kept["accuracy_retained"], kept["accuracy_retained_se"]]).all()
    assert kept["accuracy_ratio"] == pytest.approx(model.accuracy / dense.accuracy)


@pytest.mark.parametrize(
    "changes",
    [{"items": np.arange(1, 101)}, {"metric": "acc_norm"}, {"task": "siqa"}],
)
def test_other_items_are_not_compared(changes):
    dense = result([1] * 80 + [0] * 20, label="dense")
    with pytest.raises(ValueError, match="not of the same items"):
        accuracy_retained([result([1, 0] * 50, **changes)], [dense])
    with pytest.raises(ValueError, match="not of the same items"):
        accuracy_retained([result([1, 0])], [dense])


# rows


@pytest.fixture
def two_tasks():
    easy, hard = planted(300, 0.8, 0.7), planted(200, 0.5, 0.35, seed=1, task="csqa", n_options=5)
    return [easy[1], hard[1], easy[0], hard[0]]


def test_rows_of_every_label_task_and_their_average(two_tasks):
    rows = pd.DataFrame(task_rows(two_tasks, "dense"))
    assert list(zip(rows["label"], rows["task"], strict=True)) == [
        (label, task) for label in ("dense", "model") for task in ("piqa", "csqa", "average")
    ]
    piqa, csqa, average = (r for _, r in rows[rows["label"] == "model"].iterrows())
    for column in ("accuracy", "chance"):
        assert average[column] == pytest.approx((piqa[column] + csqa[column]) / 2)
    dense = rows[(rows["label"] == "dense") & (rows["task"] == "average")].iloc[0]
    left = (average["accuracy"] - average["chance"]) / (dense["accuracy"] - dense["chance"])
    assert average["accuracy_retained"] == pytest.approx(left)
    assert average["accuracy_se"] == pytest.approx(np.hypot(piqa["accuracy_se"], csqa["accuracy_se"]) / 2)
    assert 0 < average["accuracy_retained_se"] < max(piqa["accuracy_retained_se"], csqa["accuracy_retained_se"])
    assert (average["items"], piqa["metric"]) == (500, "acc")
    assert (dense["accuracy_retained"], dense["accuracy_ratio_se"]) == (1, 0)


@pytest.mark.filterwarnings("ignore:.*not reliably above chance")
def test_a_task_at_chance_is_shown_and_not_averaged(two_tasks):
    """Unless the dense model is at chance everywhere."""
    guessed, other = ([result([1, 0] * 50, label=label, task=task) for label in ("dense", "model")] for task in ("coin", "die"))
    rows, without = (
        pd.DataFrame(task_rows(results, "dense")).set_index(["label", "task"]) for results in (two_tasks + guessed, two_tasks)
    )
    assert ("model", "coin") in rows.index and np.isnan(rows.loc[("model", "coin"), "accuracy_retained"])
    pd.testing.assert_series_equal(rows.loc[("model", "average")], without.loc[("model", "average")])
    nothing = pd.DataFrame(task_rows(guessed + other, "dense")).set_index(["label", "task"])
    assert nothing.loc[("model", "average"), "items"] == 200


def test_one_task_has_no_average(two_tasks):
    assert [r["task"] for r in task_rows(two_tasks[::2], "dense")] == ["piqa", "piqa"]


@pytest.mark.parametrize(
    ("part", "dense", "message"),
    [
        (slice(None), "base", "No result of the dense model, 'base', among 'dense', 'model'"),
        (slice(3), "dense", "'model' was measured on piqa, 'dense' on piqa, csqa"),
    ],
)
def test_results_that_cannot_be_one_table(part, dense, message, two_tasks):
    with pytest.raises(ValueError, match=message):
        task_rows(two_tasks[part], dense)


def test_two_results_under_one_label(two_tasks):
    with pytest.raises(ValueError, match="Two results of 'dense' on piqa"):
        task_rows([*two_tasks, two_tasks[0]], "dense")


# figure


@pytest.fixture
def rows():
    """Two methods at two sparsities on two tasks, the dense model not above chance on the second."""
    tables = []
    for task, p_dense, n_options in (("bundled/piqa", 0.8, 2), ("bundled/obqa", 0.25, 4)):
        shares = {"dense": 1.0, "A 0.125": 0.9, "A 0.25": 0.7, "B 0.125": 0.8, "B 0.25": 0.5}
        u = np.random.default_rng(0).random(300)
        tables += [result(u < share * p_dense, label, task, n_options) for label, share in shares.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        frame = pd.DataFrame(task_rows(tables, "dense"))
    method = frame["label"].str.split(expand=True)
    return frame.assign(method=method[0], sparsity=method[1].fillna(0).astype(float))


def test_the_figure_shows_every_defined_value(rows):
    figure = draw(rows)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == ["piqa", "obqa", "average"]
    for name, axes in panels.items():
        part = rows[(rows["task"].str.removeprefix("bundled/") == name) & (rows["method"] != "dense")]
        drawn = [float(y) for bars in axes.containers for y in bars.lines[0].get_ydata()]
        assert drawn == pytest.approx(list(part["accuracy_retained"].dropna()))
    assert [text.get_text() for text in panels["obqa"].texts].count("dense model not\nabove chance") == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]
    low, high = panels["piqa"].get_ylim()
    assert low < 0 and high > 1
    plt.close(figure)
