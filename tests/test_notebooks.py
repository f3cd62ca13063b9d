"""The notebooks as a reader meets them: they run from the top, and what is committed belongs to the code beside it."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import yaml
from conftest import BYTES, byte_tokenizer, save_locally
from forked import launch_kernel
from jupyter_client.provisioning import local_provisioner
from running import FOLDER, NOTEBOOKS, STUDIES, run
from tiny_models import build

from mlpreplace.reporting.record import code_cells_hash

ROOT = Path(__file__).resolve().parents[1]
COMMON = {"PROFILE", "MODEL", "DEVICE", "SEED", "FIGURES"}
PROVENANCE = {"notebook", "code_cells_sha256", "git", "parameters", "model", "device", "dtype", "packages", "wall_seconds"}

CONTEXT = 256  # windows, and what is decoded behind them
EXPERTS = "NarrowMLP and NarrowPlusLinear"
SMALL = 'MODEL = "small"'  # a study trains its own model
ANY_MODEL = {  # name of a tiny model: its sizes; {notebook: what is left out}; figures that are not drawn
    "gpt2": (dict(n_positions=CONTEXT, n_layer=6, n_inner=128), {}, set()),
    "gemma2": (
        dict(max_position_embeddings=CONTEXT, num_hidden_layers=6, intermediate_size=128, layer_types=None),
        {"05_subfit": {"replaceme"}},  # a norm stands behind the MLP
        set(),
    ),
    "mixtral": (
        dict(max_position_embeddings=CONTEXT, num_hidden_layers=6, intermediate_size=64),
        {
            "01_parameter_share": {EXPERTS},
            "02_single_block": {EXPERTS, "the choice of neurons (02_selection)", "a NarrowMLP by hand"},
            "03_layer_sensitivity": {EXPERTS},
            "04_full_replacement": {EXPERTS, "nested"},
            "05_subfit": {EXPERTS, "replaceme", "svd_llm"},
            "06_ff_merging": {EXPERTS, "merging of the language model"},
        },
        {"02_selection"},
    ),
}
SMOKE = yaml.safe_load((FOLDER / "profiles" / "smoke.yaml").read_text())

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: name_of(p))


def name_of(path: Path) -> str:
    """As a Run and a profile call it: "03_layer_sensitivity", "studies/04_calibration"."""
    return str(path.relative_to(FOLDER).with_suffix(""))


def drawn_by(path: Path, folder: Path) -> dict[str, dict]:
    """{name: figure} of those in ``folder`` that a notebook drew."""
    figures = {p: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    return {p: figure for p, figure in figures.items() if figure["provenance"]["notebook"] == name_of(path)}


def code_cells(path: Path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def check_figure(path: Path) -> dict:
    figure = json.loads(path.read_text())
    assert figure["claim"].endswith(".") and figure["rows"]
    assert set(figure["provenance"]) >= PROVENANCE
    assert path.with_suffix(".png").stat().st_size > 5000
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    return figure


@pytest.fixture
def forked_kernels(monkeypatch):
    """Kernels that need not import the package; those of the kill tests are started as anywhere."""
    monkeypatch.setattr(local_provisioner, "launch_kernel", launch_kernel)


@every_notebook
def test_layout(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 40
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and re.match(r"# .*\?\n", first.source), "the title is a question"
    assert "Try your own" in "".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    code = "\n".join(c.source for c in code_cells(path))
    assert "register_forward" not in code
    assert max(map(len, code.splitlines())) <= 101, "a reader's screen ends here"
    nodes = [node for node in ast.walk(ast.parse(re.sub(r"^%.*$", "", code, flags=re.MULTILINE)))]
    assert not any(isinstance(node, ast.ClassDef) for node in nodes)
    assert all(node.end_lineno - node.lineno < 5 for node in nodes if isinstance(node, ast.FunctionDef))
    assert "%watermark" in code
    tagged = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert set(papermill.inspect_notebook(str(path))) >= COMMON


@every_notebook
def test_committed_outputs(path):
    cells = code_cells(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "run from the top: make notebooks"
    kinds = {o.output_type for c in cells for o in c.outputs}
    assert "error" not in kinds and "display_data" in kinds


@every_notebook
def test_committed_figures_are_of_this_code(path):
    """A figure drawn by other cells than the ones beside it is stale: make notebooks."""
    expected = code_cells_hash(path.read_text())
    figures = drawn_by(path, ROOT / "figures")
    assert figures and all(figure.name.startswith(path.stem[:3]) for figure in figures)
    for figure in figures:
        provenance = check_figure(figure)["provenance"]
        assert provenance["code_cells_sha256"] == expected, figure.name
        assert provenance["git"]["dirty"] is False, figure.name
        assert provenance["parameters"]["PROFILE"] == "cpu", figure.name


@pytest.mark.notebooks
@pytest.mark.bundled
@every_notebook
def test_smoke(path, tmp_path, capsys, forked_kernels):
    """make smoke, one notebook: the real model at its smallest size (a study: a tiny one), figures in a folder of their own."""
    committed = {p: p.read_bytes() for p in (ROOT / "figures").iterdir()}
    copies, arguments = ROOT / "executed" / "smoke", ["--profile", "smoke", "--only", path.stem]
    of_language = path in STUDIES and SMALL not in code_cells(path)[0].source
    if of_language:  # studies take minutes on the real model, and 16 GB of memory
        model = build("llama", num_hidden_layers=6, vocab_size=BYTES, max_position_embeddings=CONTEXT)
        folder = save_locally(model, tmp_path / "tiny-llama", byte_tokenizer())
        arguments += ["--studies", "-p", "MODEL", folder]
        copies = ROOT / run.copies_folder("smoke", folder)
    elif path in STUDIES:
        arguments += ["--studies"]
    for left in drawn_by(path, copies / "figures"):  # by an earlier version of the notebook
        left.unlink()
    assert run.main(arguments) == 0, capsys.readouterr().err
    assert all(c.execution_count for c in code_cells(copies / path.relative_to(FOLDER)))
    drawn = drawn_by(path, copies / "figures")
    assert {p.stem for p in drawn} == {p.stem for p in drawn_by(path, ROOT / "figures")}
    for figure in drawn:
        assert check_figure(figure)["provenance"]["parameters"]["PROFILE"] == "smoke"
    assert {p: p.read_bytes() for p in (ROOT / "figures").iterdir()} == committed, "smoke must not touch figures/"
    if of_language:  # the next run's model is another folder
        shutil.rmtree(copies)


@pytest.mark.notebooks
@pytest.mark.bundled
@pytest.mark.parametrize(
    ("name", "only"),
    [
        ("mixtral", "01 02 03 04 05 06"),  # of which most is left out
        ("gemma2", "04 05"),
        ("gpt2", "02 06"),
        *(pytest.param(name, "01 02 03 04 05 06", marks=pytest.mark.slow) for name in ("gemma2", "gpt2")),
    ],
)
def test_any_model(name, only, tmp_path, capsys, forked_kernels):
    """MODEL is all that changes: sizes follow the model, and what it is not made for is left out and named."""
    committed = {p: p.read_bytes() for p in (ROOT / "figures").rglob("*")}
    sizes, left_out, not_drawn = ANY_MODEL[name]
    model = build(name, vocab_size=BYTES, **sizes)
    folder = save_locally(model, tmp_path / f"tiny-{name}", byte_tokenizer())
    copies = ROOT / run.copies_folder("smoke", folder)
    arguments = ["--profile", "smoke", "-p", "MODEL", folder, "--only", *only.split()]
    assert run.main(arguments) == 0, capsys.readouterr().err
    for path in (path for path in NOTEBOOKS if path.stem.startswith(tuple(only.split())) and path not in STUDIES):
        drawn = drawn_by(path, copies / "figures")
        assert {p.stem for p in drawn} == {p.stem for p in drawn_by(path, ROOT / "figures")} - not_drawn
        printed = "".join(o.get("text", "") for c in code_cells(copies / path.name) for o in c.outputs)
        said = [line for line in printed.splitlines() if line.startswith("Left out: ")]
        expected = left_out.get(path.stem, set())
        assert {line.removeprefix("Left out: ").split(".")[0] for line in said} == expected, path.stem
        for figure in drawn:
            provenance = check_figure(figure)["provenance"]
            assert provenance["model"]["id"] == folder
            assert set(provenance["left_out"]) <= expected  # what comes after a figure is not in it yet
    if "05" in only:
        rows = pd.DataFrame(json.loads((copies / "figures" / "05_speed.json").read_text())["rows"])
        assert set(rows["method"]) == {"dense", *SMOKE["05_subfit"]["COMPARED"]} - left_out.get("05_subfit", set())
    assert {p: p.read_bytes() for p in (ROOT / "figures").rglob("*")} == committed, "another model must not touch figures/"
    shutil.rmtree(copies)
