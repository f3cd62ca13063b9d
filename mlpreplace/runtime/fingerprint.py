"""Hashes by content: of values, of modules, and of the code that computes with them."""

from __future__ import annotations

import ast
import threading
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import isfunction
from pathlib import Path
from types import CodeType

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

PACKAGE = Path(__file__).resolve().parents[1]
_PARSING = threading.Lock()  # Python 3.11 counts the depth of ast.parse for all threads together, and fails (gh-106905)


@cache
def code_hash(module_path: str) -> str:
    """Hash of a module of this package and of every module of the package it imports, directly or not.

    Comments and docstrings are left out, since they change no result.

    Args:
        module_path: in the package, "statistics/moments".

    Raises:
        ValueError: there is no such module. A key that covers no code would let results go stale.
    """
    if _path(module_path) is None:
        raise ValueError(f"{PACKAGE.name} has no module {module_path!r}: expected a path in it, such as 'statistics/moments'.")
    todo, seen = [module_path], {}
    while todo:
        name = todo.pop()
        if name in seen or (path := _path(name)) is None:
            continue
        with _PARSING:
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = path.relative_to(PACKAGE).parents[node.level - 1]  # the folder that the dots stand for
                modules = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
                todo += [(above / m).as_posix() for m in modules]
            body = getattr(node, "body", None)
            if isinstance(body, list):  # a docstring is an expression that is a constant, and does nothing
                node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        seen[name] = ast.dump(tree)
    return xxhash.xxh3_128_hexdigest("\0".join(seen[name] for name in sorted(seen)).encode())


def _path(module_path: str) -> Path | None:
    found = (path for path in (PACKAGE / f"{module_path}.py", PACKAGE / module_path / "__init__.py") if path.exists())
    return next(found, None)


def _behaviour(kind: type) -> list:
    """What objects of a class do: the code of its module for a class of this package, else the class's own functions."""
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

    A module is its configuration, parameters and buffers, the devices they are on, and the classes of all modules in it
    with the ``cache_key`` of those that have one. Hooks and functions set on an instance are not covered.

    Raises:
        TypeError: a value of another kind, which has no content to hash.
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
            digest.update(f"{name}@{tensor.device}".encode())  # whose sums differ in order
            _update(digest, tensor)
        for name, module in value.named_modules():
            _update(digest, (name, type(module).__qualname__, module.cache_key() if hasattr(module, "cache_key") else None))
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
