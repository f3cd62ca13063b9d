"""What a number was made from: the record that stands beside every figure."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import random
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor

from ..models.blocks import NotApplicable, find_blocks
from ..models.loading import weight_hashes
from ..runtime.files import ROOT
from ..runtime.fingerprint import fingerprint
from ..runtime.usage import peak_memory_mb
from ..texts.windows import Text, text_name

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pandas", "matplotlib", "papermill")
NOTEBOOKS = ROOT / "notebooks"
# what makes numbers, beside the notebook
CODE = ("mlpreplace", "notebooks/profiles", "constraints.txt", "assets.txt", "assets-gemma.txt")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _code_cells(notebook: str) -> list[str]:
    """Sources of the code cells in a notebook's text, but for the one that papermill injects."""
    cells = [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]
    return ["".join(c["source"]) for c in cells if "injected-parameters" not in c["metadata"].get("tags", [])]


def _without_imports(cell: str) -> str:
    """The source of a cell without the import statements at its top level and without blank space at both ends."""
    try:
        statements = ast.parse(cell).body
    except SyntaxError:  # a magic or shell command of IPython
        return cell
    lines = cell.encode().splitlines(keepends=True)  # the syntax tree counts columns in bytes
    for node in reversed(statements):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            first, last = node.lineno - 1, node.end_lineno
            rest = lines[first][: node.col_offset] + lines[last - 1][node.end_col_offset :]
            lines[first:last] = [rest] if rest.strip(b"; \t\r\n") else []
    return b"".join(lines).decode().strip()


def code_cells_hash(notebook: str) -> str:
    """sha256 of the code cells in a notebook's text; outputs and the cell that papermill injects do not count.

    Import statements at the top level of a cell do not count either: a name that moves within the package, or that is imported
    under another name, leaves the hash as it is. Comments and all other code count.
    """
    code = filter(None, map(_without_imports, _code_cells(notebook)))
    return hashlib.sha256("\n\0".join(code).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # papermill is not part of a plain install
        return None


def _instructions() -> str:
    """What times depend on beside the number of threads: the widest vectors that PyTorch's kernels use, and int8 products."""
    return torch.backends.cpu.get_cpu_capability() + (" VNNI" if torch.cpu._is_vnni_supported() else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def git_state(notebook: str | None = None) -> dict:
    """The commit, and whether it is dirty: the package, pins, profiles or this notebook's code cells differ from it.

    Figures and the outputs of cells may differ. The import statements of the notebook may not. Both are None for a tree without
    git, also where it lies in a repository of something else.
    """
    top, commit = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    if commit is None or top is None or not ROOT.samefile(top.rstrip("\n")):
        return {"commit": None, "dirty": None}
    dirty = bool(_git("status", "--porcelain", "--", *CODE))
    if notebook:
        committed = _git("show", f"HEAD:notebooks/{notebook}.ipynb")
        current = (NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8")
        dirty = dirty or committed is None or _code_cells(committed) != _code_cells(current)
    return {"commit": commit.strip(), "dirty": dirty}


def _bos(ids: Tensor, known: int | None) -> int | None:
    """``known``, the BOS token of a model, where all windows [n, seq_len] begin with it."""
    return known if known is not None and bool((ids[:, 0] == known).all()) else None


class Run:
    """The record of one notebook run, started in its first cell.

    Args:
        notebook: its name without suffix, "02_single_block".
        parameters: the values the run was started with (profile, seed, sizes).
    """

    def __init__(self, notebook: str, parameters: Mapping[str, object]):
        path = NOTEBOOKS / f"{notebook}.ipynb"
        if not path.exists():
            raise FileNotFoundError(f"No notebook {notebook!r} in {NOTEBOOKS.name}/.")
        self.notebook, self.parameters, self.start = notebook, dict(parameters), time.time()
        self.facts: dict[str, object] = {"left_out": {}}
        self.bos: int | None = None  # of the model, as its configuration says
        self.code = code_cells_hash(path.read_text(encoding="utf-8"))
        self.git = git_state(notebook)

    def uses(self, model=None, **windows: tuple[Text, Tensor]) -> None:
        """Note the model and the token windows, as name=(text or mixture, windows).

        Of the model the record holds the hash of its weights as they are now, wherever they came from. Where its MLPs have no
        neurons of their own, it also says which family takes the place of those that keep some. Of windows it says
        with which BOS token of the model all of them begin, None where they do not.
        """
        if model is not None:
            if opaque := [block for block in find_blocks(model) if block.opaque]:
                why = f"{len(opaque)} of its MLP blocks have no neurons of their own: a TwoLayerMLP of the size asked for, "
                why += "solved on the sampled windows, stands in for either there"
                self._leave_out("NarrowMLP and NarrowPlusLinear", why)
            self.facts["model"] = {**model.source.as_dict(), "weights": fingerprint(weight_hashes(model))}
            self.facts["device"] = ", ".join(dict.fromkeys(str(p.device) for p in model.parameters()))
            self.facts["dtype"] = ", ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in model.parameters()))
            self.bos = getattr(model.config.get_text_config(), "bos_token_id", None)
        texts = self.facts.setdefault("texts", {})
        for name, (text, ids) in windows.items():
            texts[name] = {
                "text": text_name(text),
                "windows": ids.shape[0],
                "sequence_length": ids.shape[1],
                "tokens": ids.numel(),
                "bos": _bos(ids, self.bos),
                "hash": fingerprint(ids),
            }

    @contextmanager
    def where_applicable(self, what: str) -> Iterator[None]:
        """Where a model does not allow ``what``, leave it out and say so: in print and in every figure from then on."""
        try:
            yield
        except NotApplicable as error:
            self._leave_out(what, str(error))

    def _leave_out(self, what: str, why: str) -> None:
        self.facts["left_out"][what] = why
        print(f"Left out: {what}. {why}")

    def record(self) -> dict:
        """Everything needed to make the numbers again, as JSON."""
        return {
            "notebook": self.notebook,
            "code_cells_sha256": self.code,
            "git": self.git,
            "parameters": self.parameters,
            **self.facts,
            "packages": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "machine": {"processor": platform.machine(), "instructions": _instructions(), "threads": torch.get_num_threads()},
            "wall_seconds": round(time.time() - self.start, 1),
            "peak_memory_mb": round(peak_memory_mb()),
        }
