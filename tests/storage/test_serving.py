"""What it takes to serve a model, measured in processes of its own."""

import pytest
import torch
from tiny_models import build

from mlpreplace import find_blocks, splice
from mlpreplace.evaluation import quantized
from mlpreplace.methods.sliding import drop_mlps
from mlpreplace.storage import serving_cost


def test_less_is_on_disk_where_less_is_left():
    """Both are loaded and answer, and files hold what the models hold."""
    model = build("llama", hidden_size=64, intermediate_size=512)
    models = {"dense": model, "small": quantized(splice(model, drop_mlps(find_blocks(model))))}
    found = serving_cost(models, torch.arange(8)[None], rounds=1)
    assert found["dense"].file_mb == pytest.approx(4 * sum(p.numel() for p in model.parameters()) / 1e6, rel=0.1)
    assert found["small"].file_mb < 0.5 * found["dense"].file_mb
    for cost in found.values():
        assert cost.load_seconds.shape == cost.peak_memory_mb.shape == (1,) and cost.load_seconds > 0


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr("mlpreplace.storage.serving._save_whole", lambda model, folder: folder.mkdir())
    with pytest.raises(RuntimeError, match="config.json|Unrecognized|model_type"):
        serving_cost({"dense": build("llama")}, torch.arange(8)[None], rounds=1)


def test_bad_requests():
    model = build("llama")
    with pytest.raises(ValueError, match="rounds ≥ 1, got 0"):
        serving_cost({"dense": model}, torch.arange(8)[None], rounds=0)
