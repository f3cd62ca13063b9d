"""The code of docs/adding_a_method.md runs, here on a tiny model, and registers what it says."""

import re
from pathlib import Path

import pytest
from layer_blocks import LAYERS, deep
from tiny_models import random_windows

import mlpreplace
from mlpreplace import METHODS
from mlpreplace.replacements.splice import sparsity_of

GUIDE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"


def test_the_example_is_registered_calibrated_and_measured(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    model = deep("llama")
    monkeypatch.setattr(mlpreplace, "load_model", lambda name: (model, None))
    monkeypatch.setattr(mlpreplace, "load_windows", lambda *args, seq_len, n_windows: random_windows(n_windows, 16))
    before = dict(METHODS)
    try:
        scope: dict = {}
        exec(code, scope)
        assert METHODS.keys() - before.keys() == {"last_layers"} and METHODS["last_layers"].title == "Last layers"
        plan = METHODS["last_layers"](model, scope["known"], 0.5)
    finally:
        METHODS.clear()
        METHODS.update(before)
    assert {b.layer for b in plan} == {3, 4, 5} and sparsity_of(model, plan) == pytest.approx(3 / LAYERS)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["dense", "last_layers", "shortgpt"]
    assert not scope["known"].blocks and not scope["known"].spans
