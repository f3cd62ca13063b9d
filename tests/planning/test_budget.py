"""A memory budget changes how many passes are made, and no bit of what comes out."""

import json

import pytest
import torch
from conftest import BYTES, byte_tokenizer, save_locally
from tiny_models import build, random_windows
from transformers import AutoModelForCausalLM, LlamaConfig

from mlpreplace import LowRank, NarrowMLP, allocate, capture, find_blocks, fit, refit
from mlpreplace.__main__ import main
from mlpreplace.planning import candidate_families, choose, local_damage, measured_damage, second_order_damage
from mlpreplace.runtime.memory import VARIABLE
from mlpreplace.statistics.groups import InGroups

CALIBRATION, VALIDATION = random_windows(24), random_windows(4, seed=1)
ONE_BLOCK, ALL = 0, "1GB"


def narrows_keys(family) -> bool:
    return getattr(family, "key_dim", None) is not None


def case(name: str, budget):
    model = build(name)
    blocks = find_blocks(model) + find_blocks(model, "attention")
    stats = capture(
        model,
        blocks,
        torch.cat([CALIBRATION, VALIDATION]),
        moments=("input", "hidden", "cross"),
        validation_windows=4,
        memory_budget=budget,
        progress=False,
    )
    assert isinstance(stats, InGroups) == (budget == ONE_BLOCK)
    candidates = candidate_families(blocks, width_steps=6, linear_sizes=(0.25,), attention_sizes=(0.1, 0.2))
    return model, stats, candidates


def same(a, b) -> bool:
    pairs = list(zip(a.values(), b.values(), strict=True))
    return list(a) == list(b) and all(
        one.family == other.family and all(map(torch.equal, one.parameters(), other.parameters())) for one, other in pairs
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("strategy", ["uniform", "greedy", "milp", "joint", "search"])
def test_a_plan_is_the_same_under_any_budget(strategy, name):
    plans = []
    for budget in (ONE_BLOCK, ALL):
        model, stats, candidates = case(name, budget)
        options = {} if strategy == "uniform" else dict(candidates=candidates, windows=VALIDATION)
        plans.append(allocate(model, stats, 0.3, strategy, **options, progress=False))
    assert same(*plans)


def test_prices_are_the_same_under_any_budget():
    found = []
    for budget in (ONE_BLOCK, ALL):
        model, stats, candidates = case("llama", budget)
        options = dict(progress=False)
        found.append(
            [
                second_order_damage(model, candidates, VALIDATION, stats, **options),
                measured_damage(model, candidates, VALIDATION, stats, **options),
                local_damage({b: [f for f in of_b if not narrows_keys(f)] for b, of_b in candidates.items()}, stats),
            ]
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_refit_of_families_is_that_of_their_fits(name):
    """Also of blocks behind the last one that is refitted, and with reports of the first fits."""
    refitted = []
    for budget in (ONE_BLOCK, ALL):
        model, stats, _ = case(name, budget)
        mlps, attentions = find_blocks(model), find_blocks(model, "attention")
        chosen = {attentions[2]: LowRank(4), mlps[0]: NarrowMLP(24), mlps[1]: NarrowMLP(16), attentions[1]: LowRank(8)}
        refitted.append(refit(model, chosen, CALIBRATION, stats, progress=False))
    first = {block: fit(block, stats, family) for block, family in chosen.items()}
    expected = refit(model, first, CALIBRATION, progress=False)
    for found in refitted:
        assert same(found.plan, expected.plan) and found.report == expected.report
        assert [r.report.validation for r in found.plan.values()] == [r.report.validation for r in first.values()]


def test_choose_is_what_allocate_fits(results):
    model, stats, candidates = case("llama", ONE_BLOCK)
    options = dict(candidates=candidates, windows=VALIDATION, progress=False)
    chosen = choose(model, stats, 0.3, "joint", **options)
    assert {b: r.family for b, r in allocate(model, stats, 0.3, "joint", **options).items()} == chosen
    first = refit(model, chosen, CALIBRATION, stats, cached=True, progress=False)
    again = refit(model, chosen, CALIBRATION, stats, cached=True, progress=False)
    assert same(first.plan, again.plan) and first.report == again.report


def test_a_search_is_no_choice(captured):
    model, _, stats = captured
    with pytest.raises(ValueError, match="allocate"):
        choose(model, stats, 0.3, "search", windows=VALIDATION)


@pytest.fixture
def wide(tmp_path):
    """(model folder, text file): statistics of each of its two MLPs are 134 MB."""
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=16,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    folder = save_locally(AutoModelForCausalLM.from_config(config), tmp_path / "wide", byte_tokenizer())
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{n} and {n * n} are numbers that are told apart, "}) for n in range(90)))
    return folder, str(text)


def test_compress_under_500_megabytes_takes_more_passes_and_saves_the_same(wide, tmp_path, monkeypatch):
    folder, text = wide
    sizes = ["--windows", "4", "--validation-windows", "2", "--heldout-windows", "2", "--seq-len", "32", "--device", "cpu"]
    captures, passes, saved = [], [], []
    own = InGroups._capture
    monkeypatch.setattr(InGroups, "_capture", lambda *args: captures.append(args[1]) or own(*args))
    for n, budget in enumerate(("500MB", "4GB")):
        monkeypatch.setenv(VARIABLE, budget)
        monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path / f"cache-{n}"))
        out = tmp_path / f"out-{n}"
        asked = ["compress", folder, "--sparsity", "0.25", "--out", str(out), "--text", text, "--heldout", text, *sizes]
        assert main(asked) == 0
        saved.append((out / "replacements.safetensors").read_bytes())
        passes.append(len(captures) - sum(passes))
    assert passes[0] > passes[1]
    assert saved[0] == saved[1]
