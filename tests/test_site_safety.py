"""make site shows what notebooks and texts hold, and runs none of it: one rule takes out what would run, another forbids it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from test_site import ROOT, build_site, soup

HOSTILE = (  # each tells the page, were it to run
    "<script>window.ran = 1</script>",
    "<SCRIPT\n>window.ran = 1</SCRIPT >",
    "<scr<script>ipt>window.ran = 1</script>",
    '<img src="gone.png" alt="x" onerror="window.ran = 1">',
    '<img/src="gone.png"/alt="x"/onerror=window.ran=1>',
    '<p onclick="window.ran = 1" onmouseover="window.ran = 1">text</p>',
    '<svg onload="window.ran = 1"><script>window.ran = 1</script></svg>',
    "<svg><style><img src=x onerror=window.ran=1></style></svg>",
    '<math><mtext><table><mglyph><style><img alt="</style><img src=x onerror=window.ran=1>">',
    "<noscript><p title=\"</noscript><img src=x alt=x onerror='window.ran=1'>\">",
    "<textarea><img title='</textarea><img src=x onerror=window.ran=1>'></textarea>",
    '<iframe src="javascript:parent.window.ran = 1"></iframe>',
    '<iframe srcdoc="&lt;script&gt;parent.window.ran = 1&lt;/script&gt;"></iframe>',
    '<object data="data:text/html,<script>parent.window.ran=1</script>"></object><embed src="x.swf">',
    '<a href="javascript:window.ran = 1">link</a>',
    '<a href=" java\nscript&#58;window.ran = 1">link</a>',
    '<a href="&#x6A;avascript&colon;window.ran = 1">link</a>',
    '<a href="vbscript:x">link</a><a href="data:text/html;base64,PHNjcmlwdD4=">link</a><a href="da\tta:text/html,x">link</a>',
    '<form action="javascript:window.ran = 1"><button formaction="javascript:window.ran = 1">press</button></form>',
    '<meta http-equiv="refresh" content="0; url=javascript:window.ran = 1"><base href="https://example.org/">',
    '<link rel="stylesheet" href="https://example.org/a.css"><style>@import "https://example.org/b.css"</style>',
    '<img src="https://example.org/a.png" alt="x"><img src="//example.org/a.png" alt="x"><img src="\\\\example.org\\a" alt="x">',
    '<p style="background: url(https://example.org/c.png); position: fixed">text</p>',
    '<video src="https://example.org/v" autoplay onplay="window.ran=1"></video><audio src="x" onerror="window.ran=1"></audio>',
    "<details ontoggle=window.ran=1 open><summary>x</summary></details><!--><script>window.ran = 1</script>-->",
    '<template><script>window.ran = 1</script></template><plaintext onclick="window.ran=1">',
)
WRITTEN = [html for html in HOSTILE if "gone.png" not in html]  # a link that leads nowhere is refused
SHOWING = ("readme.html", "guide.html", "gallery.html", "explorer.html", "notebooks/01_parameter_share.html")
OWN = {"assets/vega.js", "assets/explorer.js", "data"}  # scripts
RUNNING = "script, style, iframe, object, embed, svg, math, form, button, meta, base, link, video, audio, template"


def check_harmless(html: str) -> None:
    found = BeautifulSoup(html, "html.parser")
    assert not found.select(
        "script, style, iframe, object, embed, svg, math, form, button, meta, base, link, video, audio, template"
    )
    for tag in found.find_all(True):
        assert not [name for name in tag.attrs if name.startswith("on")]
        for name in ("href", "src", "action"):
            address = "".join(tag.get(name, "").split()).lower()
            assert ":" not in address or address.startswith(("http://", "https://", "mailto:", "data:image/")), address
        assert tag.name != "img" or "example.org" not in tag.get("src", "")
        assert "url" not in tag.get("style", "")


@pytest.mark.parametrize("html", HOSTILE)
def test_what_would_run_is_taken_out(html):
    check_harmless(build_site.harmless(html))
    check_harmless(build_site.harmless(f"<div>{html}</div><p>after</p>"))


@pytest.mark.parametrize(
    "html",
    [
        '<h2 id="a-b">a &lt; b &amp; c</h2><p><em>é</em> <code>x &lt;- "y"</code></p>',
        '<table class="dataframe" border="1"><tbody><tr style="text-align: right;"><th halign="left">a</th></tr></tbody></table>',
        '<a href="../guide.html#x">a</a><a href="https://example.org/?a=1&amp;b=2">b</a><a href="mailto:a@example.org">c</a>',
        '<img alt="a &quot;b&quot;" src="data:image/png;base64,iVBORw0KGgo="/><img alt="" src="figures/a.png" width="3"/>',
        "<details><summary>Answer</summary><pre><span class=\"k\">def</span> f(): 'it'</pre></details>",
        "<p>onclick=alert(1) and javascript:alert(1) are text here</p>",
    ],
)
def test_what_is_only_shown_stays(html):
    def content(text):
        return [(tag.name, tag.attrs) for tag in BeautifulSoup(text, "html.parser").find_all(True)]

    kept = build_site.harmless(html)
    assert BeautifulSoup(kept, "html.parser").text == BeautifulSoup(html, "html.parser").text
    assert content(kept) == content(html)


def hostile_outputs() -> list:
    """Of every kind that nbconvert knows."""
    shown, ends = nbformat.v4.new_output, "</script><script>window.ran = 1"
    data = [
        *({"text/html": html} for html in WRITTEN),
        {"application/javascript": "window.ran = 1"},
        {"text/markdown": "\n\n".join(WRITTEN)},
        {"text/latex": HOSTILE[0]},
        {"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' onload='window.ran = 1'/>"},
        {"application/vnd.jupyter.widget-view+json": {"model_id": ends}},
    ]
    return [
        *(shown("display_data", content) for content in data),
        shown("display_data", {"text/html": HOSTILE[0]}, metadata={"text/html": {"isolated": True}}),
        shown("display_data", {"image/png": "iVBORw0KGgo="}, metadata={"image/png": {"width": "1 onerror=window.ran=1"}}),
        shown("stream", text=HOSTILE[0] + "\x1b[31m" + HOSTILE[3]),
        shown("error", ename=HOSTILE[0], evalue=HOSTILE[3], traceback=[HOSTILE[0]]),
    ]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A site of a tree without git, in which texts, claims, rows, cells and outputs hold all of HOSTILE."""
    root, new = tmp_path_factory.mktemp("hostile") / "tree", nbformat.v4
    for name in ("notebooks", "figures", "docs"):
        shutil.copytree(ROOT / name, root / name)
    everything = "\n\n".join(WRITTEN)
    for name in ("README.md", "docs/guide.md", "docs/adding_a_method.md"):
        (root / name).write_text((ROOT / name).read_text(encoding="utf-8") + "\n\n" + everything, encoding="utf-8")
    for path in (root / "notebooks").rglob("*.ipynb"):  # of the others the title is enough
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = notebook.cells[:1]
        nbformat.write(notebook, path)
    notebook = nbformat.read(path := root / "notebooks" / "01_parameter_share.ipynb", as_version=4)
    notebook.cells += [
        new.new_code_cell(f"print({HOSTILE[0]!r})  # {HOSTILE[3]}", outputs=hostile_outputs()),
        new.new_markdown_cell(everything),
        new.new_raw_cell(HOSTILE[0], metadata={"raw_mimetype": "text/html"}),
    ]
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"x": "</script><script>window.ran = 1"}}
    nbformat.write(notebook, path)
    for figure in (root / "figures").glob("*.json"):
        content = json.loads(figure.read_text(encoding="utf-8"))
        content["claim"] = HOSTILE[0] + HOSTILE[3]
        content["provenance"] |= {"git": {"commit": None, "dirty": None}, "model": {"id": HOSTILE[0]}}
        for row in content["rows"]:
            row |= {"note": HOSTILE[3], "why": f"</script>{HOSTILE[0]}"}
        figure.write_text(json.dumps(content), encoding="utf-8")
    build_site.build(folder := root / "site", root)
    return folder


@pytest.mark.parametrize("page", SHOWING)
def test_no_page_of_hostile_notebooks_holds_anything_that_runs(page, hostile):
    document = soup(hostile / page)
    for script in document.find_all("script"):
        assert script.get("src", script.get("id")) in OWN
        script.extract()
    if page == "explorer.html":
        document.form.extract()
    check_harmless(str(document.body))


def test_without_git_the_gallery_names_no_commit(hostile):
    facts = soup(hostile / "gallery.html").select(".facts")
    assert facts and not any("commit" in line.text for line in facts)


@pytest.mark.browser
@pytest.mark.parametrize("page", SHOWING)
def test_nothing_hostile_runs_in_a_browser(page, hostile, browser):
    """As the browser reads the page, whose idea of HTML is the one that counts."""
    context = browser.new_context(offline=True)
    opened = context.new_page()
    opened.goto((hostile / page).as_uri(), wait_until="load")
    assert opened.evaluate("typeof window.ran") == "undefined" and len(opened.frames) == 1
    names = opened.evaluate("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
    assert not [name for name in names if name.startswith("on")]
    protocols = opened.evaluate("[...document.links].map(a => a.protocol)")
    assert set(protocols) <= {"file:", "http:", "https:", "mailto:"}
    assert set(opened.evaluate("[...document.scripts].map(s => s.getAttribute('src') || s.id)")) <= OWN
    context.close()


@pytest.mark.browser
def test_the_policy_alone_keeps_a_script_from_running(browser, hostile, tmp_path):
    """Even where the other rule would miss one; and the check of the test above can fail."""
    page = (hostile / "guide.html").read_text(encoding="utf-8")
    planted = '<img src="gone.png" alt="" onerror="window.ran = 1"><script>window.ran = 1</script><iframe src="data:text/html,x">'
    for name, text in {"with": page, "without": page.replace("Content-Security-Policy", "none")}.items():
        (tmp_path / f"{name}.html").write_text(text.replace("</main>", f"{planted}</main>"), encoding="utf-8")
    context, ran = browser.new_context(offline=True), {}
    for name in ("with", "without"):
        opened = context.new_page()
        opened.goto((tmp_path / f"{name}.html").as_uri())
        ran[name] = opened.evaluate("window.ran") is not None
    context.close()
    assert ran == {"with": False, "without": True}
