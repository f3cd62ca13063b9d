"""The notebooks and figures as they are committed, as a folder of web pages to read without running anything.

    python docs/build.py                 site/, its front page is site/index.html
    python docs/build.py --output PATH   somewhere else

Every notebook is a page (nbconvert), beside a front page, the README, all results, the guide, how to add a method, a gallery of
every figure with its claim, the paper, and the explorer. They need no server and no network: styles and scripts are files beside
them, and a link within the repository that leads nowhere is an error. A page runs the scripts of the explorer and no others: what
notebooks hold is shown without scripts and frames, and a policy in each page forbids what would be left of them.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import vl_convert
from bs4 import BeautifulSoup
from explorer import explorer_data
from harmless import POLICY, harmless
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from PIL import Image
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "paper"))
from typeset import compile_paper  # noqa: E402

HERO = "04_pareto"  # the figure of the front page and of previews
DESCRIPTION = "Smaller fitted modules in the place of a transformer's MLP blocks: every method measured the same way."
MARKER = ".mlpreplace-site"  # a folder with this file in it may be replaced


class Refused(Exception):
    """The site cannot be built; the message says what to change."""


@dataclass(frozen=True)
class Notebook:
    """One executed notebook; ``name`` is its path below notebooks/ without the ending, as a figure's provenance has it."""

    path: Path
    name: str
    title: str
    answer: str  # the bold paragraph below the title

    @property
    def page(self) -> str:
        return f"notebooks/{self.name}.html"

    @property
    def label(self) -> str:
        number = self.path.stem[:2]
        return f"{number}, study" if "/" in self.name else number

    @property
    def command(self) -> str:
        """What draws its figures again."""
        if "/" in self.name:
            return f"make studies ONLY={self.path.stem}"
        return f"make figures ONLY={self.path.stem[:2]}"


@dataclass(frozen=True)
class Figure:
    """One figure with what its json says; ``size`` is (width, height) of the png in pixels."""

    name: str
    claim: str
    notebook: Notebook
    record: dict
    size: tuple[int, int]

    @property
    def drawn_from(self) -> str:
        """Model and commit, as far as they are known: a tree without git has no commit."""
        model, commit = (self.record.get("model") or {}).get("id"), (self.record.get("git") or {}).get("commit")
        return ", ".join(filter(None, [model, commit and f"commit {commit[:7]}"]))


def read_notebooks(root: Path) -> list[Notebook]:
    """Notebooks, then studies, each titled by its first heading."""
    folder = root / "notebooks"
    found = []
    for path in [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *sorted((folder / "studies").glob("[0-9][0-9]_*.ipynb"))]:
        title, _, rest = nbformat.read(path, as_version=4).cells[0].source.partition("\n")
        answer = rest.strip().partition("\n\n")[0].replace("**", "")
        found.append(Notebook(path, str(path.relative_to(folder).with_suffix("")), title.lstrip("# "), answer))
    return found


def read_figures(root: Path, notebooks: list[Notebook]) -> list[Figure]:
    """Every figure of figures/, by name. Raises Refused where no notebook draws it, or its png or pdf is missing."""
    by_name = {notebook.name: notebook for notebook in notebooks}
    found = []
    for path in sorted((root / "figures").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        made_by = content["provenance"]["notebook"]
        missing = [path.with_suffix(s).name for s in (".png", ".pdf") if not path.with_suffix(s).exists()]
        if made_by not in by_name or missing:
            what = f"{', '.join(missing)} missing beside it" if missing else f"drawn by {made_by!r}, which is no notebook"
            raise Refused(f"figures/{path.name}: {what}; make notebooks draws it again.")
        with Image.open(path.with_suffix(".png")) as png:
            found.append(Figure(path.stem, content["claim"], by_name[made_by], content["provenance"], png.size))
    return found


def relink(html: str, source: str, page: str, pages: dict[str, str]) -> Markup:
    """Links as they are written in the repository, made links of the site; without anything that runs.

    Args:
        source: file that holds them, relative to the repository, as "notebooks/studies/06_language.ipynb".
        page: file of the site that will hold them.
        pages: {file of the repository: file of the site, with an anchor where it has one}.

    Raises:
        Refused: a link within the repository to something that the site does not have.
    """
    soup = BeautifulSoup(harmless(html), "html.parser")
    for tag in soup.select("a[href], img[src]"):
        key = "href" if tag.name == "a" else "src"
        link = urlsplit(tag[key])
        if link.scheme or not link.path:  # elsewhere, an embedded image, or an anchor of the same page
            continue
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(link.path)))
        if tag.name == "img" and target.startswith("figures/"):
            to = target
            tag.wrap(soup.new_tag("a", href=posixpath.relpath(pages.get(target, target), posixpath.dirname(page) or ".")))
        elif target in pages:
            to = pages[target]
        else:
            raise Refused(f"{source} links to {tag[key]!r}, which is no page of the site; it has {sorted(pages)}.")
        tag[key] = posixpath.relpath(to, posixpath.dirname(page) or ".") + (f"#{link.fragment}" if link.fragment else "")
    for table in soup.select("table"):  # wider than a phone: it scrolls in a box of its own
        table.wrap(soup.new_tag("div", attrs={"class": "wide"}))
    for image in soup.select("img:not([alt])"):
        raise Refused(f"{source}: an image without a description, {image.get('src', '')[:60]!r}.")
    return Markup(str(soup))


def notebook_body(notebook: Notebook, claims: dict[str, str]) -> str:
    """Cells and outputs as HTML; an image is described by the claim of the figure that its cell saves."""
    content = nbformat.read(notebook.path, as_version=4)
    content.metadata.pop("widgets", None)  # which would need scripts
    for cell in content.cells:
        if cell.cell_type == "code":
            saved = re.search(r'\b(?:save_figure|show)\([^"]*"(\d\d_\w+)"', cell.source)
            cell.metadata["alt"] = claims.get(saved.group(1), "") if saved else "Output of the cell above."
    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True
    )
    return exporter.from_notebook_node(content)[0]


def code_colours() -> str:
    """Pygments' classes, for light and for dark screens."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("tango", "github-dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def build(output: Path, root: Path = ROOT) -> list[str]:
    """Write the site to ``output`` and return its pages. ``output`` is replaced as a whole, once everything is written.

    Raises:
        Refused: a figure or link that leads nowhere, or an ``output`` that something else made.
    """
    if output.exists() and not (output / MARKER).exists():
        raise Refused(f"{output} is there and was not made by this script; remove it, or give --output another folder.")
    notebooks = read_notebooks(root)
    figures = read_figures(root, notebooks)
    texts = {
        "README.md": ("readme.html", "mlpreplace"),
        "docs/results.md": ("results.html", "All results"),
        "docs/guide.md": ("guide.html", "Guide"),
        "docs/models.md": ("models.html", "Models"),
        "docs/licences.md": ("licences.html", "Assets and licences"),
        "docs/adding_a_method.md": ("adding_a_method.html", "Adding a method"),
    }
    pages = {source: page for source, (page, _) in texts.items()} | {f"notebooks/{n.name}.ipynb": n.page for n in notebooks}
    pages |= {f"docs/assets/{path.name}": f"assets/{path.name}" for path in (HERE / "assets").iterdir()}
    pages |= {f"figures/{figure.name}.png": f"gallery.html#{figure.name}" for figure in figures}
    environment = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # methods stand in the order of their figure
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        site = Path(scratch) / "site"
        (site / "figures").mkdir(parents=True)
        written = []

        def write(page: str, template: str, **values) -> None:
            up = posixpath.relpath(".", posixpath.dirname(page) or ".")
            common = {"description": DESCRIPTION, "preview": HERO, "policy": POLICY, "notebooks": notebooks}
            html = environment.get_template(template).render(up=up, page=page, **common, **values)
            (site / page).parent.mkdir(parents=True, exist_ok=True)
            (site / page).write_text(html, encoding="utf-8")
            written.append(page)

        for source, (page, title) in texts.items():
            body = relink(markdown2html((root / source).read_text(encoding="utf-8")), source, page, pages)
            write(page, "text.html.j2", title=title, body=body, before=None, after=None)
        claims = {figure.name: figure.claim for figure in figures}
        for before, notebook, after in zip([None, *notebooks], notebooks, [*notebooks[1:], None], strict=False):
            source = f"notebooks/{notebook.name}.ipynb"
            body = relink(notebook_body(notebook, claims), source, notebook.page, pages)
            write(notebook.page, "text.html.j2", title=notebook.title, body=body, before=before, after=after)
        of_notebook = {figure.notebook: figure for figure in reversed(figures) if "/" not in figure.notebook.name}
        by_name = {figure.name: figure for figure in figures}
        cards = [(notebook, by_name[HERO] if notebook == by_name[HERO].notebook else f) for notebook, f in of_notebook.items()]
        cards.sort(key=lambda card: card[0].name)
        write("index.html", "front.html.j2", title="mlpreplace", hero=by_name[HERO], cards=cards)
        if (root / "paper" / "main.typ").exists():
            (site / "paper.pdf").write_bytes(compile_paper(root))
        write("gallery.html", "gallery.html.j2", title="Figures", figures=figures)
        write("explorer.html", "explorer.html.j2", title="Explorer", data=explorer_data(root / "figures"))
        for figure in figures:
            for suffix in ("png", "pdf", "json"):
                shutil.copy(root / "figures" / f"{figure.name}.{suffix}", site / "figures")
        shutil.copytree(HERE / "assets", site / "assets")
        (site / "assets" / "code.css").write_text(code_colours(), encoding="utf-8")
        bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
        (site / "assets" / "vega.js").write_text(bundle, encoding="utf-8")
        (site / MARKER).touch()
        shutil.rmtree(output, ignore_errors=True)
        site.rename(output)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "site", help="folder to write, replaced if it is there")
    options = parser.parse_args(arguments)
    try:
        written = build(options.output.resolve())
    except (Refused, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(written)} pages; open {options.output / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
