"""Run the notebooks end to end with papermill, in order, at the size a profile gives.

    python notebooks/run.py                          the cpu profile: the literal values of each parameters cell
    python notebooks/run.py --profile smoke          profiles/smoke.yaml over them
    python notebooks/run.py --only 02 -p SEED 1      one notebook, one parameter changed
    python notebooks/run.py --studies                the studies, which take longer, instead of the notebooks
    python notebooks/run.py --figure 04_pareto       the notebook or study that draws this figure

Executed copies go to executed/<profile>/, those of another MODEL to a folder of its name there. Figures go to figures/ only
for an unchanged cpu run; any other run has a figures folder of its own, so that committed figures are never overwritten by
accident. --publish puts executed copies in the place of the notebooks themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Refused(Exception):
    """The request cannot be carried out; the message says what to change."""


def read_profile(name: str) -> dict[str, dict]:
    """{notebook or "common": {parameter: value}} of profiles/<name>.yaml; the cpu profile is the notebooks themselves."""
    if name == "cpu":
        return {}
    path = HERE / "profiles" / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(["cpu", *sorted(p.stem for p in path.parent.glob("*.yaml"))])
        raise Refused(f"Unknown profile {name!r}; known are {known}.")
    profile = yaml.safe_load(path.read_text())
    if not isinstance(profile, dict) or not all(isinstance(section, dict) for section in profile.values()):
        raise Refused(f"{path.name}: expected sections of PARAMETER: value.")
    return profile


def parameters_for(notebook: Path, profile_name: str, profile: dict[str, dict], overrides: dict) -> dict:
    """The values to inject into one notebook.

    Raises Refused for a notebook the profile forgot and for a parameter name that the notebook does not have. A value
    for every notebook ("common", and the command line) is given to those that have the parameter.
    """
    known = set(papermill.inspect_notebook(str(notebook)))
    if not profile:
        return {k: v for k, v in overrides.items() if k in known}
    section = str(notebook.relative_to(HERE).with_suffix(""))
    if section not in profile:
        raise Refused(f"Profile {profile_name!r} has no section {section!r}; add one, it may be empty: {{}}.")
    unknown = set(profile[section]) - known
    if unknown:
        raise Refused(f"Profile {profile_name!r} gives {section} unknown parameters {sorted(unknown)}; it has {sorted(known)}.")
    shared = {k: v for k, v in profile.get("common", {}).items() if k in known}
    return {**shared, **profile[section], **{k: v for k, v in overrides.items() if k in known}}


def check_names(notebooks: list[Path], names: set[str], where: str) -> None:
    """Raise Refused for a name that no notebook has as a parameter."""
    known = {name for notebook in notebooks for name in papermill.inspect_notebook(str(notebook))}
    if names - known:
        raise Refused(f"{where}: unknown parameters {sorted(names - known)}; known are {sorted(known)}.")


def located(value):
    """A path the user typed from where they stand, made absolute: notebooks run in their own folder."""
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value


def short_name(overrides: dict) -> str:
    """The last part of a MODEL of the command line, to call folders by; "" where none was given."""
    return str(overrides.get("MODEL", "")).rstrip("/").rsplit("/", 1)[-1]


def copies_folder(profile: str, overrides: dict) -> str:
    """Where executed copies go, relative to the repository: runs of several models do not overwrite one another."""
    return "/".join(filter(None, ["executed", profile, short_name(overrides)]))


def drawer(figure: str) -> Path:
    """The notebook that drew a committed figure, as the figure's record says."""
    record = ROOT / "figures" / f"{figure}.json"
    if not record.exists():
        known = ", ".join(sorted(path.stem for path in record.parent.glob("*.json")))
        raise Refused(f"No figure {figure!r}; there are {known}.")
    return HERE / f"{json.loads(record.read_text())['provenance']['notebook']}.ipynb"


def figures_folder(profile: str, overrides: dict) -> str | None:
    """Where a changed run draws, relative to the repository; None where it is the committed place."""
    if profile == "cpu" and not overrides:
        return None
    model = short_name(overrides)
    if profile == "smoke" or not model and profile == "cpu":  # of no interest once it ran
        return f"{copies_folder(profile, overrides)}/figures"
    return f"figures/{model or profile}"


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


def execute(notebook: Path, parameters: dict, folder: str) -> Path:
    """One notebook, from the top, where it stands; returns the executed copy in ``folder``."""
    output = ROOT / folder / notebook.relative_to(HERE)
    output.parent.mkdir(parents=True, exist_ok=True)
    options = {"cwd": str(HERE), "kernel_name": "python3", "progress_bar": sys.stderr.isatty()}
    with tempfile.TemporaryDirectory(prefix="mlpreplace-") as sockets:  # of this user's, not ports that any user could reach
        local = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        papermill.execute_notebook(str(notebook), str(output), parameters=parameters, config=local, **options)
    tidy(output)
    return output


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="cpu", help="cpu, smoke, gpu: profiles/<name>.yaml")
    parser.add_argument("--only", nargs="*", default=[], help="numbers or names of notebooks, as in --only 02 04")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--studies", action="store_true", help="run studies/ instead of the notebooks")
    parser.add_argument("--figure", help="one figure, by the name of its file: the notebook that draws it, with its others")
    parser.add_argument("--publish", action="store_true", help="replace the notebooks by their executed copies")
    options = parser.parse_args(arguments)
    try:
        numbered, studies = (sorted(folder.glob("[0-9][0-9]_*.ipynb")) for folder in (HERE, HERE / "studies"))
        every, here = numbered + studies, studies if options.studies else numbered
        notebooks = [n for n in here if not options.only or n.stem.startswith(tuple(options.only))]
        if options.figure:
            notebooks = [drawer(options.figure)]
        if not notebooks:
            raise Refused(f"No notebook matches {options.only}; there are {[n.stem for n in here]}.")
        profile = read_profile(options.profile)
        overrides = {name: located(yaml.safe_load(value)) for name, value in options.parameter}
        if options.publish and (options.profile != "cpu" or overrides):
            raise Refused("--publish takes the unchanged cpu profile only: the committed notebooks show its outputs.")
        check_names(every, set(overrides), "--parameter")
        check_names(every, set(profile.get("common", {})), f"profile {options.profile!r}, section 'common'")
        if folder := figures_folder(options.profile, overrides):
            overrides = {"FIGURES": folder, **overrides}
        todo = [(n, parameters_for(n, options.profile, profile, overrides)) for n in notebooks]
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    copies = copies_folder(options.profile, overrides)
    for notebook, parameters in todo:
        start = time.time()
        print(f"{notebook.stem} ({options.profile}) …", flush=True)
        try:
            output = execute(notebook, parameters, copies)
        except PapermillExecutionError as error:
            print(f"error: {notebook.stem}, cell {error.exec_count}: {error.ename}: {error.evalue}", file=sys.stderr)
            print(f"The copy in {copies}/ shows where.", file=sys.stderr)
            return 1
        except DeadKernelError:
            print(f"error: {notebook.stem}: its process was killed, which is what happens when memory runs out.", file=sys.stderr)
            print("Run it again: what was cached by then is taken from the cache.", file=sys.stderr)
            return 1
        print(f"{notebook.stem} done in {time.time() - start:.0f} s", flush=True)
        if options.publish:
            notebook.write_text(output.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
