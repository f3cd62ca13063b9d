"""The newcomer's path in a real browser: JupyterLab, notebook 02 from top to bottom, another model, run again."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import BYTES, byte_tokenizer, save_locally
from tiny_models import build

from mlpreplace.assets import cache_dir

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "02_single_block"
MINUTES = 10  # at most, for a notebook at its smallest size on a busy machine


@pytest.fixture
def models(tmp_path) -> list[str]:
    """Folders of a tiny Llama and of a tiny GPT-2."""
    if not (cache_dir() / "assets" / ".complete").exists():
        pytest.skip("the bundled texts are not there: make setup")
    llama = build("llama", vocab_size=BYTES, max_position_embeddings=256)
    gpt2 = build("gpt2", vocab_size=BYTES, n_positions=256, n_layer=4, n_inner=128)
    return [save_locally(m, tmp_path / name, byte_tokenizer()) for name, m in (("tiny-llama", llama), ("tiny-gpt2", gpt2))]


@pytest.fixture
def notebook(tmp_path) -> Path:
    """A copy of the notebook as it is committed, in a folder of its own."""
    (tmp_path / "notebooks").mkdir()
    return Path(shutil.copy(ROOT / "notebooks" / f"{NOTEBOOK}.ipynb", tmp_path / "notebooks"))


@pytest.fixture
def lab(notebook):
    """The address of a JupyterLab on the notebook's folder, started as make lab starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "jupyter", "lab", f"--notebook-dir={notebook.parent}", "--no-browser"]
    command += [f"--port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=for-this-test", "--allow-root"]
    with (notebook.parent.parent / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?token=for-this-test"
        finally:
            server.terminate()
            server.wait(timeout=60)


def parameters(**changed) -> str:
    """A parameters cell at the smallest size, as one would type it."""
    profile = yaml.safe_load((ROOT / "notebooks" / "profiles" / "smoke.yaml").read_text())
    (cell,) = (c for c in code_cells(ROOT / "notebooks" / f"{NOTEBOOK}.ipynb") if "parameters" in c.metadata.get("tags", []))
    values = profile["common"] | profile[NOTEBOOK] | changed
    known = {line.partition(" = ")[0] for line in cell.source.splitlines()}
    return cell.source + "".join(f"\n{name} = {value!r}" for name, value in values.items() if name in known)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def run_all(tab, notebook: Path, typed: str) -> list:
    """Type a new parameters cell, restart, run everything; the executed code cells, once all have run and are saved."""
    editor = tab.locator(".jp-CodeCell .cm-content").first
    editor.click()
    tab.keyboard.press("Control+A")
    tab.keyboard.insert_text(typed)
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_text("Restart Kernel and Run All Cells").click()
    tab.locator(".jp-Dialog button.jp-mod-warn, .jp-Dialog button.jp-mod-accept").last.click()
    deadline = time.monotonic() + 60 * MINUTES
    while time.monotonic() < deadline:
        time.sleep(3)
        tab.keyboard.press("Control+S")
        cells = code_cells(notebook)
        if errors := [o for c in cells for o in c.outputs if o.output_type == "error"]:
            raise AssertionError("\n".join(errors[0].traceback))
        if cells[0].source == typed and [c.execution_count for c in cells] == list(range(1, len(cells) + 1)):
            return cells
    raise AssertionError(f"not all cells ran within {MINUTES} minutes: {[c.execution_count for c in code_cells(notebook)]}")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.bundled
def test_a_newcomer_runs_a_notebook_and_runs_it_again_on_another_model(lab, notebook, models, chromium, tmp_path):
    figures, shown, rows = tmp_path / "figures", [], []
    tab = chromium.new_page(viewport={"width": 1400, "height": 1000})
    for _ in range(60):  # until the server listens
        try:
            tab.goto(lab)
            break
        except Exception:
            time.sleep(1)
    tab.wait_for_selector(".jp-Notebook .jp-CodeCell .cm-content", timeout=120_000)
    for model in models:
        cells = run_all(tab, notebook, parameters(MODEL=model, FIGURES=str(figures)))
        shown.append([o.data["image/png"] for c in cells for o in c.outputs if "image/png" in o.get("data", {})])
        figure = json.loads((figures / "02_error_vs_parameters.json").read_text())
        assert figure["provenance"]["model"]["id"] == model
        rows.append(figure["rows"])
    assert len(shown[0]) == len(shown[1]) >= 7 and not set(shown[0]) & set(shown[1]), "every figure is a new one"
    assert rows[0] != rows[1]
    tab.locator(".jp-OutputArea img").first.scroll_into_view_if_needed()
    assert tab.evaluate("[...document.querySelectorAll('.jp-OutputArea img')].some(image => image.naturalWidth > 0)")
