"""Run the notebooks end to end with papermill, in order, at the size a profile gives.

    python notebooks/run.py                          the cpu profile: the literal values of each parameters cell
    python notebooks/run.py --profile smoke          profiles/smoke.yaml over them
    python notebooks/run.py --only 02 -p SEED 1      one notebook, one parameter changed
    python notebooks/run.py --studies                the studies, which take longer, instead of the notebooks
    python notebooks/run.py --figure 04_pareto       the notebook or study that draws this figure

Executed copies go to executed/<profile>/, those of another MODEL to a folder of its own there: owner--name of a hub id, a local
folder's name and a hash of its path. Figures go to figures/ only for an unchanged cpu run; any other run has a figures folder of
its own, so that committed figures are never overwritten by accident. --publish puts executed copies in the place of the
notebooks themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from parameters import HERE, Refused, check_names, folder_name, name_of, parameters_for, read_profile
from traitlets.config import Config

ROOT = HERE.parent
MARK = ".mlpreplace"  # `make clean` removes folders that hold it
SOCKET_BYTES = 103 - len("/mlpreplace-xxxxxxxx/kernel-5")  # left for the folder of a socket: macOS takes 103 bytes, Linux 107


def select(here: list[Path], only: list[str], others: list[Path]) -> list[Path]:
    """Those of ``here`` whose names begin with one of ``only``, all for none. Raises Refused for one that fits none."""
    for name in only:
        if not name or not any(notebook.stem.startswith(name) for notebook in here):
            else_where = [notebook.stem for notebook in others if name and notebook.stem.startswith(name)]
            hint = f" With or without --studies there is {', '.join(else_where)}." if else_where else ""
            raise Refused(f"No notebook matches {name!r}; there are {', '.join(n.stem for n in here)}.{hint}")
    return [notebook for notebook in here if not only or notebook.stem.startswith(tuple(only))]


def drawer(figure: str, every: list[Path]) -> Path:
    """The notebook of ``every`` that drew a committed figure, as the figure's record says."""
    records = {path.stem: path for path in sorted((ROOT / "figures").glob("*.json"))}
    if figure not in records:
        raise Refused(f"No figure {figure!r}; there are {', '.join(records)}.")
    try:
        drawn_by = json.loads(records[figure].read_text(encoding="utf-8"))["provenance"]["notebook"]
    except (ValueError, KeyError, TypeError):
        raise Refused(f"figures/{figure}.json is no record of a figure; draw it again by its notebook.") from None
    found = [notebook for notebook in every if name_of(notebook) == drawn_by]
    if not found:
        raise Refused(f"figures/{figure}.json is of {drawn_by!r}; there are {', '.join(map(name_of, every))}.")
    return found[0]


def copies_folder(profile: str, model: str) -> str:
    """Where executed copies go, relative to the repository: runs of several models do not overwrite one another."""
    return "/".join(["executed", profile, *([folder_name(model)] if model else [])])


def figures_folder(profile: str, model: str, *, changed: bool) -> str | None:
    """Where a run draws, relative to the repository; None for an unchanged cpu run, which draws in the committed place.

    Args:
        model: MODEL of the command line, "" where none was given.
        changed: whether any parameter was given there.
    """
    if profile == "cpu" and not changed:
        return None
    if profile == "smoke" or not model and profile == "cpu":  # of no interest once it ran
        return f"{copies_folder(profile, model)}/figures"
    return "/".join(["figures", *([profile] if profile != "cpu" else []), *([folder_name(model)] if model else [])])


def tidy(path: Path) -> None:
    """Leave what a reader wants: no progress bars, no record of where and when papermill ran."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    for number, cell in enumerate(notebook.cells):
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(notebook, path)


def socket_place() -> str:
    """A folder for temporary files whose name is short enough for the sockets of a kernel. Raises Refused where there is none."""
    for place in (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp"):
        if place and len(os.fsencode(place)) <= SOCKET_BYTES and os.access(place, os.W_OK | os.X_OK):
            return place
    raise Refused(f"No folder for a kernel's sockets: set TMPDIR to one whose name has at most {SOCKET_BYTES} bytes.")


def cell_seconds(notebook: nbformat.NotebookNode) -> str:
    """The cells that took a second or more, by number."""
    took = {c.execution_count: c.metadata.papermill.duration or 0 for c in notebook.cells if c.cell_type == "code"}
    return ", ".join(f"[{number}] {seconds:.0f} s" for number, seconds in took.items() if seconds >= 1)


def execute(notebook: Path, parameters: dict, folder: str) -> tuple[Path, str]:
    """One notebook, from the top, where it stands; returns the executed copy in ``folder``, and what its cells took."""
    output = ROOT / folder / notebook.relative_to(HERE)
    with suppress(FileExistsError):
        (ROOT / "executed").mkdir()
        (ROOT / "executed" / MARK).touch()
    output.parent.mkdir(parents=True, exist_ok=True)
    options = {"cwd": str(HERE), "kernel_name": "python3", "progress_bar": sys.stderr.isatty()}
    with tempfile.TemporaryDirectory(prefix="mlpreplace-", dir=socket_place()) as sockets:  # of this user's, unlike ports
        local = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        executed = papermill.execute_notebook(str(notebook), str(output), parameters=parameters, config=local, **options)
    tidy(output)
    return output, cell_seconds(executed)


def requested(arguments: list[str] | None) -> tuple[argparse.Namespace, list[tuple[Path, dict]], str]:
    """The options; the notebooks to run, each with its parameters; and where copies go. Raises Refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="cpu", help="cpu, smoke, gpu: profiles/<name>.yaml")
    parser.add_argument("--only", nargs="+", default=[], help="numbers or names of notebooks, as in --only 02 04")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--studies", action="store_true", help="run studies/ instead of the notebooks")
    parser.add_argument("--figure", help="one figure, by the name of its file: the notebook that draws it, with its others")
    parser.add_argument("--publish", action="store_true", help="replace the notebooks by their executed copies")
    options = parser.parse_args(arguments)
    numbered, studies = (sorted(folder.glob("[0-9][0-9]_*.ipynb")) for folder in (HERE, HERE / "studies"))
    every, (here, others) = numbered + studies, (studies, numbered) if options.studies else (numbered, studies)
    if options.figure is not None and options.only:
        raise Refused("--figure chooses its notebook; leave --only out.")
    chosen = select(here, options.only, others) if options.figure is None else [drawer(options.figure, every)]
    profile, overrides = read_profile(options.profile), dict(options.parameter)
    if unknown := profile.keys() - {"common", *map(name_of, every)}:
        raise Refused(f"Profile {options.profile!r} has sections of no notebook: {', '.join(sorted(unknown))}.")
    if len(overrides) < len(options.parameter) or "PROFILE" in overrides:
        raise Refused("--parameter: each name once; and PROFILE follows from --profile.")
    if options.publish and (options.profile != "cpu" or overrides):
        raise Refused("--publish takes the unchanged cpu profile only: the committed notebooks show its outputs.")
    check_names(set(overrides), "--parameter", chosen, every)
    check_names(set(profile.get("common", {})), f"profile {options.profile!r}, section 'common'", every, every)
    todo = [(notebook, parameters_for(notebook, options.profile, profile, overrides)) for notebook in chosen]
    model = todo[0][1]["MODEL"] if "MODEL" in overrides else ""
    folder = figures_folder(options.profile, model, changed=bool(overrides))
    if folder and "FIGURES" not in overrides:
        todo = [(notebook, {**parameters, "FIGURES": folder}) for notebook, parameters in todo]
    return options, todo, copies_folder(options.profile, model)


def main(arguments: list[str] | None = None) -> int:
    """2 for a request that cannot be met, 1 for a notebook that failed, behind which the others run; the reason is on stderr."""
    failed = False
    try:
        options, todo, copies = requested(arguments)
        for notebook, parameters in todo:
            start = time.time()
            print(f"{notebook.stem} ({options.profile}) …", flush=True)
            try:
                output, by_cell = execute(notebook, parameters, copies)
            except PapermillExecutionError as error:
                print(f"error: {notebook.stem}, cell {error.exec_count}: {error.ename}: {error.evalue}", file=sys.stderr)
                print(f"The copy in {copies}/ shows where.", file=sys.stderr)
                failed = True
                continue
            print(f"{notebook.stem} done in {time.time() - start:.0f} s, by cells {by_cell}", flush=True)
            if options.publish:
                notebook.write_bytes(output.read_bytes())
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DeadKernelError:
        print(f"error: {notebook.stem}: its process was killed, which is what happens when memory runs out.", file=sys.stderr)
        print("Run it again: what was cached by then is taken from the cache.", file=sys.stderr)
        return 1
    except OSError as error:  # of a disk that is full, of a folder that is not ours
        print(f"error: {notebook.stem}: the executed copy could not be written: {error}", file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
