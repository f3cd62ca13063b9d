"""A checkout for tests of make: the programs are stubs, so that nothing is installed, downloaded or run."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("Makefile", "make.py", "assets.txt", "assets-gemma.txt", "pyproject.toml", "constraints.txt")
STUB = """#!{python} -IS
import runpy, shutil, sys
from pathlib import Path

program, task, *_ = sys.argv
with open({log!r}, "a") as log:
    if task not in ("make.py", "-c"):
        log.write(repr(sys.argv[1:]) + "\\n")
if task == "make.py":
    sys.executable, sys.argv = str(Path(program).absolute()), sys.argv[1:]
    runpy.run_path(task, run_name="__main__")
elif task == "-c":
    exec(sys.argv[2])
elif sys.argv[1:3] == ["-m", "venv"]:
    (made := Path(sys.argv[3]) / "bin" / "python").parent.mkdir(parents=True)
    shutil.copy(program, made)
"""

spec = importlib.util.spec_from_file_location("make", ROOT / "make.py")
make_py = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_py)


class Checkout:
    """A copy of what make needs in a folder with an odd name, whose Python and Jupyter note what they are called with."""

    def __init__(self, folder: Path):
        self.root, self.log = folder / "it's my checkout", folder / "log"
        self.root.mkdir()
        for name in COPIED:
            shutil.copy(ROOT / name, self.root)
        self.stub(self.root / ".venv" / "bin" / "python")
        (self.root / ".venv" / make_py.READY).touch()
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "MLPREPLACE_CACHE": str(folder / "a cache")}
        self.environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}

    def stub(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB.format(python=sys.executable, log=str(self.log)))
        path.chmod(0o755)
        return path

    def make(self, *arguments: str, status: int = 0, **environment: str) -> str:
        """What make printed."""
        done = subprocess.run(
            ["make", *arguments], cwd=self.root, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def calls(self) -> list[list[str]]:
        """The arguments of each call so far; those of make.py are carried out and do not count."""
        return [ast.literal_eval(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture(name="checkout")
def a_checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture(name="ready")
def a_ready_checkout(checkout) -> Checkout:
    """With all assets in its cache."""
    folder = Path(checkout.environment["MLPREPLACE_CACHE"]) / "assets"
    folder.mkdir(parents=True)
    for name, version in re.findall(r"^([\w-]+)==(\S+)", (ROOT / "assets.txt").read_text(), re.MULTILINE):
        (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").touch()
    (folder / ".complete").touch()
    return checkout


def kept(folder: Path) -> Path:
    (folder / "mine.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "mine.txt").write_text("mine")
    return folder / "mine.txt"
