"""Where files are kept, and how they are written: whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """The folder of downloads, converted models and results: $MLPREPLACE_CACHE, or .cache in the checkout."""
    return Path(os.environ.get("MLPREPLACE_CACHE", ROOT / ".cache"))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that is renamed to ``path`` when the ``with`` block succeeds, and is deleted when it raises.

    Raises OSError where ``path`` exists by then and is not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        yield whole
        os.rename(whole, path)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)`` and rename: ``path`` is the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # in a folder of its own: files are found by their endings, and a killed process may leave a part of one here
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        scratch = Path(folder) / path.name
        write(scratch)
        os.replace(scratch, path)
