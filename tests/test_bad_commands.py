"""Command lines that cannot be met: one line says why, nothing is run first and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer, save_locally
from tiny_models import build

from mlpreplace.__main__ import main


def written(place: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in place.rglob("*") if p.is_file()}


COMMANDS = {  # arguments of the command line; MODEL, TEXT and PLACE stand for paths
    "a sparsity above one": ("compress MODEL --sparsity 1.5 --out PLACE/s", ["1.5"]),
    "a negative sparsity": ("compress MODEL --sparsity -0.1 --out PLACE/s", ["-0.1"]),
    "a model that is not there": ("compress ./nowhere --sparsity 0.2 --out PLACE/s", ["nowhere"]),
    "a folder under a file": ("compress MODEL --sparsity 0.2 --out TEXT/s", ["text.jsonl/s"]),
    "a folder that is there": ("compress MODEL --sparsity 0.2 --out PLACE", ["choose another"]),
    "a name that is too long": (f"compress MODEL --sparsity 0.2 --out PLACE/{'x' * 300}", ["long"]),
    "a text that is not there": ("compress MODEL --sparsity 0.2 --out PLACE/s --text nowhere.txt", ["nowhere.txt"]),
    "a held-out text that is not there": ("compress MODEL --sparsity 0.2 --out PLACE/s --heldout ./no.txt", ["no.txt"]),
    "no windows": ("compress MODEL --sparsity 0.2 --out PLACE/s --windows 0", ["0"]),
    "negative windows": ("compress MODEL --sparsity 0.2 --out PLACE/s --windows -3", ["-3"]),
    "windows of one token": ("compress MODEL --sparsity 0.2 --out PLACE/s --seq-len 1", ["1"]),
    "windows beyond the context": ("compress MODEL --sparsity 0.2 --out PLACE/s --seq-len 4096", ["4096"]),
    "no validation windows": ("compress MODEL --sparsity 0.2 --out PLACE/s --validation-windows 0", ["0"]),
    "a negative number of steps": ("compress MODEL --sparsity 0.2 --out PLACE/s --healing-steps -1", ["-1"]),
    "an unknown method": ("compress MODEL --sparsity 0.2 --out PLACE/s --method best", ["best"]),
    "an unknown form": ("compress MODEL --sparsity 0.2 --out PLACE/s --form zip", ["zip"]),
    "a device that is none": ("compress MODEL --sparsity 0.2 --out PLACE/s --device tpu9", ["tpu9"]),
    "nothing to evaluate": ("evaluate ./nowhere", ["nowhere"]),
    "a dense folder to evaluate": ("evaluate MODEL", ["replacements.json"]),
    "no command": ("", ["compress"]),
}


@pytest.mark.parametrize(("typed", "fragments"), COMMANDS.values(), ids=COMMANDS)
def test_the_command_line_says_it_in_a_line(typed, fragments, tmp_path, results, capsys):
    place = tmp_path / "given"
    place.mkdir()
    (text := place / "text.jsonl").write_text("\n".join(json.dumps({"text": f"word number {i} " * 20}) for i in range(60)))
    paths = {"MODEL": save_locally(build("llama"), place / "model", byte_tokenizer()), "TEXT": str(text), "PLACE": str(place)}
    arguments = typed.split()
    if arguments[:1] == ["compress"] and "--text" not in arguments:
        arguments += ["--text", "TEXT"]
    if arguments:
        arguments += ["--heldout-windows", "1"] + (["--heldout", "TEXT"] if "--heldout" not in arguments else [])
        arguments += ["--seq-len", "32"] if "--seq-len" not in arguments else []
    for name, path in paths.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    before = written(place)
    try:
        code = main(arguments)
    except SystemExit as usage:  # of argparse
        code = usage.code
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert code == 2 and "Traceback" not in said
    assert all(fragment.lower() in line.lower() for fragment in fragments), line
    assert written(place) == before and not (place / "s").exists()
