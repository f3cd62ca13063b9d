"""Every number of the README's results is one of a figure's json: a new run says here what the README has to say."""

import json
import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WIKI, SPEECHES, CODE = DOMAINS = "bundled/wiki", "bundled/speeches", "bundled/code"
NAMES = r"\[\d\d\]\([^)]*\)|\]\([^)]*\)|SmolLM2(-135M)?|8-bit|top-1"  # notebooks, links, names: no results


@cache
def figure(name: str) -> dict:
    return json.loads((ROOT / "figures" / f"{name}.json").read_text())


def rows(name: str, **fields) -> list[dict]:
    return [r for r in figure(name)["rows"] if all(r[key] == value for key, value in fields.items())]


def row(name: str, **fields) -> dict:
    (found,) = rows(name, **fields)
    return found


SPARSITIES = figure("04_pareto")["provenance"]["parameters"]["SPARSITIES"]
MIDDLE = SPARSITIES[1]


# Numbers as the README shows them.


def times(x: float) -> str:
    """Three significant digits, at most two behind the point."""
    return f"×{x:.{2 if x < 9.995 else 1 if x < 99.95 else 0}f}"


def share(x: float) -> str:
    return f"{100 * x:.1f}".removesuffix(".0") + " %"


def percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def both(name: str, method: str, sparsity: float) -> str:
    ratios = [row(name, method=method, sparsity=sparsity, domain=d)["perplexity_ratio"] for d in (WIKI, SPEECHES)]
    return f"{times(ratios[0])} ({times(ratios[1])})"


# The tables: {first cell of the head: (head, {first cell of a line: the cells after it})}; None is a cell of words.


def others(name: str) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in figure(name)["rows"] if r["method"] != "dense"))


def pareto() -> dict[str, list]:
    return {m: [both("04_pareto", m, s) for s in SPARSITIES] for m in others("04_pareto")}


def comparison() -> dict[str, list]:
    name = "05_perplexity_vs_sparsity"

    def cost(method: str, sparsity: float) -> str:
        of = [times(row(name, method=method, sparsity=sparsity, domain=d)["perplexity_ratio"]) for d in (WIKI, SPEECHES, CODE)]
        return f"{of[0]} ({of[1]}, {of[2]})"

    def beside(method: str) -> str:
        r = row(name, method=method, sparsity=MIDDLE, domain=WIKI)
        low, high = (times(r[f"matched_{end}"]).removeprefix("×") for end in ("low", "high"))
        return "–" if method == "recipe" else f"{times(r['matched_ratio'])} [{low}, {high}]"

    of = {r["title"]: r["method"] for r in rows(name, sparsity=MIDDLE, domain=WIKI)}
    return {title: [None, *(cost(m, s) for s in SPARSITIES), beside(m)] for title, m in of.items()}


def megabytes() -> dict[str, list]:
    def cell(form: str, sparsity: float) -> str:
        wiki, speeches = (row("04_megabytes", form=form, sparsity=sparsity, domain=d) for d in (WIKI, SPEECHES))
        return f"{wiki['megabytes']:.0f} MB, {times(wiki['perplexity_ratio'])} ({times(speeches['perplexity_ratio'])})"

    forms = dict.fromkeys(r["form"] for r in rows("04_megabytes") if r["megabytes"])
    return {form: [cell(form, s) for s in (0.0, *SPARSITIES)] for form in forms}


def merging() -> dict[str, list]:
    def shown(method: str, task: str, tuned: bool) -> str:
        r = row("06_merging", method=method, task=task, tuned=tuned, saved=0.5)
        style = {"accuracy": lambda x: f"{100 * x:.1f} %", "BLEU": "{:.1f}".format}
        return style.get(r["measure"], times)(r["score"])

    tasks = ["language", "vision", "translation, encoder", "translation, decoder"]
    return {m: [f"{shown(m, t, False)} → {shown(m, t, True)}" for t in tasks] for m in others("06_merging")}


def at_a_quarter() -> list[dict]:
    return [r for r in rows("02_error_vs_parameters", split="heldout") if abs(r["share_of_block"] / 0.25 - 1) < 0.1]


def families() -> dict[str, list]:
    def error(family: str, trained: bool) -> str:
        found = [r["median"] for r in at_a_quarter() if r["family"] == family and (r["trained"] is not None) == trained]
        return f"{sum(found) / len(found):.3f}" if found else "–"

    return {f"`{f}`": [error(f, False), error(f, True), None] for f in dict.fromkeys(r["family"] for r in at_a_quarter())}


SHARES = [share(s) for s in SPARSITIES]
TABLES = [
    (["method", *SHARES], pareto),
    (["weights", "dense", *SHARES], megabytes),
    (["method", "removes", *SHARES, "÷ the recipe"], comparison),
    (["a half of the MLPs saved"], merging),
    (["family", "closed form", "trained"], families),
]


def phrases() -> list[str]:
    """What the prose around the tables says, as it has to stand there."""
    texts = figure("04_pareto")["provenance"]["texts"]
    calibration, (scored, *_) = texts["calibration"], [r["tokens"] for r in rows("04_pareto", domain=WIKI)]
    healed, long = (row("04_healing", method=f"recipe + {m}", sparsity=MIDDLE, domain=WIKI) for m in ("healing", "long healing"))
    fast = sorted((r for r in rows("04_speed") if r["method"] != "dense"), key=lambda r: r["sparsity_achieved"])
    gained = [percent((r["prefill_speedup"] - 1) / (r["prefill_ideal"] - 1)) for r in fast]
    kept = {r["method"]: r for r in rows("05_tasks", task="average") if r["method"] != "dense"}
    both_of = {
        m: [percent(kept[name]["accuracy_retained"]) for name in (m, f"{m} + healing")] for m in ("recipe", "replaceme", "subfit")
    }
    doubt = sorted(r["accuracy_retained_se"] for r in kept.values())
    achieved = {
        m: row("05_perplexity_vs_sparsity", method=m, sparsity=MIDDLE, domain=WIKI)["sparsity_achieved"]
        for m in ("replaceme", "shortgpt_linear")
    }
    hardest = max(rows("05_redundancy", kind="mlp"), key=lambda r: r["damage"])
    beside = {
        d: [r for r in rows("05_perplexity_vs_sparsity", domain=d) if r["method"] not in ("dense", "recipe")] for d in DOMAINS
    }
    above = {d: sum(r["matched_low"] > 1 for r in of) for d, of in beside.items()}
    assert above[WIKI] == len(beside[WIKI]) and above[SPEECHES] == len(beside[SPEECHES])
    below, on_code = sum(r["matched_high"] < 1 for r in beside[CODE]), [r for r in beside[CODE] if r["sparsity"] == MIDDLE]
    vision, bleu = (row("06_merging", method="dense", task=t)["score"] for t in ("vision", "translation, encoder"))
    single = figure("02_error_vs_parameters")["provenance"]["texts"]
    (active,) = {percent(r["active_share_of_block"]) for r in at_a_quarter() if r["family"] == "MixtureOfExperts"}
    return [
        f"{scored:,} tokens each in windows of {calibration['sequence_length']}",
        f"Fits see {calibration['tokens']:,} tokens",
        f"distilled for {healed['healing_steps']} steps ({healed['healing_tokens']:,} tokens that no fit saw)",
        f"*long healing*: for {long['healing_steps']} ({long['healing_tokens']:,})",
        "by {}, {} and {} of the gain that the FLOPs promise".format(*gained),
        "at {}, the recipe keeps {} and healed {}".format(share(MIDDLE), *both_of["recipe"]),
        "ReplaceMe {} and {}, SubFit-style {} and {}".format(*both_of["replaceme"], *both_of["subfit"]),
        f"each ± {100 * doubt[0]:.0f} to {percent(doubt[-1])}",
        f"(at {share(MIDDLE)} that is {share(achieved['replaceme'])}, with ShortGPT's linear maps "
        f"{share(achieved['shortgpt_linear'])})",
        f"take in layer {hardest['layer']}, ",
        f"{beside[CODE][0]['tokens']:,} held-out tokens each",
        f"each of the {above[WIKI] + above[SPEECHES]} intervals lies above 1",
        f"in {above[CODE]} of {len(beside[CODE])} comparisons, and above it in {below}. At {share(MIDDLE)} no method "
        f"keeps code at less than {times(min(r['perplexity_ratio'] for r in on_code))}",
        f"with a 95 % interval paired over windows, at {share(MIDDLE)}",
        f"(dense {share(vision)})",
        f"(dense BLEU {bleu:.1f})",
        f"median over {single['heldout']['tokens']:,} held-out Wikipedia tokens",
        f"fitted on {single['calibration']['tokens']:,} tokens",
        f"; {active} of the block's parameters active",
        f"each method takes at {share(MIDDLE)}",
    ]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def problems(section: str) -> list[str]:
    """What the README's results say and no figure does, each with what has to stand there."""
    found = []
    for head, lines_of in TABLES:
        expected, tables = lines_of(), section.split("\n\n")
        matching = [t for t in tables if t.startswith("|") and cells(t.splitlines()[0])[: len(head)] == head]
        if len(matching) != 1:
            found.append(f"expected one table with the head {head}, found {len(matching)}")
            continue
        lines = {cells(line)[0]: cells(line)[1:] for line in matching[0].splitlines()[2:]}
        found += [f"no line for {name!r}, expected {expected[name]}" for name in expected.keys() - lines.keys()]
        found += [f"the line {name!r} is of no method of the figure" for name in lines.keys() - expected.keys()]
        for name in lines.keys() & expected.keys():
            pairs = list(zip(lines[name], expected[name], strict=True))
            found += [f"{name}: {shown!r} has to be {right!r}" for shown, right in pairs if right not in (None, shown)]
        words = [
            shown for name in lines for shown, right in zip(lines[name], expected.get(name, []), strict=False) if right is None
        ]
        section = section.replace(matching[0], "\n".join(words))
    prose = re.sub(NAMES, "", " ".join(section.split()))
    for phrase in phrases():
        if phrase not in prose:
            like = re.sub(r"\d[\d,]*(\\\.\d+)?", r"\\d[\\d,]*(\\.\\d+)?", re.escape(phrase))
            stands = re.search(like, prose)
            found.append(f"{stands.group() if stands else 'nothing'!r} has to be {phrase!r}")
            prose = prose.replace(stands.group(), "") if stands else prose
        prose = prose.replace(phrase, "")
    left = re.findall(r".{0,30}\d.{0,30}", prose)
    return found + [f"no source for the number in {piece!r}" for piece in left]


def results() -> str:
    text = (ROOT / "README.md").read_text()
    return re.search(r"\n## What it shows\n(.*?)\n## ", text, re.DOTALL).group(1)


def test_every_number_of_the_results_is_a_figure_s():
    found = problems(results())
    assert not found, "README.md, What it shows:\n  " + "\n  ".join(found)


def planted(change) -> set[str]:
    """The problems of the results with one thing changed in them, beyond those they have."""
    changed = change(results())
    assert changed != results()
    return set(problems(changed)) - set(problems(results()))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: re.sub(r"(\| greedy \| ×)[\d.]+", r"\g<1>9.99", text),  # a cell
        lambda text: text.replace("| UIDL | a span of layers |", "| UIDL | 7 layers |"),  # words of a table
        lambda text: re.sub(r"(windows of )\d+", r"\g<1>500", text),  # a number of the prose
        lambda text: text.replace("Matching makes merging", "In 9 of 10 cases matching makes merging"),  # of no source
        lambda text: re.sub(r"\n\| nested \|.*", "", text),  # a method that is left out
    ],
)
def test_a_number_of_no_figure_is_found(change):
    assert len(planted(change)) == 1


# The gallery: a claim is its figure's, word for word, and every figure is there once.


def gallery() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    return [cells(line) for line in re.search(r"\n## Gallery\n.*?\n(\|.*?)\n\n", text, re.DOTALL).group(1).splitlines()[2:]]


def linked(cell: str, folder: str, ending: str) -> list[str]:
    return re.findall(rf"\]\({folder}/([^)]*)\.{ending}\)", cell)


def test_the_gallery_says_what_its_figures_say():
    for notebook, claim, shown, others in gallery():
        (source,), (main,) = linked(notebook, "notebooks", "ipynb"), linked(shown, "figures", "png")
        title = json.loads((ROOT / "notebooks" / f"{source}.ipynb").read_text())["cells"][0]["source"]
        assert notebook.endswith("".join(title).splitlines()[0].lstrip("# "))
        assert claim == figure(main)["claim"], f"the claim of {main} is: {figure(main)['claim']}"
        for name in (main, *linked(others, "figures", "png")):
            assert figure(name)["provenance"]["notebook"] == source, name


def test_every_figure_is_in_the_gallery_once():
    named = [name for line in gallery() for name in linked(" ".join(line[2:]), "figures", "png")]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "figures").glob("*.json"))


@pytest.mark.parametrize(("command", "where"), [("the first `make figures`", "[0-9]*"), ("`make studies`", "studies/*")])
def test_the_memory_that_is_asked_for_is_what_was_used(command, where):
    """Or a little more: what the cache held already was not computed again."""
    records = [json.loads(path.read_text())["provenance"] for path in (ROOT / "figures").glob("*.json")]
    used = max(r["peak_memory_mb"] for r in records if fnmatch(r["notebook"], where))
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if cells(line)[0] == command)
    (asked,) = re.findall(r"(\d+) GB of memory", line)
    assert used <= 1000 * int(asked) <= 1.25 * used
