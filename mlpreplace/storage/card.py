"""The model card of a saved model: base model, replaced blocks, metrics, and how to load it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping

from ..replacements.families import Family

DELTA, STANDALONE, PLAIN = "delta", "standalone", "plain"  # forms of a saved model: replacements alone, all, a plain checkpoint
LOADING = {
    DELTA: "from mlpreplace import load\n\nmodel = load(folder)  # fetches {base}; refused when its weights differ",
    STANDALONE: "from mlpreplace import load\n\nmodel = load(folder)  # everything is here",
    PLAIN: "from transformers import {model}\n\nmodel = {model}.from_pretrained(folder)",
    "widths": "from mlpreplace import load\n\nmodel = load(folder)  # transformers does not read widths layer by layer yet",
}


def model_card(record: Mapping) -> str:
    """A README.md in the format of the Hugging Face hub, from the content of replacements.json."""
    base, parameters = record["base"] or {}, record["parameters"]
    name = _name(base.get("id", f"a {record['model']}"))
    front = {"library_name": "transformers" if record["form"] == PLAIN else "mlpreplace"}
    if base.get("revision"):  # only models of the hub have one
        front |= {"base_model": json.dumps(base["id"], ensure_ascii=False)}  # json is yaml, too
    if record["model"].endswith("ForCausalLM") or record["model"].endswith("LMHeadModel"):
        front |= {"pipeline_tag": "text-generation"}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "tags:", "- mlpreplace", "- compression", "---", ""]
    replaced = record["replacements"]
    lines += [f"# {name}, {len(replaced)} blocks replaced" if replaced else f"# {name} in int8", ""]
    if replaced:
        lines += [
            f"{record['sparsity']:.1%} of all attention and MLP parameters are gone, {parameters['dense']:,} parameters became "
            f"{parameters['compressed']:,} ({record['dtype']}).",
            "",
            *_table(("replacement", "blocks"), _by_family(replaced).items()),
        ]
    if record["int8"]:
        lines += [f"{len(record['int8'])} linear layers compute in int8.", ""]
    if record["metrics"]:
        lines += ["## Metrics", "", *_table(("metric", "value"), record["metrics"].items())]
    kind = "widths" if record["form"] == PLAIN and record["widths"] else record["form"]
    lines += ["## Loading", "", "```python", LOADING[kind].format(base=name, model=record["model"]), "```", ""]
    if base:
        found = {"revision": "revision", "sha256": "sha256", "weights": "hash of the weights as they were loaded"}
        known = [f"{label} `{_name(base[key])}`" for key, label in found.items() if base.get(key)]
        lines += ["## Base model", "", f"{', '.join([f'`{name}`', *known])}.", ""]
    made = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    return "\n".join([*lines, f"Made with {made}. `replacements.json` has every block by name.", ""])


def _by_family(replacements: Mapping[str, Mapping]) -> dict[str, str]:
    """{replacement: names of its blocks}"""
    blocks = defaultdict(list)
    for name, spec in replacements.items():
        family = Family.from_dict({k: v for k, v in spec.items() if k not in ("report", "body")})
        blocks[str(family)].append(f"`{name}`")
    return {family: ", ".join(names) for family, names in blocks.items()}


def _table(header: tuple[str, str], rows) -> list[str]:
    cells = [" | ".join(_cell(cell) for cell in row) for row in rows]
    return [f"| {' | '.join(header)} |", "|---|---|", *(f"| {row} |" for row in cells), ""]


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _line(value).replace("|", "\\|")


def _name(value) -> str:
    return _line(value).replace("`", "'")


def _line(value) -> str:
    """``value`` as text that does not end its line and opens no html."""
    return " ".join(str(value).split()).replace("<", "&lt;")
