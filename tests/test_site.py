"""make site: what a reader who runs nothing opens. Pages are whole, stay within their folder, and the explorer answers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Error, expect

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT / "notebooks").rglob("[0-9][0-9]_*.ipynb"))
TEXTS = ["readme.html", "results.html", "guide.html", "models.html", "licences.html", "adding_a_method.html"]
PAGES = ["index.html", *TEXTS, "gallery.html", "explorer.html", *(str(p.with_suffix(".html")) for p in NOTEBOOKS)]
FIGURES = sorted(p.stem for p in (ROOT / "figures").glob("*.json"))

sys.path.insert(0, str(DOCS))
spec = importlib.util.spec_from_file_location("build_site", DOCS / "build.py")
build_site = importlib.util.module_from_spec(spec)
sys.modules["build_site"] = build_site  # dataclasses look their module up
spec.loader.exec_module(build_site)
sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "site"
    assert sorted(build_site.build(folder)) == sorted(PAGES)
    return folder


@cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(site, page):
    """Files that are linked exist, so do the anchors, and what a page loads is a file beside it."""
    document = soup(site / page)
    for tag in document.select("[src], link[href]"):
        address = tag.get("src") or tag["href"]
        assert urlsplit(address).scheme in ("", "data"), f"{address} is not of this folder"
    assert "url(" not in "".join(style.text for style in document.select("style"))
    for tag in document.select("[href], [src]"):
        address, anchor = urldefrag(tag.get("href") or tag["src"])
        if urlsplit(address).scheme:
            continue
        target = (site / page).parent / unquote(address) if address else site / page
        assert target.resolve().is_relative_to(site) and target.is_file(), address
        assert not anchor or soup(target).find(id=unquote(anchor)), f"{address}#{anchor}"


def test_styles_load_nothing(site):
    for path in (site / "assets").glob("*.css"):
        assert "url(" not in path.read_text() and "@import" not in path.read_text()


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_the_policy_and_no_script_of_its_own(page, site):
    document = soup(site / page)
    (policy,) = document.select('meta[http-equiv="Content-Security-Policy"]')
    rules = dict(rule.strip().split(" ", 1) for rule in policy["content"].split(";"))
    assert rules["default-src"] == "'none'" and rules["script-src"] == "'self'"
    assert not document.select("script ~ meta[http-equiv]"), "it has to stand before what it forbids"
    for script in document.find_all("script"):
        assert script.get("src") or script["type"] == "application/json"
    assert not [name for tag in document.find_all(True) for name in tag.attrs if name.startswith("on")]


def test_the_gallery_shows_every_figure_with_its_claim_and_its_notebook(site):
    shown = {figure["id"]: figure for figure in soup(site / "gallery.html").select("figure")}
    assert sorted(shown) == FIGURES
    for name, figure in shown.items():
        content = json.loads((ROOT / "figures" / f"{name}.json").read_text())
        assert figure.figcaption.text == content["claim"]
        links = {a["href"] for a in figure.select("a")}
        assert f"commit {content['provenance']['git']['commit'][:7]}" in figure.text
        assert links == {f"figures/{name}.{s}" for s in ("png", "json", "pdf")} | {
            f"notebooks/{content['provenance']['notebook']}.html"
        }


def test_a_link_that_leads_nowhere_is_refused():
    with pytest.raises(build_site.Refused, match="README.md links to 'paper/lost.pdf'"):
        build_site.relink('<a href="paper/lost.pdf">it</a>', "README.md", "readme.html", {"README.md": "readme.html"})


def test_links_of_a_study_are_relative_to_its_own_page():
    pages = {"notebooks/05_subfit.ipynb": "notebooks/05_subfit.html", "figures/a.png": "gallery.html#a"}
    html = '<a href="../05_subfit.ipynb#x">05</a><a href="../../figures/a.png">a</a><a href="https://example.org/">out</a>'
    linked = build_site.relink(html, "notebooks/studies/06.ipynb", "notebooks/studies/06.html", pages)
    found = [a["href"] for a in BeautifulSoup(linked, "html.parser").select("a")]
    assert found == ["../05_subfit.html#x", "../../gallery.html#a", "https://example.org/"]


def test_a_folder_that_something_else_made_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert build_site.main(["--output", str(tmp_path)]) == 2
    assert "was not made by this script" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert build_site.main(["--output", str(tmp_path / "file" / "site")]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_figure_without_its_png_is_refused(tmp_path):
    for folder in ("notebooks", "figures"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "figures" / f"{FIGURES[0]}.png").unlink()
    with pytest.raises(build_site.Refused, match=f"{FIGURES[0]}.png missing"):
        build_site.build(tmp_path / "site", tmp_path)
    assert not (tmp_path / "site").exists()


def test_the_explorer_holds_the_rows_as_the_figures_do(site):
    data = json.loads(soup(site / "explorer.html").find(id="data").string)
    assert data["rows"] and data["plans"]
    added = {"group", "figure", "on", "method"}
    for row in data["rows"]:
        figure = json.loads((ROOT / "figures" / f"{row['figure']}.json").read_text())
        without = {k: v for k, v in row.items() if k not in added}
        own = [r for r in figure["rows"] if {k: v for k, v in r.items() if k not in added} == without]
        assert any(row["method"].startswith(r["method"]) for r in own)


@pytest.fixture
def page(browser, site):
    """A page that may open files of the site and nothing else, and must not complain: no error, no failed request."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 1000})
    complaints = []
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:200]}"))

    def is_of_the_site(request):
        if not request.url.startswith((site.as_uri() + "/", "data:")):
            complaints.append(f"left the site: {request.url[:200]}")

    page.on("request", is_of_the_site)
    yield page
    context.close()
    assert not complaints


def sideways(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_every_page_loads_with_its_figures(page, site, name):
    page.goto((site / name).as_uri(), wait_until="load")
    widths = page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert all(width > 0 for width in widths)
    if name == "gallery.html":
        assert len(widths) == len(FIGURES)
    if name.startswith("notebooks/"):
        cells = nbformat.read((ROOT / name).with_suffix(".ipynb"), as_version=4).cells
        drawn = [o for cell in cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        assert len(widths) == len(drawn) > 0
    assert not sideways(page)
    page.set_viewport_size({"width": 400, "height": 800})
    assert not sideways(page), "a phone has to scroll sideways"
    page.get_by_text("Notebooks", exact=True).click()
    expect(page.locator("header li a")).to_have_count(len(NOTEBOOKS))


@pytest.mark.browser
def test_the_explorer_answers_to_every_choice(page, site):
    data = json.loads(soup(site / "explorer.html").find(id="data").string)
    page.goto((site / "explorer.html").as_uri())
    points = page.locator("#chart .mark-symbol path")
    boxes = page.locator("#methods details").first.locator("input")
    group, methods = next(iter(data["methods"].items()))

    def rows_of(on, metric, methods):
        return [r for r in data["rows"] if (r["group"], r["on"]) == (group, on) and r["method"] in methods and r.get(metric)]

    on = page.locator("#on").input_value()
    expect(boxes).to_have_count(len(methods))
    expect(points).to_have_count(len(rows_of(on, "perplexity_ratio", methods)))

    gone, *others = methods
    page.locator(f"#methods input[data-group='{group}'][data-method='{gone}']").uncheck()
    expect(points).to_have_count(len(rows_of(on, "perplexity_ratio", others)))
    page.locator("#methods details").first.get_by_role("button", name="none").click()
    expect(points).to_have_count(0)
    page.locator("#methods details").first.get_by_role("button", name="all").click()

    before = page.locator("#chart .mark-line path").first.get_attribute("d")
    for text in {r["on"] for r in data["rows"]}:
        page.locator("#on").select_option(text)
        for metric in page.locator("#metric option").evaluate_all("options => options.map(o => o.value)"):
            page.locator("#metric").select_option(metric)
            expect(points).to_have_count(len(rows_of(text, metric, methods)))
    page.locator("#on").select_option(on)
    page.locator("#metric").select_option("kl")
    expect(points).to_have_count(len(rows_of(on, "kl", methods)))
    expect(page.locator("#chart .mark-line path").first).not_to_have_attribute("d", before)


@pytest.mark.browser
def test_the_explorer_shows_the_plan_of_the_point_under_the_pointer(page, site):
    data = json.loads(soup(site / "explorer.html").find(id="data").string)
    page.goto((site / "explorer.html").as_uri())
    plan = data["plans"][0]
    for name in data["methods"][plan["group"]]:
        if name != plan["method"]:
            page.locator(f"#methods input[data-group='{plan['group']}'][data-method='{name}']").uncheck()
    on = page.locator("#on").input_value()
    rows = [r for r in data["rows"] if (r["group"], r["method"], r["on"]) == (plan["group"], plan["method"], on)]
    points = page.locator("#chart .mark-symbol path")
    expect(points).to_have_count(len(rows))
    for number, row in enumerate(rows):
        points.nth(number).hover()
        heading = page.locator("#point h2")
        expect(heading).to_have_text(
            f"{row['method']}, {100 * row['sparsity_achieved']:.1f} % removed, on {on}".replace(".0 %", " %")
        )
        layers = [p for p in data["plans"] if (p["method"], p["sparsity"]) == (row["method"], row["sparsity"])]
        expect(page.locator("#plan .mark-rect.role-mark path")).to_have_count(len(layers))
        expect(page.locator("#point dl")).to_contain_text(f"{row['perplexity_ratio']:.3g}")


@pytest.mark.browser
def test_a_request_that_leaves_the_site_would_be_seen(browser, site, tmp_path):
    """The check of the other tests can fail: offline, a page with an image from elsewhere reports it."""
    (tmp_path / "bad.html").write_text('<img src="https://example.org/a.png" alt="">')
    context = browser.new_context(offline=True)
    page, failed = context.new_page(), []
    page.on("requestfailed", lambda request: failed.append(request.url))
    try:
        page.goto((tmp_path / "bad.html").as_uri())
    except Error:
        pass
    context.close()
    assert failed == ["https://example.org/a.png"]
