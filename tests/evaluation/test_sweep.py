"""Many plans in one pass: the numbers of each plan's own pass, every distinct prefix once, nothing held that is not needed."""

import random
import weakref
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import capture_quietly, fail_after
from hybrid_blocks import LOOKING_BACK, shaken
from tiny_models import CAUSAL, VOCABULARY, build, random_windows

import mlpreplace.evaluation.sweep as module
from mlpreplace import Linear, Mean, NarrowMLP, compare, find_blocks, fit, load_windows, spliced
from mlpreplace.evaluation.sweep import Dense, plan_key, schedule, score
from mlpreplace.models import forward

LAYERS, BATCHES = 5, 2  # of the tiny Llama, and of ``heldout``


def direct(model, plan, windows, dense=None) -> tuple[np.ndarray, np.ndarray]:
    """(negative log-likelihood, KL to ``dense`` log-probabilities) summed per window, in float64 and one piece."""
    with spliced(model, plan), torch.no_grad():
        q = model(windows).logits[:, :-1].double().log_softmax(-1)
    nll = -q.gather(-1, windows[:, 1:, None]).sum((1, 2))
    dense = q if dense is None else dense
    return nll.numpy(), (dense.exp() * (dense - q)).sum((1, 2)).numpy()


def measured(model, plans, windows, **options):
    return compare(model, plans, windows, **{"batch_size": 4, "progress": False} | options)


def singles(candidates) -> dict:
    return {(b.name, i): {b: r} for b, fitted in candidates.items() for i, r in enumerate(fitted)}


def pairs(candidates) -> dict:
    return {(a.name, b.name): {a: candidates[a][0], b: candidates[b][-1]} for a, b in combinations(candidates, 2)}


def rounds(candidates) -> dict:
    """As greedy measures them: a deep block is taken, then every candidate beside it, then another, and so on."""
    plans, taken = {}, {}
    for block in [*candidates][::-2]:
        for other in candidates:
            plans |= {(len(taken), other.name, i): taken | {other: r} for i, r in enumerate(candidates[other])}
        taken = taken | {block: candidates[block][0]}
    return plans | {"all": {b: fitted[0] for b, fitted in candidates.items()}, "again": dict(taken), "dense": {}}


SWEEPS = [singles, pairs, rounds]


def prefix(plan, layer: int) -> frozenset:
    """What stands at the layers before ``layer``."""
    return frozenset((block.name, id(r)) for block, r in plan.items() if block.layer < layer)


def shuffled(plans: dict, seed: int = 0) -> dict:
    return dict(random.Random(seed).sample([*plans.items()], len(plans)))


@pytest.fixture
def heldout():
    return random_windows(7, seed=5)


@pytest.fixture
def deep():
    """(model, {block: two fitted replacements}) of a Llama with five layers."""
    model = build("llama", num_hidden_layers=LAYERS)
    blocks, stats = capture_quietly(model, random_windows())
    return model, {b: [fit(b, stats, family) for family in (NarrowMLP(24), Mean())] for b in blocks}


# the numbers


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("name", CAUSAL)
def test_every_plan_gets_what_its_own_pass_gives(name, sweep, heldout):
    model = build(name)
    blocks, stats = capture_quietly(model, random_windows(), moments=("input",))
    plans = sweep({b: [fit(b, stats, f) for f in (Linear(), Mean())] for b in blocks})
    got = measured(model, plans, heldout)
    assert list(got) == list(plans)
    with torch.no_grad():
        dense = model(heldout).logits[:, :-1].double().log_softmax(-1)
    for label, plan in plans.items():
        nll, kl = direct(model, plan, heldout, dense)
        assert np.allclose(got[label].nll, nll, rtol=1e-5)
        assert np.allclose(got[label].kl, kl, rtol=1e-3, atol=1e-4)
        assert (got[label].kl.min() > 0) == bool(plan)


@pytest.mark.parametrize("family", LOOKING_BACK, ids=lambda family: type(family).__name__)
def test_replacements_that_look_back_share_prefixes(family, heldout):
    """One before the first difference, at it and after it."""
    model = build("llama")
    blocks, stats = capture_quietly(model, random_windows(), sample_windows=None)
    plans = pairs({b: [shaken(fit(b, stats, family)), fit(b, stats, Mean())] for b in blocks}) | {
        "all": {b: shaken(fit(b, stats, family), seed=1) for b in blocks}
    }
    got = measured(model, plans, heldout)
    for label, plan in plans.items():
        assert np.allclose(got[label].nll, direct(model, plan, heldout)[0], rtol=1e-5)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_order_of_plans_changes_nothing(sweep, deep, heldout):
    model, candidates = deep
    plans = sweep(candidates)
    one = measured(model, plans, heldout)
    for seed in (1, 2):
        other = measured(model, shuffled(plans, seed), heldout)
        for label in plans:
            assert np.array_equal(one[label].nll, other[label].nll)
            assert np.array_equal(one[label].kl, other[label].kl)


def test_without_kl_the_likelihoods_are_the_same(deep, heldout):
    model, candidates = deep
    plans = singles(candidates)
    one, other = (measured(model, plans, heldout, kl=kl) for kl in (True, False))
    assert all(np.array_equal(one[label].nll, other[label].nll) for label in plans)


@pytest.mark.parametrize("at_once", [1, 3 * VOCABULARY, 11 * VOCABULARY])
def test_scores_do_not_depend_on_the_pieces(at_once, heldout, monkeypatch):
    """One token at a time, three of 11 (the last piece is shorter), and a window at a time; against float64."""
    monkeypatch.setattr(module, "SCORED_AT_ONCE", at_once)
    logits = [3 * torch.randn(7, 12, VOCABULARY, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    p, q = (x[:, :-1].double().log_softmax(-1) for x in logits)
    nll, kl = score(logits[1], heldout, Dense(logits[0]))
    torch.testing.assert_close(nll, -q.gather(-1, heldout[:, 1:, None]).sum((1, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum((1, 2)), rtol=1e-6, atol=0)


def test_scoring_leaves_the_logits_alone(heldout):
    logits = torch.randn(7, 12, VOCABULARY)
    before = logits.clone()
    score(logits, heldout, Dense(logits))
    assert torch.equal(logits, before)


# what runs and what is held


def test_a_single_block_runs_the_layers_from_its_own_on(deep, heldout):
    """Layer i: once for the dense model, once for each plan that replaces a block at or before it."""
    model, candidates = deep
    ran = count_layer_calls(model)
    measured(model, {b.layer: {b: fitted[0]} for b, fitted in candidates.items()}, heldout)
    assert ran == [BATCHES * (1 + i + 1) for i in range(LAYERS)]


def count_layer_calls(model) -> list[int]:
    """How often each layer has computed, not only handed on."""
    ran = [0] * len(model.model.layers)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    return ran


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("kl", [True, False])
def test_a_layer_runs_once_for_every_distinct_beginning_of_a_plan(kl, sweep, deep, heldout):
    model, candidates = deep
    plans = shuffled(sweep(candidates))
    ran = count_layer_calls(model)
    measured(model, plans, heldout, kl=kl)
    run = [*plans.values(), *([{}] if kl else [])]
    assert ran == [BATCHES * len({prefix(plan, i + 1) for plan in run}) for i in range(LAYERS)]


def test_one_plan_under_two_labels_runs_once(deep, heldout):
    model, candidates = deep
    plan = {b: fitted[0] for b, fitted in candidates.items()}
    ran = count_layer_calls(model)
    got = measured(model, {"one": plan, "two": dict(reversed(plan.items()))}, heldout, kl=False)
    assert ran == [BATCHES] * LAYERS
    assert np.array_equal(got["one"].nll, got["two"].nll)


def test_hidden_states_go_after_their_last_use(deep, heldout, monkeypatch):
    """Singles, deepest first: the dense model leaves what enters layers 1 to 4, and each plan takes one of them away."""
    model, candidates = deep
    copies, alive = [], []

    def copy(state, make=forward.copied_state):
        copies.append(weakref.ref(made := make(state)))
        return made

    def count(*args, scored=module.score):
        alive.append(sum(ref() is not None for ref in copies))
        return scored(*args)

    for resumes_or_records in (module, forward):
        monkeypatch.setattr(resumes_or_records, "copied_state", copy)
    monkeypatch.setattr(module, "score", count)
    measured(model, {b.layer: {b: fitted[0]} for b, fitted in candidates.items()}, heldout)
    assert alive == [4, 3, 2, 1, 0, 0] * BATCHES


@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_holds_what_it_starts_from_and_no_more(seed, deep):
    """Random plans over MLP and attention blocks: walk the steps with the beginnings of plans in place of hidden states."""
    model, _ = deep
    rng = random.Random(seed)
    choices = {b: [object(), object()] for kind in ("mlp", "attention") for b in find_blocks(model, kind)}
    plans = [{b: rng.choice(choices[b]) for b in rng.sample([*choices], rng.randint(0, 4))} for _ in range(30)]
    steps = schedule(plans)
    assert [plan_key(step.plan) for step in steps] == sorted({plan_key(plan) for plan in plans})
    held: dict[int, frozenset] = {}
    for step, following in pairwise([*steps, None]):
        assert not step.start or held[step.start] == prefix(step.plan, step.start)
        held |= {layer: prefix(step.plan, layer) for layer in step.keep if layer > step.start}
        held = {layer: held[layer] for layer in step.keep}
        assert len(held) < LAYERS
        assert all(0 < layer < LAYERS for layer in held)
        assert following is not None or not held
    starts = [step.start for step in steps[1:]]
    assert all(layer in starts for step in steps for layer in step.keep)
    ran = [sum(step.start <= layer for step in steps) for layer in range(LAYERS)]
    assert ran == [len({prefix(plan, layer + 1) for plan in plans}) for layer in range(LAYERS)]


def test_without_one_list_of_layers_nothing_is_shared(deep):
    _, candidates = deep
    assert {(step.start, step.keep) for step in schedule([*singles(candidates).values()], share=False)} == {(0, frozenset())}


# errors


def test_an_exception_between_two_shared_layers_leaves_the_model_as_it_was(deep, heldout, monkeypatch):
    """The plan that fails starts from what the dense model left, and keeps hidden states for the one after it."""
    model, candidates = deep
    first, second = [*candidates][2:4]
    small = candidates[first][0]
    modules = dict(model.named_modules())
    monkeypatch.setattr(small.body, "forward", fail_after(0, None, RuntimeError("in the replacement")))
    with pytest.raises(RuntimeError, match="in the replacement"):
        measured(model, {1: {first: small}, 2: {first: small, second: candidates[second][0]}}, heldout)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_plan_for_another_model_is_refused_before_anything_runs(deep, heldout, monkeypatch):
    model, candidates = deep
    other = build("llama", num_hidden_layers=LAYERS + 1)
    blocks, stats = capture_quietly(other, random_windows())
    monkeypatch.setattr(model, "forward", fail_after(0, None, AssertionError("the model ran")))
    with pytest.raises(ValueError, match="plan is for another model"):
        measured(model, singles(candidates) | {"other": {blocks[-1]: fit(blocks[-1], stats, Mean())}}, heldout)


@pytest.mark.bundled
def test_pairs_in_the_bundled_model(bundled):
    model, tokenizer = bundled
    windows = load_windows("bundled/wiki", tokenizer, seq_len=32, n_windows=6)
    blocks, stats = capture_quietly(model, windows[:4], moments=("input",), validation_windows=1)
    plans = pairs({b: [fit(b, stats, Mean())] for b in (blocks[1], blocks[14], blocks[28])})
    got = measured(model, plans, windows[4:])
    with torch.no_grad():
        dense = model(windows[4:]).logits[:, :-1].double().log_softmax(-1)
    for label, plan in plans.items():
        nll, kl = direct(model, plan, windows[4:], dense)
        assert np.allclose(got[label].nll, nll, rtol=1e-5)
        assert np.allclose(got[label].kl, kl, rtol=1e-4)
