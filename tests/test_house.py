"""The house: rooms in the order of the data, files in the order of their room, and nothing private crosses a file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mlpreplace

PACKAGE = Path(mlpreplace.__file__).parent
HOUSE = {  # every room, left to right, and its files, top to bottom: each may import what stands before it
    "runtime": "files turns fingerprint cache memory half_products parallel usage",
    "texts": "assets corpora windows glue",
    "models": "stack guess architectures weights blocks parameters attention layers inputs forward walk generation checkpoints"
    " gguf loading",
    "replacements": "kv_cache records modules families narrow_attention plus_mean factored hybrids nested whole_layers splice",
    "statistics": "collect records groups weight_check accumulator moments residual_stream gradients fisher unit_similarity",
    "fitting": "ridge neurons errors heads features closed_form pairs state training fit candidate_errors",
    "evaluation": "sweep perplexity tasks.files tasks.run tasks.scores tasks.probe tasks speed int8 rounding pruning"
    " parameter_share",
    "planning": "knapsack candidates damage search allocate read_out refit_layer refit objectives distil nest",
    "methods": "calibration registry layer_drop uniform recipe shortgpt uidl replaceme streamline subfit flap modegpt"
    " svd_llm merging sliding",
    "beyond_language": "images translation pretrain",
    "storage": "tensors card record rebuild save export serving",
    "reporting": "tables correlations record plots.looks plots.style plots.parameter_share plots.single_block plots.sensitivity"
    " plots.full_replacement plots.ingredients plots.comparison plots.subfit plots.merging notebook",
}
FILES = [f"{room}.{file}" for room, files in HOUSE.items() for file in files.split()]
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}


def imports(module: str) -> list[tuple[str, str]]:
    """(module, name) of everything that a module imports from the package."""
    here = module.split(".")
    found = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = [*here[: len(here) - node.level], *(node.module or "").split(".")]
            found += [(".".join(filter(None, source)), alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__init__") and "." in m])
def test_a_file_imports_only_what_stands_before_it(module):
    assert module in FILES, f"{module} has no place in the house"
    assert {source for source, _ in imports(module)} <= set(FILES[: FILES.index(module)])


def test_no_private_name_crosses_a_file():
    crossing = [(m, name) for m in MODULES for _, name in imports(m) if name.startswith("_") and not name.startswith("__")]
    assert not crossing


def test_every_room_says_what_it_holds():
    for room in HOUSE:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert text and text.split("\n\n")[0].count(".") == 1, room


def test_files_stay_short_and_names_few():
    long = {m: n for m, p in MODULES.items() if (n := len(p.read_text().splitlines())) > 300}
    assert not long
    modules = {name for name in dir(mlpreplace) if (PACKAGE / name).is_dir()}
    assert len([name for name in dir(mlpreplace) if not name.startswith("_") and name not in modules]) <= 35


def test_the_version_is_that_of_the_project():
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'version = "{mlpreplace.__version__}"' in text
