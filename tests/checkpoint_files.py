"""Folders of tiny models, what to change in them, and the error that should come of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_locally
from safetensors.torch import load_file, save_file
from tiny_models import build

from mlpreplace import load_model


def checkpoint(parent: Path, name: str = "llama", **changes) -> Path:
    """A new folder in ``parent`` with a tiny model and its tokenizer."""
    return Path(save_locally(build(name, **changes), parent / f"{name}-{len(list(parent.iterdir()))}"))


def edit_weights(folder: Path, edit: Callable[[dict], object], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, message: str) -> None:
    """load_model raises one line that names the folder and says what is in ``message``, for a path and for a string."""
    for given in (str(folder), folder):
        with pytest.raises(ValueError, match=f"(?s){re.escape(str(folder))}.*{message}") as raised:
            load_model(given, device="cpu")
        assert "\n" not in str(raised.value)
