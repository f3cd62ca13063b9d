"""make lab, as a newcomer meets it: a notebook is opened in a browser, run, changed in one cell, and run again."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import BYTES, byte_tokenizer, save_locally
from playwright.sync_api import expect
from running import run
from tiny_models import build

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "02_single_block.ipynb"
MINUTES = 60_000  # of Playwright's milliseconds
CONTEXT = dict(n_positions=256, n_inner=128)


@pytest.fixture
def models(tmp_path):
    """Two tiny models that differ in depth, which the figures show."""
    tokenizer = byte_tokenizer()
    sizes = {"shallow": 6, "deep": 8}
    return {
        name: save_locally(build("gpt2", vocab_size=BYTES, n_layer=n, **CONTEXT), tmp_path / name, tokenizer)
        for name, n in sizes.items()
    }


@pytest.fixture
def prepared(tmp_path, models) -> Path:
    """A copy of the notebook below ``lab/notebooks``: smoke sizes, the first model, no outputs, its own figures."""
    overrides = {"MODEL": models["shallow"], "FIGURES": str(tmp_path / "figures")}
    parameters = run.parameters_for(NOTEBOOK, "smoke", run.read_profile("smoke"), overrides)
    path = tmp_path / "lab" / "notebooks" / NOTEBOOK.name
    path.parent.mkdir(parents=True)
    content = nbformat.read(NOTEBOOK, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(content, path)
    papermill.execute_notebook(str(path), str(path), parameters=parameters, prepare_only=True, progress_bar=False)
    return path


@pytest.fixture
def lab(tmp_path, prepared):
    """Address of a JupyterLab, started as make lab does but without a browser; every setting is its own, none the user's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = f"--no-browser --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token}"
    options += " --allow-root" if os.geteuid() == 0 else ""
    made = ["make", "-n", "lab", f"VENV={sys.prefix}", f"LAB={options}"]
    command = subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    if not Path(shlex.split(command)[0]).exists():
        pytest.skip(f"no {shlex.split(command)[0]}: make setup installs it")
    settings = tmp_path / "settings" / "@jupyterlab"
    for plugin, setting in {  # every cell is in the page, seen or not, and no question about news stands before it
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        path = settings / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting))
    own = {f"JUPYTER_{what}_DIR": str(tmp_path / what.lower()) for what in ("CONFIG", "RUNTIME", "DATA")}
    own |= {f"JUPYTERLAB_{what}_DIR": str(tmp_path / what.lower()) for what in ("SETTINGS", "WORKSPACES")}
    own |= {"IPYTHONDIR": str(tmp_path / "ipython")}
    log = tmp_path / "lab.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            shlex.split(command),
            cwd=prepared.parents[1],
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}").close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, log.read_text()
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        yield f"{address}/lab/tree/{prepared.name}?token={token}"
    finally:
        server.send_signal(signal.SIGTERM)  # which ends its kernels, too
        server.wait(60)


def run_all(page, cells: int, round: int) -> None:
    """Run > Run All Cells, until every cell has been executed for the ``round``-th time without an error."""
    page.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
    page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
    numbers = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent.trim())"
    first, last = cells * (round - 1) + 1, cells * round
    done = f"{numbers}.map(text => Number(text.slice(1, -2))).every((n, i) => n === {first} + i)"
    failed = "document.querySelector('.jp-OutputArea-output[data-mime-type=\"application/vnd.jupyter.error\"]')"
    page.wait_for_function(f"{failed} !== null || {done}", timeout=15 * MINUTES, polling=1000)
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts() == []
    assert page.evaluate(numbers) == [f"[{n}]:" for n in range(first, last + 1)]


def images(page) -> list[str]:
    """Sources of the figures on the page, each drawn."""
    found = page.locator(".jp-NotebookPanel .jp-OutputArea-output img")
    widths = found.evaluate_all("images => images.map(image => image.naturalWidth)")
    assert widths and all(width > 0 for width in widths)
    return found.evaluate_all("images => images.map(image => image.src)")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.bundled
def test_a_newcomer_runs_a_notebook_changes_the_model_and_sees_other_figures(browser, lab, prepared, models, tmp_path):
    code = [c for c in nbformat.read(prepared, as_version=4).cells if c.cell_type == "code"]
    injected = next(i for i, c in enumerate(code) if "injected-parameters" in c.metadata.get("tags", []))
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(lab)
    cells = page.locator(".jp-NotebookPanel .jp-CodeCell")
    expect(cells).to_have_count(len(code), timeout=MINUTES)
    expect(page.locator("#jp-main-statusbar")).to_contain_text(re.compile(r"Python.*\| Idle"), timeout=2 * MINUTES)

    run_all(page, len(code), 1)
    first = images(page)
    drawn = sorted((tmp_path / "figures").glob("*.json"))
    assert len(first) >= len(drawn) > 0
    said = {p: json.loads(p.read_text()) for p in drawn}
    assert {figure["provenance"]["model"]["id"] for figure in said.values()} == {models["shallow"]}

    changed = re.sub(r"(?m)^MODEL = .*$", f'MODEL = "{models["deep"]}"', code[injected].source)
    assert changed != code[injected].source
    editor = cells.nth(injected).locator(".cm-content")
    editor.click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(changed)
    run_all(page, len(code), 2)
    assert len(images(page)) == len(first) and not set(images(page)) & set(first)
    for path, before in said.items():
        after = json.loads(path.read_text())
        assert after["provenance"]["model"]["id"] == models["deep"]
        assert after["rows"] != before["rows"]
    page.context.close()
