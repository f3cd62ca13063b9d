"""make site: what is committed, as pages that need no server and no network; looked at by a browser where there is one."""

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

import make_site
import pytest
from bs4 import BeautifulSoup
from explorer import explorer_data

ROOT = Path(__file__).resolve().parents[1]
FIGURES = sorted(path.stem for path in (ROOT / "figures").glob("*.json"))
NOTEBOOKS = sorted(p.relative_to(ROOT / "notebooks").with_suffix("") for p in (ROOT / "notebooks").rglob("[0-9][0-9]_*.ipynb"))
POINTS = "#chart g.mark-symbol.role-mark path"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("site") / "site"
    assert make_site.main(["--output", str(output)]) == 0
    return output


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_there_is_a_page_for_every_notebook_and_a_place_for_every_figure(site):
    found = {str(page.relative_to(site)) for page in pages(site)}
    assert found == {"index.html", "gallery.html", "explorer.html", *(f"notebooks/{name}.html" for name in NOTEBOOKS)}
    gallery = BeautifulSoup((site / "gallery.html").read_text(), "html.parser")
    for name in FIGURES:
        claim = json.loads((ROOT / "figures" / f"{name}.json").read_text())["claim"]
        assert gallery.find(id=name).figcaption.text == claim


def test_every_link_leads_somewhere_and_nothing_is_fetched_from_elsewhere(site):
    for page in pages(site):
        soup = BeautifulSoup(page.read_text(), "html.parser")
        for tag, key in [("a", "href"), ("img", "src"), ("script", "src"), ("link", "href")]:
            for found in soup.find_all(tag, **{key: True}):
                link = urlsplit(found[key])
                if link.scheme:
                    assert tag == "a" or link.scheme == "data", found
                    continue
                target = (page.parent / unquote(link.path)).resolve() if link.path else page
                assert target.is_file() and target.is_relative_to(site), f"{page.name}: {found[key]}"
                if link.fragment and target.suffix == ".html":
                    there = BeautifulSoup(target.read_text(), "html.parser")
                    assert there.find(id=link.fragment), f"{page.name}: {found[key]}"


def test_a_link_that_leads_nowhere_is_refused():
    with pytest.raises(make_site.Refused, match="README.md links to 'notes.md'"):
        make_site.relink('<a href="notes.md">notes</a>', "README.md", "index.html", {"README.md": "index.html"})


def test_what_something_else_made_is_not_replaced(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    assert make_site.main(["--output", str(tmp_path / "mine")]) == 2
    assert "remove it" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_the_explorer_has_the_rows_of_the_figures_and_no_others():
    data = explorer_data(ROOT / "figures")
    assert data["rows"] and data["plans"]
    for row in data["rows"] + data["plans"]:
        rows = json.loads((ROOT / "figures" / f"{row['figure']}.json").read_text())["rows"]
        assert any(all(row[key] == value for key, value in r.items() if key != "method") for r in rows), row
    assert {row["figure"] for row in data["rows"]} >= {"04_pareto", "05_perplexity_vs_sparsity", "06_language"}


# in a browser


@pytest.fixture
def visit(chromium, site):
    """visit(page, width): a tab on that page; the test fails for an error on its console or a request that failed or left."""
    wrong, contexts = [], []

    def visit(name: str, width: int = 1280):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}))
        tab = contexts[-1].new_page()
        tab.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("requestfailed", lambda r: wrong.append(f"failed: {r.url}"))
        tab.on("request", lambda r: wrong.append(f"left: {r.url}") if urlsplit(r.url).scheme not in ("file", "data") else None)
        tab.goto((site / name).as_uri())
        tab.wait_for_load_state("load")
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_every_page_loads_with_its_figures_at_any_width(visit, site, width):
    for page in pages(site):
        tab = visit(str(page.relative_to(site)), width)
        images = tab.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth, () => 0)))")
        assert all(images), f"{page.name}: {images.count(0)} images do not show"
        assert images or page.name == "explorer.html"
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{page.name} is wider than {width}"
        tab.close()


@pytest.mark.browser
def test_the_explorer_draws_and_follows_the_choice(visit):
    tab = visit("explorer.html")
    tab.wait_for_selector(POINTS)
    before = tab.locator(POINTS).count()
    tab.locator("input[data-method=subfit]").uncheck()
    tab.wait_for_function(f"document.querySelectorAll('{POINTS}').length < {before}")
    fewer = tab.locator(POINTS).count()
    tab.locator("#on").select_option("bundled/speeches")
    tab.locator("#metric").select_option("kl")
    tab.wait_for_function("document.querySelector('#chart').textContent.includes('KL to the dense model')")
    assert 0 < tab.locator(POINTS).count() <= fewer


@pytest.mark.browser
def test_pointing_at_a_plan_tells_what_it_keeps(visit):
    tab = visit("explorer.html")
    tab.wait_for_selector(POINTS)
    tab.locator("#methods button", has_text="none").first.click()
    tab.locator("input[data-method=allocated]").check()
    tab.wait_for_function(f"document.querySelectorAll('{POINTS}').length == 5")
    tab.locator(POINTS).nth(2).hover()
    tab.wait_for_function("document.querySelector('#point h2').textContent.startsWith('allocated, 25')")
    tab.wait_for_selector("#plan g.mark-rect path")
    rows = json.loads((ROOT / "figures" / "05_selection_map.json").read_text())["rows"]
    assert tab.locator("#plan g.mark-rect.role-mark path").count() == sum(row["method"] == "allocated" for row in rows)
