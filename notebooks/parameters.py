"""Parameters of notebooks: values of profiles and of the command line, read as the kind of value that the notebook has."""

from __future__ import annotations

import ast
import hashlib
import math
import os
import re
from functools import cache
from pathlib import Path

import nbformat
import yaml

HERE = Path(__file__).resolve().parent
PROFILES = HERE / "profiles"
PLACES = re.compile(r"(\w+_)?(MODEL|TEXT)|CHOOSE_BY|IMAGES|PAIRS")  # parameters that may be a file or folder
PATH = re.compile(r"[./~\\].*|.*\\.*|[^:]*/.*/.*|.*/|.*\.(txt|jsonl|gguf|safetensors)")  # what no hub calls a model or a text


class Refused(Exception):
    """The request cannot be carried out; the message says what to change."""


def name_of(notebook: Path) -> str:
    """As a profile calls it: "03_layer_sensitivity", "studies/04_calibration"."""
    return notebook.relative_to(HERE).with_suffix("").as_posix()


@cache
def defaults(notebook: Path) -> dict[str, object]:
    """{parameter: value} of the cell tagged "parameters", which holds literals and quotients of such."""
    cells = nbformat.read(notebook, as_version=4).cells
    (source,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    return {node.targets[0].id: _literal(node.value) for node in ast.parse(source).body}


def _literal(node: ast.expr):
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):  # 1 / 6
        return _literal(node.left) / _literal(node.right)
    return ast.literal_eval(node)


# Profiles


def read_profile(name: str) -> dict[str, dict]:
    """{notebook or "common": {parameter: value as it is written}} of profiles/<name>.yaml; "cpu" is the notebooks themselves."""
    if name == "cpu":
        return {}
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in known:
        raise Refused(f"Unknown profile {name!r}; known are {', '.join(['cpu', *known])}.")
    path = PROFILES / f"{name}.yaml"
    try:
        profile = _yaml(path.read_text(encoding="utf-8"))
    except (Refused, UnicodeDecodeError) as error:
        raise Refused(f"profiles/{path.name}: {error}") from error
    if not isinstance(profile, dict) or not all(isinstance(section, dict) for section in profile.values()):
        raise Refused(f"profiles/{path.name}: expected sections of PARAMETER: value.")
    return profile


def _yaml(text: str):
    """``text`` with every scalar as it is written: YAML takes 1e-3 for a string, and the model "no" for False."""
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise Refused(f"no YAML: {' '.join(str(error).split())}") from error


def parameters_for(notebook: Path, profile_name: str, profile: dict[str, dict], overrides: dict[str, str]) -> dict:
    """The values to inject into one notebook.

    Raises Refused for a notebook the profile forgot, for a parameter name that the notebook does not have, and for a value of
    another kind than the notebook's own. A value for every notebook ("common", and the command line) is given to those that
    have the parameter.
    """
    name, known = name_of(notebook), defaults(notebook)
    given = {key: text for key, text in overrides.items() if key in known}
    if profile:
        if name not in profile:
            raise Refused(f"Profile {profile_name!r} has no section {name!r}; add one, it may be empty: {{}}.")
        if unknown := set(profile[name]) - set(known):
            raise Refused(f"Profile {profile_name!r} gives {name} unknown parameters {sorted(unknown)}; it has {sorted(known)}.")
        shared = {key: text for key, text in profile.get("common", {}).items() if key in known}
        given = {**shared, **profile[name], **given}
    found = {}
    for key, text in given.items():
        try:
            found[key] = converted(text, known[key], may_be_mapping=key.endswith("TEXT"))
            if key in overrides and found[key] != known[key] and (PLACES.fullmatch(key) or key == "FIGURES"):
                found[key] = located(found[key], must_exist=key != "FIGURES")
        except Refused as error:
            raise Refused(f"{key} of {name}: {error}") from error
    return found


def check_names(names: set[str], where: str, chosen: list[Path], every: list[Path]) -> None:
    """Raise Refused for a parameter that none of the ``chosen`` notebooks has; ``every`` are those that there are."""
    known = {name for notebook in chosen for name in defaults(notebook)}
    for name in sorted(names - known):
        elsewhere = [name_of(notebook) for notebook in every if name in defaults(notebook)]
        if elsewhere:
            raise Refused(f"{where}: {name} belongs to {', '.join(elsewhere)}, not to {', '.join(map(name_of, chosen))}.")
        raise Refused(f"{where}: unknown parameters {sorted(names - known)}; known are {sorted(known)}.")


# Values


def converted(text, default, *, may_be_mapping: bool = False):
    """``text``, or a list or mapping of such, as a value of the kind of ``default``.

    Args:
        text: as it was typed; of a profile what _yaml made of it.
        may_be_mapping: a text is a name or {name: share}.
    """
    if isinstance(default, str) and may_be_mapping and isinstance(text, str) and text.lstrip().startswith("{"):
        text = _yaml(text)
    if isinstance(default, str) and may_be_mapping and isinstance(text, dict) and text:
        return {name: converted(share, 1.0) for name, share in text.items()}
    if isinstance(default, list):
        items = _yaml(text) if isinstance(text, str) else text
        if not isinstance(items, list):
            raise Refused(f"expected a list as {default}, got {text!r}.")
        return [converted(item, default[0]) for item in items]
    try:
        return _scalar(text, type(default))
    except (ValueError, TypeError, KeyError):
        kind = {str: "a name", int: "a whole number", float: "a number", bool: "true or false"}[type(default)]
        raise Refused(f"expected {kind} as {default!r}, got {text!r}.") from None


def _scalar(text: str, kind: type):
    if not isinstance(text, str) or not text.strip():
        raise TypeError
    if kind is bool:
        return {"true": True, "false": False}[text.strip().lower()]
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError
    return int(text) if kind is float and re.fullmatch(r"[+-]?\d+", text.strip()) else value


def located(value, *, must_exist: bool = True):
    """A path the user typed from where they stand, made absolute: notebooks run in their own folder.

    Raises Refused for what can only be a path, leads nowhere and ``must_exist``.
    """
    if isinstance(value, dict):
        return {located(name): share for name, share in value.items()}
    if isinstance(value, list):
        return [located(item) for item in value]
    path = os.path.expanduser(value)
    if value.startswith("bundled/"):
        return value
    if os.path.exists(path):
        return str(Path(path).resolve())
    if must_exist and PATH.fullmatch(value):
        raise Refused(f"{value!r} is not there, seen from {Path.cwd()}.")
    return path


def folder_name(model: str) -> str:
    """What folders of a run on ``model`` are called; no two models share a name.

    "owner--name" for a hub id, which holds no "--" itself; the last part and a hash of the whole path for a local folder.
    """
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        return model.replace("/", "--")
    last = re.sub(r"[^\w.-]", "-", Path(model).name)[:100]
    return f"{last}-{hashlib.sha256(os.fsencode(model)).hexdigest()[:8]}"
