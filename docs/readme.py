"""README.md and docs/results.md from their templates: every number in them is one of a figure's json.

    python docs/readme.py            writes both
    python docs/readme.py --check    says which differ, and writes nothing

The templates are docs/templates/README.md.j2 and results.md.j2. They hold no result: a new run changes the pages, not them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mlpreplace import METHODS
from mlpreplace.methods import methods_table
from mlpreplace.reporting.plots import readable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = {"README.md.j2": "README.md", "results.md.j2": "docs/results.md"}


@cache
def figure(name: str) -> dict:
    return json.loads((ROOT / "figures" / f"{name}.json").read_text(encoding="utf-8"))


def rows(name: str, **fields) -> list[dict]:
    """Rows of a figure with these values."""
    return [r for r in figure(name)["rows"] if all(r.get(key) == value for key, value in fields.items())]


def row(name: str, **fields) -> dict:
    """The one row of a figure with these values. Raises ValueError where there is none, or more than one."""
    found = rows(name, **fields)
    if len(found) != 1:
        raise ValueError(f"figures/{name}.json has {len(found)} rows with {fields}, expected one.")
    return found[0]


def times(x: float) -> str:
    """A ratio with three significant digits, at most two behind the point: "×1.35", "×12.6"."""
    return f"×{x:.{2 if x < 9.995 else 1 if x < 99.95 else 0}f}"


def percent(x: float, digits: int = 0) -> str:
    return f"{100 * x:.{digits}f}".removesuffix(".0") + " %"


def both(name: str, value: str = "perplexity_ratio", **fields) -> str:
    """A ratio on Wikipedia, and in brackets on speeches."""
    wiki, speeches = (times(row(name, domain=domain, **fields)[value]) for domain in ("bundled/wiki", "bundled/speeches"))
    return f"{wiki} ({speeches})"


def interval(r: dict, name: str) -> str:
    """ "×1.31 [1.27, 1.34]" of the columns <name>_ratio, <name>_low and <name>_high."""
    low, high = (times(r[f"{name}_{end}"]).removeprefix("×") for end in ("low", "high"))
    return f"{times(r[f'{name}_ratio'])} [{low}, {high}]"


def others(name: str) -> list[str]:
    """The methods of a figure but the dense model, in its order."""
    return list(dict.fromkeys(r["method"] for r in figure(name)["rows"] if r["method"] != "dense"))


def forms(name: str) -> list[str]:
    """The forms of weights whose size is known, in the order of a figure."""
    return list(dict.fromkeys(r["form"] for r in figure(name)["rows"] if r["megabytes"]))


def mean(name: str, **fields) -> float:
    """Of the scores in the rows with these values, one a trained model."""
    found = [r["score"] for r in rows(name, **fields)]
    return sum(found) / len(found)


def single(family: str, trained: str | None) -> str:
    """Error of a family at a quarter of the block's parameters, a dash where it was not measured."""
    held = rows("02_error_vs_parameters", split="heldout", family=family, trained=trained)
    found = [r["median"] for r in held if abs(r["share_of_block"] / 0.25 - 1) < 0.1]
    return f"{sum(found) / len(found):.3f}" if found else "–"


def drawn_by(notebook: str) -> list[str]:
    """The figures of a notebook."""
    records = {path.stem: figure(path.stem) for path in sorted((ROOT / "figures").glob("*.json"))}
    return [name for name, record in records.items() if record["provenance"]["notebook"] == notebook]


def notebooks(folder: str = "") -> list[str]:
    """Notebooks, or those of the folder "studies/", by the name that a figure's record has."""
    return [f"{folder}{path.stem}" for path in sorted((ROOT / "notebooks" / folder).glob("[0-9][0-9]_*.ipynb"))]


def title(notebook: str) -> str:
    """The question of a notebook, its first line."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "".join(cells[0]["source"]).partition("\n")[0].removeprefix("# ")


def minutes(*names: str) -> int:
    """What runs of notebooks took together, rounded up."""
    took = (max(figure(f)["provenance"]["wall_seconds"] for f in drawn_by(name)) for name in names)
    return math.ceil(sum(took) / 60)


def memory_gb(*names: str) -> int:
    """The most memory that any of them took, rounded up."""
    return math.ceil(max(figure(f)["provenance"]["peak_memory_mb"] for name in names for f in drawn_by(name)) / 1000)


def rendered(template: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    known = [figure, rows, row, times, percent, both, interval, others, forms, mean, single]
    known += [drawn_by, notebooks, title, minutes, memory_gb, methods_table, readable]
    environment.globals |= {f.__name__: f for f in known} | {"removes": {m.name: m.removes for m in METHODS.values()}}
    environment.filters |= {"share": lambda x: percent(x, 1), "readable": readable}
    return environment.get_template(template).render().rstrip("\n") + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and say which pages differ")
    options = parser.parse_args(arguments)
    changed = []
    for template, page in PAGES.items():
        text = rendered(template)
        if not (ROOT / page).exists() or (ROOT / page).read_text(encoding="utf-8") != text:
            changed.append(page)
            if not options.check:
                (ROOT / page).write_text(text, encoding="utf-8")
    print(f"{'differ' if options.check else 'written'}: {', '.join(changed) or 'none'}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
