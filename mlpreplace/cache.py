"""Results that cost minutes are kept: safetensors files named by everything the result depends on.

A key covers the arguments (weights and tokens by content), the code that computes (a function's module and what it
imports from the package) and the library versions, so a hit is the result and a stale one cannot be met. Files appear
whole or not at all; delete the folder at any time.
"""

from __future__ import annotations

import ast
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import isfunction
from pathlib import Path
from types import CodeType

import numpy as np
import scipy
import torch
import transformers
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .assets import cache_dir

PACKAGE = Path(__file__).parent
_PARSING = threading.Lock()  # Python 3.11 counts the depth of ast.parse for all threads together, and fails (gh-106905)


@cache
def code_hash(module: str) -> str:
    """Hash of a module of this package and of every module of the package it imports, directly or not.

    What runs is hashed, not how it is laid out: comments and docstrings may change.
    """
    todo, seen = [module], {}
    while todo:
        name = todo.pop()
        path = next((p for p in (PACKAGE / f"{name}.py", PACKAGE / name / "__init__.py") if p.exists()), None)
        if name in seen or path is None:
            continue
        with _PARSING:
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = path.relative_to(PACKAGE).parents[node.level - 1]  # the folder that the dots stand for
                modules = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
                todo += [(above / m).as_posix() for m in modules]
            body = getattr(node, "body", None)
            if isinstance(body, list):  # a text that stands alone does nothing
                node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        seen[name] = ast.dump(tree)
    return xxhash.xxh3_128_hexdigest("\0".join(seen[name] for name in sorted(seen)).encode())


def _behaviour(kind: type) -> list:
    """What the objects of a class do: the code of the class's module in this package; of any other class its functions."""
    found = []
    for base in kind.__mro__:
        package, _, module = base.__module__.partition(".")
        if package == PACKAGE.name:
            found.append(code_hash(module.replace(".", "/")))
        elif base.__module__ != "builtins":
            found += [(name, _instructions(f.__code__)) for name, f in sorted(vars(base).items()) if isfunction(f)]
    return found


def _instructions(code: CodeType) -> list:
    constants = [_instructions(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


def fingerprint(*values) -> str:
    """Hash of values by content: numbers, strings, containers, tensors, dataclasses and modules.

    A module is its configuration, parameters and buffers, the type of device it is on, and the ``cache_key`` of what is
    within that has one.
    """
    digest = xxhash.xxh3_128()
    for value in values:
        _update(digest, value)
    return digest.hexdigest()


def _update(digest, value) -> None:
    digest.update(f"{type(value).__name__}:".encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b"")
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value))
    elif isinstance(value, nn.Module):
        _update(digest, getattr(getattr(value, "config", None), "to_dict", dict)())
        for name, tensor in value.state_dict(keep_vars=True).items():
            digest.update(f"{name}@{tensor.device.type}".encode())  # another device adds up in another order
            _update(digest, tensor)
        for name, module in value.named_modules():
            if hasattr(module, "cache_key"):
                _update(digest, (name, module.cache_key()))
    elif isinstance(value, type):
        _update(digest, (value.__qualname__, _behaviour(value)))
    elif hasattr(value, "cache_key"):
        _update(digest, value.cache_key())
    elif is_dataclass(value):
        _update(digest, {f.name: getattr(value, f.name) for f in fields(value)})
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _update(digest, key)
            _update(digest, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(digest, item)
    elif isinstance(value, (set, frozenset)):
        _update(digest, sorted(value))
    elif value is None or isinstance(value, (str, int, float, bool, torch.dtype)):
        digest.update(repr(value).encode())
    else:
        raise TypeError(f"No fingerprint for a {type(value).__name__}.")
    digest.update(b";")


class Entry:
    """One cached result: a dict of tensors in a file named by its key."""

    def __init__(self, module: str, name: str, *key):
        versions = [library.__version__ for library in (np, scipy, torch, transformers)]
        self.path = cache_dir() / "results" / f"{name}-{fingerprint(code_hash(module), versions, *key)}.safetensors"

    def load(self) -> dict[str, Tensor] | None:
        """The stored tensors, or None where there are none that are whole."""
        try:
            return load_file(self.path)
        except (FileNotFoundError, SafetensorError):
            return None

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Store ``tensors``; where that fails, nothing is left behind and OSError says so."""
        try:
            write_atomically(self.path, lambda path: save_file({k: t.contiguous() for k, t in tensors.items()}, path))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"A result could not be kept in {self.path.parent} ({error}). Make room (make clean empties it) or name another "
                "folder by MLPREPLACE_CACHE, and run again: what is there already is taken from there."
            ) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``path`` when the block ends well and leaves nothing behind when it does not.

    Raises OSError when ``path`` is there by then and not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        yield whole
        os.rename(whole, path)


def write_atomically(path: Path, write) -> None:
    """Call ``write(temporary path)`` and rename: ``path`` is the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # in a folder of its own: what a killed process leaves there is no result, figure or anything else by its ending
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        scratch = Path(folder) / path.name
        write(scratch)
        os.replace(scratch, path)
