"""Every method by name: what it removes, that it decodes alike with and without cache, what calibrate captures for it."""

from dataclasses import replace

import pytest
import torch
from conftest import save_locally
from layer_blocks import calibrated, deep
from test_past import decoded, logits
from tiny_models import DECODERS, MIXTURES, random_windows

from mlpreplace import Linear, allocate, capture, find_blocks, load, load_model, save, sparsity, splice, spliced
from mlpreplace.baselines import METHODS, Calibration, Method, calibrate
from mlpreplace.blocks import block_parameters
from mlpreplace.layers import layer_parameters, without_layers
from mlpreplace.past import TokenCount

WHOLE = {"shortgpt", "shortgpt_linear", "uidl", "uidl_linear", "replaceme", "replaceme_cosine", "streamline_layer"}
FUSED = {"replaceme", "replaceme_cosine"}
REFUSED = dict.fromkeys([*MIXTURES, "gemma2", "gemma3_text"], FUSED)  # nothing to fuse a map into
GENERATE = dict(max_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture(scope="module")
def prepared():
    """name → (model, calibration for every method at two sparsities), each made once."""
    made = {}

    def of(name):
        if name not in made:
            model = deep(name)
            made[name] = model, calibrated(model, (0.25, 0.4))
        return made[name]

    return of


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_does_not_depend_on_the_cache(name, method, prepared):
    """32 tokens, greedily, in a batch that is padded on the left, at a quarter less parameters."""
    if method in REFUSED.get(name, ()):
        pytest.skip("refused, see the method's own tests")
    model, calibration = prepared(name)
    ids, mask = random_windows(2, 8, seed=5), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    dense = logits(model, ids)
    with spliced(model, METHODS[method](model, calibration, 0.25)):
        cached, full = (model.generate(ids, attention_mask=mask, use_cache=u, **GENERATE) for u in (True, False))
        assert (logits(model, ids) - dense).abs().max() > 1e-3
    assert torch.equal(cached, full)
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("target", [0.25, 0.4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_what_is_removed(name, method, target, prepared):
    """The parameters that really go, norms apart, are the sparsity; whole layers come as near as they can."""
    model, calibration = prepared(name)
    plan = METHODS[method](model, calibration, target)
    compressed, own = splice(model, plan), block_parameters(model)
    norms = sum(
        p.numel() for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)
    ) - sum(p.numel() for m in compressed.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False))
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in compressed.parameters()) - norms
    assert sparsity(model, plan) == pytest.approx(gone / own)
    if method in WHOLE:
        bypasses = sum(r.n_params for r in plan.values() if r.family == Linear())
        assert abs(sparsity(model, plan) - target) <= (max(layer_parameters(model)) / 2 + bypasses) / own + 1e-9
    elif method == "streamline_mlp":
        assert sparsity(model, plan) == pytest.approx(target, abs=0.004)
    else:
        assert sparsity(model, plan) >= target


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_is_made_again_and_leaves_no_trace(method, prepared):
    model, calibration = prepared("llama")
    before, ids = dict(model.named_modules()), random_windows(2, 6)
    one, two = (METHODS[method](model, calibration, 0.25) for _ in range(2))
    assert {b.name for b in one} == {b.name for b in two}
    with spliced(model, one):
        first = logits(model, ids)
    with spliced(model, two):
        assert torch.equal(logits(model, ids), first)
    after = dict(model.named_modules())
    assert before.keys() == after.keys() and all(after[path] is module for path, module in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", sorted(WHOLE | {"streamline_mlp"}))
def test_removed_layers_store_nothing(method, prepared):
    model, calibration = prepared("llama")
    plan, ids = METHODS[method](model, calibration, 0.4), random_windows(2, 7)
    gone = sorted(b.layer for b in plan if b.kind == "attention")
    with spliced(model, plan), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert [i for i, layer in enumerate(cache.layers) if isinstance(layer, TokenCount)] == gone and gone
    assert all(cache.layers[i].keys.numel() == 0 for i in gone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_saved_and_loaded_bit_for_bit(name, method, tmp_path):
    model, _ = load_model(save_locally(deep(name).float(), tmp_path / "base"), device="cpu")
    compressed = splice(model, METHODS[method](model, calibrated(model, (0.3,), [method]), 0.3))
    again, ids = load(save(compressed, tmp_path / "out"), device="cpu"), random_windows(2, 9)
    assert torch.equal(logits(again, ids), logits(compressed, ids))
    assert torch.equal(decoded(again, ids, 4), decoded(compressed, ids, 4))


def test_a_method_is_one_function(llama, monkeypatch):
    monkeypatch.setitem(METHODS, "last", Method(lambda model, calibration, sparsity: without_layers(model, [2])))
    calibration = calibrate(llama, random_windows(6, 8), [0.3], methods=["last"], blocks={}, progress=False)
    assert sparsity(llama, METHODS["last"](llama, calibration, 0.3)) == pytest.approx(1 / 3)
    assert not calibration.spans


def test_one_calibration_serves_all_sparsities():
    """And holds the spans of every method that asks for some, each once."""
    model, sparsities = deep("llama"), (0.2, 0.4)
    calibration = calibrate(model, random_windows(9, 12), sparsities, choose_windows=None, progress=False)
    asked = [m.spans(model, calibration.stream, s) for m in METHODS.values() if m.spans for s in sparsities]
    assert set(calibration.spans) == {span for spans in asked for span in spans}
    assert calibration.stream.tokens == 5 * 12
    some = calibrate(model, random_windows(9, 12), [0.2], methods=["uidl"], choose_windows=2, blocks={}, progress=False)
    assert some.stream.tokens == 3 * 12 and not some.spans  # windows 0, 2 and 4 of the five that are fitted on


def test_statistics_that_are_there_are_taken(llama):
    blocks, ids = find_blocks(llama), random_windows(6, 8)
    stats = capture(llama, blocks, ids, validation_windows=2, progress=False)
    calibration = calibrate(llama, ids, [0.3], methods=["uniform"], blocks=stats, progress=False)
    assert calibration.blocks is stats
    assert sparsity(llama, METHODS["uniform"](llama, calibration, 0.3)) >= 0.3


def test_the_allocation_measures_where_it_may(prepared):
    """With validation windows it is the joint strategy, without the exact knapsack."""
    model, calibration = prepared("llama")
    choices = dict(candidates=calibration.candidates)
    assert METHODS["allocated"](model, calibration, 0.4) == allocate(model, calibration.blocks, 0.4, "milp", **choices)
    measured = replace(calibration, validation=random_windows(3, seed=8))
    joint = allocate(model, calibration.blocks, 0.4, "joint", windows=measured.validation, **choices)
    assert METHODS["allocated"](model, measured, 0.4) == joint


def test_errors(llama):
    ids = random_windows(6, 8)
    with pytest.raises(ValueError, match="Unknown method 'prune'; known are uniform, .*subfit"):
        calibrate(llama, ids, [0.3], methods=["prune"], progress=False)
    with pytest.raises(ValueError, match="sparsity=0.99 cannot be reached"):
        calibrate(llama, ids, [0.99], methods=["replaceme"], progress=False)
    with pytest.raises(ValueError, match="no candidates to allocate"):
        METHODS["allocated"](llama, Calibration(), 0.3)
    with pytest.raises(ValueError, match="No mlp block was captured"):
        METHODS["uniform"](llama, Calibration(), 0.3)
    for method in METHODS:
        for wrong in (-1, 0, 1):
            stream = calibrate(llama, ids, [0.3], methods=[], progress=False)
            stream.candidates = {b: [] for b in stream.blocks}
            with pytest.raises(ValueError, match="0 < sparsity < 1"):
                METHODS[method](llama, stream, wrong)
