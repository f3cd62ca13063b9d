"""Nothing that runs code from a file: where the package loads, starts or evaluates something is listed here, and nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [*ROOT.glob("mlpreplace/**/*.py"), *ROOT.glob("notebooks/*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("paper/*.py")]
NOTEBOOKS = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/studies/*.ipynb")]
RISKY = {  # what may run code, load a pickle or start a program
    "from_pretrained": r"\bfrom_pretrained\(",
    "torch.load": r"\btorch\.load\b",
    "pickle": r"\b(c?pickle|dill|cloudpickle|joblib\.load|shelve|marshal)\b",
    "numpy.load": r"allow_pickle\s*=\s*True",
    "eval": r"(?<![.\w])eval\(",
    "exec": r"(?<![.\w])exec\(",
    "yaml": r"\byaml\.(load|unsafe_load|full_load)\(",
    "subprocess": r"\b(subprocess|os\.system|os\.popen|os\.exec\w+|shell\s*=\s*True)\b",
    "remote code": r"\btrust_remote_code\s*=\s*(?!False)",
    "hub code": r"\b(torch\.hub|hf_hub_download|snapshot_download|get_class_from_dynamic_module)\b",
}
ALLOWED = {
    ("mlpreplace/models/checkpoints.py", "from_pretrained"),
    ("notebooks/06_ff_merging.ipynb", "from_pretrained"),
    ("notebooks/parameters.py", "yaml"),  # with BaseLoader, which makes strings, lists and dicts alone
    ("mlpreplace/reporting/record.py", "subprocess"),
}


def code_of(path: Path) -> str:
    """The source without comments, docstrings and other text."""
    if path.suffix == ".ipynb":
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        source = re.sub(r"(?m)^[%!].*$", "", "\n".join(cells))  # magics of IPython
    else:
        source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("what", RISKY)
def test_what_may_run_code_is_only_where_it_is_listed(what):
    found = {p.relative_to(ROOT).as_posix() for p in (*PROGRAMS, *NOTEBOOKS) if re.search(RISKY[what], code_of(p))}
    assert found == {path for path, of in ALLOWED if of == what}


def calls(path: Path, name: str) -> list[ast.Call]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", getattr(n.func, "id", "")) == name]


def test_what_is_loaded_from_a_hub_or_a_folder_never_brings_code():
    """A configuration of a class that is known needs no such keyword: it is read as json."""
    for path in PROGRAMS:
        for call in calls(path, "from_pretrained"):
            refused = any(k.arg == "trust_remote_code" and getattr(k.value, "value", None) is False for k in call.keywords)
            assert refused or re.search("(?i)config", ast.unparse(call.func)), f"{path.name}: {ast.unparse(call)}"
