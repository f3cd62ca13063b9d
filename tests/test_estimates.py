"""What a large model takes is computed: formulas agree with a tiny model, and texts with the formulas."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import build, random_windows

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, allocate, capture
from mlpreplace.replacements import ladder
from mlpreplace.runtime.memory import memory_budget
from mlpreplace.statistics.fisher import fisher_gradients

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT / "benchmarks"), str(ROOT / "notebooks")]
sys.path[:0] = FOLDERS

from compression import MOMENTS, RESERVE, Compression  # noqa: E402
from estimates import ROWS, row, steps, total  # noqa: E402
from model_size import OTHERS, size, size_of  # noqa: E402
from parameters import defaults  # noqa: E402

del sys.path[: len(FOLDERS)]

SEQ_LEN = 12
PROFILE = (ROOT / "notebooks" / "profiles" / "gpu.yaml").read_text(encoding="utf-8")
COMMENT = " ".join(PROFILE.partition("\ncommon:")[0].replace("#", " ").split())
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
SECTION = re.search(r"\n## An 8B model on one GPU\n(.*?)\n## ", GUIDE, re.DOTALL)[1]


def large(name: str = "Llama-3-8B", gpus: int = 1, layers: int | None = None, **options) -> Compression:
    return Compression(size_of(name, Compression.seq_len, layers), gpus, **options)


# Formulas and a tiny model


@pytest.fixture(scope="module")
def model():
    return build("llama")


def tiny(model, **options) -> Compression:
    return Compression(size(model, SEQ_LEN), seq_len=SEQ_LEN, windows=8, validation=4, **options)


def taken(model, run: Compression, memory_budget: int | None = None):
    parts = dict(validation_windows=0, sample_windows=0, batch_size=4, progress=False)
    windows = random_windows(run.windows, SEQ_LEN)
    return capture(model, run.of.blocks, windows, moments=MOMENTS, **parts, memory_budget=memory_budget)


def test_statistics_take_what_is_said(model):
    run = tiny(model)
    stats = taken(model, run)
    for block in run.of.blocks:
        matrices = [t for t in (stats[block].xx, stats[block].xy, stats[block].hh, stats[block].hx) if t is not None]
        assert sum(t.nbytes for t in matrices) == run.statistics[block], block.name


@pytest.mark.parametrize("budget", [1, 200_000, 300_000, 10**9])
def test_groups_are_those_of_the_capture(model, budget):
    run, stats = tiny(model, given=budget), taken(model, tiny(model), budget)
    groups = getattr(stats, "groups", [list(stats)])  # all at once is a plain dictionary, in the order that was asked for
    assert list(map(set, groups)) == list(map(set, run.groups))


def test_hidden_states_between_groups_take_what_is_said(model):
    run = tiny(model, given=1)
    stats = taken(model, run, 1)
    stats[run.groups[1][0]]
    assert sum(state.nbytes for state in stats.walk.states) == run.walking


def test_gradients_take_what_is_said(model):
    run = tiny(model)
    found = fisher_gradients(model, run.of.blocks, random_windows(run.validation, SEQ_LEN), progress=False)
    taken = {block: sum(t.nbytes for t in vars(seen).values() if t is not None) for block, seen in found.items()}
    assert taken == run.sensitivities


def test_a_plan_takes_what_is_said(model):
    run = tiny(model)
    plan = allocate(model, taken(model, run), run.sparsity, "uniform")
    found = sum(p.nbytes for r in plan.values() for p in r.body.parameters())
    neurons = run.of.layers * 3 * run.of.mlp.hidden_size * run.of.itemsize  # widths are whole numbers
    assert found <= run.plan < found + neurons


def test_models_that_no_table_has_are_those_that_were_published():
    for published in OTHERS:
        assert size_of(published.name, 2048).parameters == published.published_params


# A large model


def test_an_8b_model_fits_one_gpu_and_a_70b_six():
    assert all(row(large(name, gpus))[1] < 80e9 for name, gpus in ROWS)
    assert row(large("Llama-3-70B", 5))[1] > 80e9


def test_memory_beside_model_and_plan_does_not_grow_with_depth():
    shallow, deep = (steps(large(layers=layers, given=20 * 10**9)) for layers in (16, 32))
    for a, b in zip(shallow, deep, strict=True):
        if a.name in ("effects", "gradients"):  # these hold the inputs of all layers, of two windows
            assert b.gpu - a.gpu == 16 * large().states(2)
        else:
            assert b.gpu == a.gpu, a.name
        if a.name not in ("load", "save", "fit, refit"):  # these hold the model, or what is chosen for it
            more = large().felt / 2 if a.name == "capture, price" else 0  # prices, of twice as many candidates
            assert b.host - a.host == more, a.name


def test_memory_on_the_host_without_the_plan_does_not_grow_with_depth():
    shallow, deep = (large(layers=layers, given=20 * 10**9) for layers in (16, 32))
    assert shallow.walking == deep.walking and shallow.states(128) == deep.states(128)
    (host,) = (step.host for step in steps(deep) if step.name == "fit, refit")
    assert host == max(deep.walking + 3 * deep.states(128 + 16), 2 * deep.plan)


# Texts


def gb(n: float) -> str:
    return f"{n / 1e9:.0f}"


def minutes(seconds: float) -> str:
    return "< 1" if seconds < 60 else f"{seconds / 60:.0f}"


def test_the_table_of_the_profile_is_what_the_formulas_give():
    head, *lines = re.findall(r"^# (MODEL  .*|\S+B  .*\d)$", PROFILE, re.MULTILINE)
    assert head.split() == ["MODEL", "GPUs", "model", "a", "GPU", "host", "minutes"]
    expected = [
        [name, str(gpus), *map(gb, found[:3]), minutes(found[3])] for name, gpus in ROWS for found in [row(large(name, gpus))]
    ]
    assert [line.split() for line in lines] == expected


def test_what_notebooks_hold_is_what_the_profile_says():
    run, mlp = large(), large().of.mlp
    sizes = defaults(ROOT / "notebooks" / "03_layer_sensitivity.ipynb")
    fits = ladder(mlp, sizes["LOWRANK_SIZES"], [Mean, Linear, LowRank]) + ladder(mlp, sizes["NARROW_SIZES"], [NarrowMLP])
    mlps = run.of.of_kind("mlp") * run.of.itemsize
    said = [
        f"03 holds its fits, {share(fits, mlp):.2f} times the MLPs",
        f"removes a quarter is {run.plan / mlps:.2f} times the MLPs of the 8B, whose MLPs are {gb(mlps)} GB",
    ]
    assert not [piece for piece in said if piece not in COMMENT]
    assert row(run)[1] + share(fits, mlp) * mlps < 80e9


def test_an_8b_model_goes_through_notebook_04_as_the_profile_says():
    run = large(given=memory_budget(re.search(r"MLPREPLACE_MEMORY_BUDGET=(\w+),", COMMENT)[1], []))
    mlps, held = run.of.of_kind("mlp") * run.of.itemsize, 5 * run.plan  # uniform, greedy, nested and its level, knapsack
    in_int8 = (run.weights + run.weights - (mlps - run.plan)) / 2
    assert max(total(step) for step in steps(run)[:5]) + held < 80e9
    assert run.weights + held + run.plan + in_int8 + RESERVE < 80e9  # and the recipe; statistics are gone


def share(families, mlp) -> float:
    """Parameters of all ``families``, over those of the block."""
    return sum(family.n_params(mlp) for family in families) / mlp.n_params


@pytest.mark.parametrize("name", ["04_full_replacement", "05_subfit"])
def test_notebooks_that_are_said_to_hold_no_candidates_fit_none(name):
    assert "fit_all(" not in (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")


def test_the_guide_lists_the_steps_with_what_the_formulas_give():
    run = large()
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", SECTION, re.MULTILINE)[1:]
    expected = [(s.name, f"{gb(total(s))} GB", f"{gb(s.host)} GB", minutes(s.seconds)) for s in steps(run)]
    assert lines == expected


def test_the_guide_says_what_the_formulas_give():
    run, (model, gpu, host, seconds) = large(), row(large())
    said = [
        "was computed, not measured",
        f"peak is {gb(gpu)} GB of the GPU and {gb(host)} GB of the host, the sum {minutes(seconds)} minutes",
        f"Weights take {gb(model)} GB, the plan {gb(run.plan)} GB more",
        f"in {len(run.groups)} groups of up to {gb(run.group)} GB",
        f"of all blocks would take {gb(sum(run.statistics.values()))} GB",
        f"with 48 GB instead of 80 the peak is {gb(row(large(gpu=48e9))[1])} GB",
    ]
    text = " ".join(SECTION.split())
    assert not [piece for piece in said if piece not in text]


def test_the_profile_takes_as_much_text_as_the_estimate():
    common = yaml.safe_load(PROFILE)["common"]
    sizes = (common["CALIBRATION_WINDOWS"], common["VALIDATION_WINDOWS"], common["SEQ_LEN"])
    assert sizes == (Compression.windows, Compression.validation, Compression.seq_len)
