"""Every method by name: what it removes, that it decodes alike with and without cache, what calibrate captures for it."""

from pathlib import Path

import pytest
import torch
from conftest import save_locally
from decoding import decoded, logits
from layer_blocks import calibrated, deep
from tiny_models import DECODERS, MIXTURES, random_windows

from mlpreplace import Linear, capture, find_blocks, load, load_model, refit, save, splice, spliced
from mlpreplace.methods.calibration import Calibration
from mlpreplace.methods.registry import METHODS, calibrate, method, methods_table
from mlpreplace.models.layers import layer_parameters
from mlpreplace.models.parameters import block_parameters
from mlpreplace.planning import candidate_families, choose
from mlpreplace.replacements.kv_cache import TokenCount
from mlpreplace.replacements.splice import sparsity_of
from mlpreplace.replacements.whole_layers import without_layers
from mlpreplace.statistics import fisher_effects, with_effects
from mlpreplace.statistics.groups import InGroups
from mlpreplace.statistics.moments import MOMENTS
from mlpreplace.statistics.residual_stream import capture_stream

WHOLE = {"shortgpt", "shortgpt_linear", "uidl", "uidl_linear", "replaceme", "replaceme_cosine", "streamline_layer"}
SPANNED = {"shortgpt_linear", "uidl_linear", "replaceme", "replaceme_cosine", "streamline_layer", "streamline_mlp"}
READ = {  # moments of blocks
    "uniform": {"mlp": {"hidden"}},
    **dict.fromkeys(("subfit", "subfit_shared"), {"mlp": {"input"}, "attention": {"input"}}),
    "uniform_refit": {"mlp": {"hidden"}},
    **dict.fromkeys(("flap", "flap_refit"), {"mlp": {"hidden"}, "attention": {"hidden"}}),
    **dict.fromkeys(("modegpt", "svd_llm"), {"mlp": {"input", "hidden"}, "attention": {"input", "hidden"}}),
    "recipe": {"mlp": {"input", "hidden", "cross"}, "attention": {"input", "hidden"}},
}
OURS = {"recipe", "uniform_refit"}  # which read effects
FUSED, INSIDE = {"replaceme", "replaceme_cosine"}, {"flap", "flap_refit", "modegpt", "svd_llm"}
REFUSED = dict.fromkeys(["gemma2", "gemma3_text", "glm4"], FUSED)  # nothing to fuse a map into
REFUSED |= dict.fromkeys(MIXTURES, FUSED | INSIDE)  # nor neurons to choose
GENERATE = dict(max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)


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
    """16 tokens, greedily, in a batch that is padded on the left, at a quarter less parameters."""
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
    assert sparsity_of(model, plan) == pytest.approx(gone / own)
    if method in WHOLE:
        bypasses = sum(r.n_params for r in plan.values() if r.family == Linear())
        assert abs(sparsity_of(model, plan) - target) <= (max(layer_parameters(model)) / 2 + bypasses) / own + 1e-9
    elif method == "streamline_mlp":
        assert sparsity_of(model, plan) == pytest.approx(target, abs=0.004)
    else:
        assert sparsity_of(model, plan) >= target


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


@pytest.fixture
def registered():
    """METHODS, for a test to write into."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def test_a_method_is_one_function(llama, registered):
    @method("first", title="First layer", removes="a layer", layer=0)
    @method("last", title="Last layer", removes="a layer")
    def one(model, calibration, sparsity, *, layer=2):
        return without_layers(model, [layer])

    assert one(llama, Calibration(), 0.3).keys() == registered["last"](llama, Calibration(), 0.3).keys()
    for name, layer in (("first", 0), ("last", 2)):
        calibration = calibrate(llama, random_windows(6, 8), [0.3], methods=[name], progress=False)
        plan = registered[name](llama, calibration, 0.3)
        assert sparsity_of(llama, plan) == pytest.approx(1 / 3) and {b.layer for b in plan} == {layer}
        assert not (calibration.stream or calibration.spans or calibration.blocks or calibration.effects)
    method("last", title="Another", removes="nothing")(lambda *args: {})
    assert registered["last"].title == "Another" and registered["last"](llama, Calibration(), 0.3) == {}


def held(calibration: Calibration) -> dict[str, set[str]]:
    """{kind of block: moments that were captured}"""
    found: dict[str, set[str]] = {}
    for block, s in calibration.blocks.items():
        moments = {moment for moment, field in MOMENTS.items() if getattr(s, field) is not None}
        assert found.setdefault(block.kind, moments) == moments
    return found


@pytest.mark.parametrize("name", METHODS)
def test_calibrate_captures_what_a_method_needs_and_no_more(name, prepared):
    """And the plan is the one that a calibration for all methods leads to, bit for bit."""
    model, of_all = prepared("llama")
    own = calibrated(model, (0.25, 0.4), [name])
    assert held(own) == READ.get(name, {})
    assert (own.stream is not None) == (name not in READ or name in ("subfit", "subfit_shared", "modegpt"))
    assert bool(own.spans) == (name in SPANNED) and own.spans.keys() <= of_all.spans.keys()
    assert not any(s.train for s in own.blocks.values())
    assert bool(own.effects) == (name in OURS) and all((s.validation is None) == (name in OURS) for s in own.blocks.values())
    plan, other = (METHODS[name](model, calibration, 0.25) for calibration in (own, of_all))
    assert [b.name for b in plan] == [b.name for b in other]
    for block, replacement in plan.items():
        assert replacement.family == other[block].family
        pairs = zip(replacement.state_dict().values(), other[block].state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - READ.keys()))
def test_methods_that_remove_layers_run_no_pass_for_blocks(name, monkeypatch):
    monkeypatch.setattr("mlpreplace.methods.registry.capture", lambda *args, **options: pytest.fail("captured"))
    assert not calibrated(deep("llama"), (0.3,), [name]).blocks


def test_one_pass_serves_methods_that_need_different_moments(prepared, monkeypatch):
    model, of_all = prepared("llama")
    calls = []
    monkeypatch.setattr(
        "mlpreplace.methods.registry.capture", lambda *args, **options: calls.append(1) or capture(*args, **options)
    )
    both = calibrated(model, (0.25,), ["uniform", "subfit"])
    assert (
        calls == [1] and held(both) == dict.fromkeys(("mlp", "attention"), {"input", "hidden"}) and held(of_all) == READ["recipe"]
    )


def test_experts_are_solved_from_inputs_and_sampled_pairs(prepared):
    model, of_all = prepared("mixtral")
    own = calibrated(model, (0.25,), ["uniform"])
    assert held(own) == {"mlp": {"input"}} and all(s.train.tokens == s.tokens for s in own.blocks.values())
    plans = [METHODS["uniform"](model, calibration, 0.25) for calibration in (own, of_all)]
    weights = ([p for r in plan.values() for p in r.parameters()] for plan in plans)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_table_of_methods_in_the_readme_is_made_from_the_registry():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0].strip() == methods_table()
    assert len({m.title for m in METHODS.values()}) == len(METHODS)


def test_one_calibration_serves_all_sparsities():
    """And holds the spans of every method that asks for some, each once."""
    model, sparsities = deep("llama"), (0.2, 0.4)
    calibration = calibrate(model, random_windows(9, 12), sparsities, progress=False)
    asked = [m.needs.spans(model, calibration.stream, s) for m in METHODS.values() if m.needs.spans for s in sparsities]
    assert set(calibration.spans) == {span for choices in asked for spans in choices for span in spans}
    assert calibration.stream.tokens == 5 * 12


@pytest.mark.parametrize(("given", "read"), [(41, 16), (9, 5)])
def test_layers_and_neurons_are_chosen_by_the_first_windows_that_are_fitted_on(given, read):
    """Every prefix of a mixture's windows has its shares; windows at equal distances may be of one text alone."""
    model, ids = deep("llama"), random_windows(given, 8)
    found = calibrate(model, ids, [0.2], methods=["uidl", "uniform_refit"], progress=False)
    assert found.stream.tokens == read * 8
    assert torch.equal(found.stream.distance, capture_stream(model, ids[:read], progress=False).distance)
    effects = fisher_effects(model, found.blocks, ids[:read], progress=False)
    assert found.effects.keys() == effects.keys() and all(torch.equal(found.effects[b], e) for b, e in effects.items())


def test_a_method_removes_whole_layers_whole_blocks_or_widths():
    whole = {name for name, method in METHODS.items() if method.unit == "layers"}
    assert whole == WHOLE | {"streamline_mlp"}
    assert {name for name, method in METHODS.items() if method.unit == "blocks"} == {"subfit", "subfit_shared"}
    assert {METHODS[name].unit for name in OURS | INSIDE} == {"widths"}


def test_statistics_that_are_there_are_taken(llama):
    blocks, ids = find_blocks(llama), random_windows(6, 8)
    stats = capture(llama, blocks, ids, validation_windows=2, progress=False)
    calibration = calibrate(llama, ids, [0.3], methods=["uniform"], blocks=stats, progress=False)
    assert calibration.blocks is stats
    assert sparsity_of(llama, METHODS["uniform"](llama, calibration, 0.3)) >= 0.3


def chosen(plan):
    return {block: replacement.family for block, replacement in plan.items()}


@pytest.mark.parametrize("memory_budget", [None, 500_000])
def test_the_recipe_is_its_steps_one_by_one(memory_budget):
    """Also where statistics do not fit in memory."""
    model, windows = deep("llama"), random_windows(14, 16, seed=1)
    calibration = calibrate(
        model, windows, [0.3], methods=["recipe"], validation_windows=2, memory_budget=memory_budget, progress=False
    )
    assert isinstance(calibration.blocks, InGroups) == (memory_budget is not None)
    blocks, fitted, validation = find_blocks(model) + find_blocks(model, "attention"), windows[:12], windows[12:]
    stats = capture(model, blocks, fitted, moments=("input", "hidden", "cross"), validation_windows=0, progress=False)
    stats = with_effects(stats, fisher_effects(model, blocks, fitted, progress=False))
    choice = choose(model, stats, 0.3, "joint", candidates=candidate_families(blocks), windows=validation, progress=False)
    expected = refit(model, choice, fitted, stats, validation=validation, progress=False).plan
    plan = METHODS["recipe"](model, calibration, 0.3)
    assert chosen(plan) == chosen(expected)
    weights = ([p for b in expected for p in of[b].parameters()] for of in (plan, expected))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_errors(llama):
    ids = random_windows(6, 8)
    with pytest.raises(ValueError, match="Unknown method 'prune'; known are flap, .*subfit, .*uniform"):
        calibrate(llama, ids, [0.3], methods=["prune"], progress=False)
    with pytest.raises(ValueError, match="sparsity=0.99 cannot be reached"):
        calibrate(llama, ids, [0.99], methods=["replaceme"], progress=False)
    with pytest.raises(ValueError, match="No windows to fit and to measure plans on"):
        METHODS["recipe"](llama, Calibration(), 0.3)
    known = calibrate(llama, ids, [0.3], methods=["subfit"], progress=False)
    with pytest.raises(ValueError, match="No effects of neurons and heads"):
        METHODS["recipe"](llama, known, 0.3)
    for options in (dict(validation_windows=0), dict(mask=torch.ones_like(ids, dtype=torch.bool))):
        with pytest.raises(ValueError, match="validation_windows > 0, no mask"):
            calibrate(llama, ids, [0.3], methods=["recipe"], progress=False, **options)
    with pytest.raises(ValueError, match="No mlp block was captured"):
        METHODS["uniform"](llama, Calibration(), 0.3)
    known = calibrate(llama, ids, [0.3], methods=[name for name in METHODS if name not in SPANNED], progress=False)
    for name in METHODS:
        for wrong in (-1, 0, 1):
            with pytest.raises(ValueError, match="0 < sparsity < 1"):
                METHODS[name](llama, known, wrong)
