"""What is timed is what is counted, and what is counted is what PyTorch executes."""

import math

import numpy as np
import pytest
import torch
from tiny_models import CAUSAL, CONTEXT, HIDDEN, INTERMEDIATE, VOCABULARY, build, random_windows
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mlpreplace.evaluation import speed
from mlpreplace.evaluation.speed import (
    Latency,
    bytes_read,
    cache_bytes,
    flops,
    ideal_speedup,
    interleaved,
    latency,
    size_bytes,
    speed_rows,
    speedup,
)
from mlpreplace.models.blocks import find_blocks
from mlpreplace.replacements.families import Linear, LowRank, Mean, NarrowMLP, Replacement
from mlpreplace.replacements.hybrids import AttentionMLP, MixtureOfExperts, TransformerBlock
from mlpreplace.replacements.splice import sparsity_of, splice

LAYERS, SEQ_LEN = 3, 12
OF_A_LAYER = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE  # weights of the tiny Llama
WIDTHS = [NarrowMLP(24), LowRank(4), Linear(), Mean()]


def plan_for(model, family=None, kind: str = "mlp"):
    """Every block replaced; speed does not ask whether a replacement was fitted."""
    return {block: Replacement(family or NarrowMLP(24), block) for block in find_blocks(model, kind)}


def counted(model, windows) -> tuple[int, int]:
    """FLOPs that PyTorch executes in a prefill: of linear maps, and of attention (fused on a CPU, it would not be counted)."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        model(windows, use_cache=False, logits_to_keep=1)
    by_operation = {str(operation): n for operation, n in counter.get_flop_counts()["Global"].items()}
    attention = by_operation.pop("aten.bmm")
    return sum(by_operation.values()), attention


def test_the_order_turns_and_the_first_round_is_not_counted():
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_each_function_has_its_own_seconds(monkeypatch):
    """A clock that every call moves by its own step."""
    now = 0.0

    def take(step):
        nonlocal now
        now += step

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    assert interleaved({"short": lambda: take(1), "long": lambda: take(3)}, rounds=2) == {"short": [1, 1], "long": [3, 3]}


def test_flops_by_hand(llama):
    """Linear maps for every token, the head for one; token t attends to t tokens, 2 products of the hidden size each."""
    attended = SEQ_LEN * (SEQ_LEN + 1) / 2
    expected = 2 * LAYERS * OF_A_LAYER * SEQ_LEN + 2 * VOCABULARY * HIDDEN + 4 * LAYERS * HIDDEN * attended
    assert flops(llama, SEQ_LEN) == expected


@pytest.mark.parametrize("family", [None, *WIDTHS, AttentionMLP(8, head_dim=4), TransformerBlock(4, heads=2)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_flops_are_those_that_are_executed(name, family):
    """PyTorch counts attention over the masked half too: all n² pairs of tokens instead of n (n + 1) / 2."""
    model, windows = build(name), random_windows(1, SEQ_LEN)
    if family:
        model = splice(model, plan_for(model, family))
    products, attention = counted(model, windows)
    assert flops(model, SEQ_LEN) == products + attention * (SEQ_LEN + 1) / (2 * SEQ_LEN)


def test_a_mixture_costs_what_one_token_passes(llama):
    """The router and one of four experts; its biases are taken for weights, a few in a thousand."""
    one = splice(llama, plan_for(llama, NarrowMLP(8)))
    mixture = splice(llama, plan_for(llama, MixtureOfExperts(8, experts=4)))
    assert flops(mixture, SEQ_LEN) == pytest.approx(flops(one, SEQ_LEN) + 2 * SEQ_LEN * LAYERS * 4 * HIDDEN, rel=1e-2)
    assert size_bytes(mixture) > size_bytes(one) + 4 * LAYERS * 3 * 3 * HIDDEN * 8


def test_experts_of_the_model_count_for_those_a_token_passes():
    model = build("mixtral")  # 2 of 4 experts
    experts = 3 * 4 * 3 * HIDDEN * INTERMEDIATE
    everything = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "norm" not in name)
    assert flops(model, 1) == 2 * (everything - experts / 2) + 4 * LAYERS * HIDDEN


def test_a_narrower_plan_is_ideally_faster_and_an_empty_one_is_not(llama):
    ideal = {
        family: ideal_speedup(llama, splice(llama, plan_for(llama, family)), SEQ_LEN)
        for family in (NarrowMLP(12), NarrowMLP(24), NarrowMLP(INTERMEDIATE))
    }
    assert ideal_speedup(llama, splice(llama, {}), SEQ_LEN) == 1
    assert ideal[NarrowMLP(12)] > ideal[NarrowMLP(24)] > ideal[NarrowMLP(INTERMEDIATE)] == 1


def test_a_decode_step_reads_weights_and_cache_but_not_the_embedding(llama):
    norms = (2 * LAYERS + 1) * HIDDEN
    weights = 4 * (LAYERS * OF_A_LAYER + VOCABULARY * HIDDEN + norms)
    rotary = sum(b.nbytes for b in llama.buffers())
    assert bytes_read(llama, cache_bytes=1000) == weights + rotary + 1000
    assert size_bytes(llama) == weights + 4 * VOCABULARY * HIDDEN  # and here the embedding counts


def test_a_tied_head_is_read_and_stored_once():
    tied, untied = (build("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert bytes_read(tied) == bytes_read(untied)
    assert size_bytes(tied) == size_bytes(untied) - 4 * VOCABULARY * HIDDEN


def test_bytes_follow_the_precision(llama):
    before = size_bytes(llama)
    assert size_bytes(llama.to(torch.bfloat16)) == before / 2


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_cache_by_hand(name):
    """Keys and values of every layer and token; grouped queries share them."""
    model, windows = build(name), random_windows(2, SEQ_LEN)
    width = HIDDEN // 2 if name == "qwen2" else HIDDEN
    with torch.inference_mode():
        cache = model(windows, use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * 4 * LAYERS * width * windows.numel()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_replaced_attention_has_no_scores_and_no_cache(name):
    model, windows = build(name), random_windows(2, SEQ_LEN)
    plan = dict(list(plan_for(model, Linear(), "attention").items())[:2])
    small = splice(model, plan)
    linear, attention = counted(small, windows[:1])
    assert flops(small, SEQ_LEN) == linear + attention * (SEQ_LEN + 1) / (2 * SEQ_LEN)
    assert attention == counted(model, windows[:1])[1] / 3
    models = {"dense": model, "small": small}
    row = speed_rows(models, latency(models, windows, decode_tokens=1, rounds=2))[1]
    assert row["kv_cache_fraction"] == 1 / 3
    assert row["sparsity_achieved"] == pytest.approx(sparsity_of(model, plan))


@pytest.mark.parametrize("name", CAUSAL)
def test_latency_of_every_causal_model(name):
    """What is measured is finite, and each model decodes what it would generate."""
    model, windows = build(name), random_windows(2, SEQ_LEN)
    small = splice(model, plan_for(model, LowRank(4)))
    measured = latency({"dense": model, "small": small}, windows, decode_tokens=2, batch_size=2, rounds=3)
    assert list(measured) == ["dense", "small"]
    for m in measured.values():
        assert m.prefill.shape == m.decode.shape == (3,)
        assert np.isfinite(m.prefill).all() and (m.prefill > 0).all() and (m.decode > 0).all()
        assert (m.batch_size, m.prompt) == (2, SEQ_LEN)
        assert SEQ_LEN < m.context < SEQ_LEN + 2 * 4


@pytest.mark.parametrize("family", [None, LowRank(4), AttentionMLP(8, head_dim=4)])
def test_decoding_is_greedy_generation(llama, family):
    model = splice(llama, plan_for(llama, family)) if family else llama
    session, decoded = speed._Session(model, random_windows(2, SEQ_LEN)), []
    with torch.inference_mode():
        session.prefill()
        for _ in range(4):
            decoded.append(session.token)
            session.decode(1)
        expected = model.generate(session.ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.cat(decoded, 1), expected[:, SEQ_LEN:])


def test_a_prefill_starts_anew_and_gives_one_logit_row(llama):
    session = speed._Session(llama, random_windows(1, SEQ_LEN))
    shapes = []
    llama.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with torch.inference_mode():
        session.prefill()
        session.prefill()
    assert shapes == [(1, 1, VOCABULARY)] * 2
    assert session.cache.get_seq_length() == SEQ_LEN


def test_latency_leaves_models_in_the_mode_they_were_in(llama):
    llama.train()
    latency({"dense": llama}, random_windows(1, SEQ_LEN), decode_tokens=1, rounds=1)
    assert all(module.training for module in llama.modules())


def test_refusals_say_what_to_do(llama):
    with pytest.raises(ValueError, match="batch of 4 needs as many windows"):
        latency({"dense": llama}, random_windows(2), batch_size=4)
    with pytest.raises(ValueError, match=f"context of {CONTEXT}.*decode_tokens"):
        latency({"dense": llama}, random_windows(1), decode_tokens=CONTEXT)
    for name in ("bert", "t5"):
        with pytest.raises(ValueError, match=f"'{name}' is a .*causal"):
            latency({name: build(name)}, random_windows(1))
    with pytest.raises(ValueError, match="No model 'dense' among 'mine'"):
        speed_rows({"mine": llama}, {})


def test_speedup_is_the_median_ratio_within_rounds():
    """A machine that slows down threefold between rounds changes nothing."""
    machine = np.array([1, 1, 3, 3, 3])
    value, low, high = speedup(machine * 1.0, machine * 1.25)
    assert (value, low, high) == (1.25, 1.25, 1.25)
    value, low, high = speedup(np.ones(5), np.array([1.0, 1.1, 1.2, 1.3, 1.4]))
    assert value == 1.2 and 1.0 <= low < 1.2 < high <= 1.4
    assert np.isnan(speedup(np.ones(1), np.ones(1))[1:]).all()  # one round has no interval


def test_rows_relate_what_was_measured_to_the_ideal(llama):
    plan = plan_for(llama, NarrowMLP(24))
    models = {"dense": llama, "narrow": splice(llama, plan)}
    timed = {
        "dense": Latency(np.array([2.0, 4.0]), np.array([0.2, 0.4]), 1200, 1, SEQ_LEN, 24),
        "narrow": Latency(np.array([1.0, 2.0]), np.array([0.1, 0.2]), 600, 1, SEQ_LEN, 24),
    }
    dense, narrow = speed_rows(models, timed)
    assert dense["sparsity_achieved"] == 0
    assert {dense[f"{phase}_{value}"] for phase in ("prefill", "decode") for value in ("speedup", "low", "ideal")} == {1}
    assert narrow["sparsity_achieved"] == pytest.approx(sparsity_of(llama, plan))
    assert (narrow["prefill_seconds"], narrow["prefill_speedup"]) == (1.5, 2)
    assert narrow["prefill_ideal"] == ideal_speedup(llama, models["narrow"], SEQ_LEN)
    assert narrow["share_of_ideal"] == 2 / narrow["prefill_ideal"]
    assert narrow["decode_ideal"] == bytes_read(llama, 2400) / bytes_read(models["narrow"], 1200)
    assert narrow["kv_cache_fraction"] == 0.5
    assert narrow["parameter_mb"] == pytest.approx(dense["parameter_mb"] - 4e-6 * LAYERS * 3 * HIDDEN * 24)
    assert dense.keys() == narrow.keys() and all(v == v and v != math.inf for v in narrow.values())


@pytest.mark.bundled
def test_the_bundled_model_is_counted_as_it_runs(bundled):
    model, _ = bundled
    small = splice(model, plan_for(model, NarrowMLP(1024)))
    windows = torch.arange(1, 33)[None]
    for m in (model, small):
        products, attention = counted(m, windows)
        assert flops(m, 32) == products + attention * 33 / 64
    assert ideal_speedup(model, small, 512) > 1.2


def test_other_modules_are_no_matter(llama):
    """An embedding that is looked up is never counted, whoever holds it."""
    before = flops(llama, SEQ_LEN), bytes_read(llama)
    llama.extra = nn.Embedding(10, HIDDEN)
    assert (flops(llama, SEQ_LEN), bytes_read(llama)) == before
