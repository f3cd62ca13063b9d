"""Models on two devices, one of them a stand-in; run by test_devices.py, in a process of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from conftest import capture_quietly, captured_whole, save_locally
from fake_device import FakeTensor, register
from tiny_models import build, random_windows

import mlpreplace as m
from mlpreplace.evaluation import int8
from mlpreplace.models import loading
from mlpreplace.models.blocks import find_blocks
from mlpreplace.runtime import memory
from mlpreplace.statistics import moments, unit_similarity

FAKE = register()


def over_two_devices(model):
    """A copy with its first and last layer on "fake" and the rest on the CPU, by accelerate."""
    where = {"model.embed_tokens": "fake:0", "model.rotary_emb": "fake:0", "model.norm": "cpu", "lm_head": "cpu"}
    layers = len(model.model.layers)
    where |= {f"model.layers.{i}": "cpu" if 0 < i < layers - 1 else "fake:0" for i in range(layers)}
    return dispatch_model(copy.deepcopy(model), where, main_device="cpu")


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def spread(llama, monkeypatch):
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # whose tensors a device in Python cannot make views of
    return over_two_devices(llama)


def same(a: torch.Tensor, b: torch.Tensor, **tolerance) -> None:
    torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), **tolerance)


def test_the_stand_in_refuses_tensors_of_two_devices():
    a = torch.ones(3).to(FAKE)
    assert (a + 1).device == FAKE
    same(a + a, torch.full((3,), 2.0))
    for other in (lambda: a + torch.ones(3), lambda: torch.cat([a, torch.ones(3)]), lambda: torch.ones(3).add_(a)):
        with pytest.raises(RuntimeError, match="one device"):
            other()


def test_the_stand_in_refuses_what_a_gpu_cannot_do():
    a, of_cpu = torch.ones(3, 3, device=FAKE), torch.Generator().manual_seed(0)
    for refused, why in (
        (lambda: torch.randn(3, device=FAKE, generator=of_cpu), "generator"),
        (lambda: a.long() @ a.long(), "not implemented for torch.int64"),
        (lambda: a.index_put_((a > 0,), torch.ones(9)), "one device"),
        (lambda: torch._int_mm(a.to(torch.int8), a.to(torch.int8)), "more than 16 rows"),
        (a.numpy, "numpy"),
    ):
        with pytest.raises(RuntimeError, match=why):
            refused()
    assert isinstance(a[torch.ones(3, dtype=torch.bool)], FakeTensor), "indices may be the CPU's"


@pytest.mark.parametrize("shape", [(1, 8, 8), (16, 33, 5), (17, 40, 17), (33, 64, 24)], ids=str)
def test_an_int8_product_is_filled_up_to_what_a_gpu_takes(shape):
    """(tokens, in, out); the stand-in takes no other sizes, either."""
    tokens, width, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (n, width), generator=generator).to(torch.int8) for n in (tokens, outputs))
    found = int8.int8_product(x.to(FAKE), weight.to(FAKE))
    assert found.shape == (tokens, outputs) and found.dtype == torch.int32
    assert torch.equal(found.cpu().long(), x.long() @ weight.long().T)


def test_int8_layers_off_the_cpu_are_those_of_a_cpu(llama, spread, monkeypatch):
    _, stats = capture_quietly(llama, random_windows(4))
    small = m.splice(llama, {block: m.fit(block, stats, m.NarrowMLP(27)) for block in stats})
    with pytest.raises(m.models.NotApplicable, match=r"on fake:0, which has no int8 product.*model\.to\('cpu'\)"):
        int8.quantized(spread)
    monkeypatch.setattr(int8, "has_product", lambda device: True)
    for model in (llama, small):
        expected, found = int8.quantized(model), int8.quantized(copy.deepcopy(model).to(FAKE))
        for ids in (random_windows(6), random_windows(1, 1)):  # many tokens, and one as in decoding
            same(found(ids.to(FAKE)).logits, expected(ids).logits)


def test_a_model_on_two_devices_gives_the_logits_of_one(llama, spread):
    ids = random_windows()
    assert [block.device.type for block in find_blocks(spread)] == ["fake", "cpu", "fake"]
    same(spread(ids).logits, llama(ids).logits)


def test_capture_and_every_closed_form_on_two_devices_are_those_of_one(llama, spread):
    windows = random_windows(6)
    blocks, expected = captured_whole(llama, windows)
    _, found = captured_whole(spread, windows)
    families = [m.Mean(), m.Linear(), m.LowRank(4), m.NarrowMLP(24), m.NarrowPlusLinear(16, 2), m.TwoLayerMLP(24)]
    families += [m.ConvMLP(24), m.AttentionMLP(24, 8), m.MixtureOfExperts(12, 2), m.TransformerBlock(4, 2)]
    for block, own in zip(find_blocks(spread), blocks, strict=True):
        s = found[block]
        assert {t.device for t in (s.xx, s.hh, s.hx, s.sum_y)} == {block.device}
        assert {t.dtype for t in (s.xx, s.hh, s.hx, s.sum_y)} == {torch.float64}
        assert {t.device.type for p in (s.train, s.validation) for t in vars(p).values() if t is not None} == {"cpu"}
        same(s.hx, expected[own].hx, rtol=1e-3, atol=1e-4)
        for family in families if block.layer == 0 else ():
            fitted, alone = m.fit(block, found, family), m.fit(own, expected, family)
            assert {p.device for p in fitted.parameters()} == {block.device}
            x = expected[own].validation.x
            same(fitted(x.to(block.device)), alone(x), rtol=1e-2, atol=1e-3)
            assert fitted.report.validation.pooled == pytest.approx(alone.report.validation.pooled, rel=1e-3)


def test_statistics_captured_in_groups_are_those_captured_at_once(spread):
    windows = random_windows(4)
    blocks, expected = capture_quietly(spread, windows)
    _, found = capture_quietly(spread, windows, memory_budget=1)
    assert not isinstance(found, dict), "a block at a time"
    for block in blocks:
        s, fitted = found[block], m.fit(block, found, m.NarrowMLP(24))
        assert s.hh.device == block.device and {p.device for p in fitted.parameters()} == {block.device}
        same(s.hh, expected[block].hh, rtol=0, atol=0)
        same(fitted.body.down.weight, m.fit(block, expected, m.NarrowMLP(24)).body.down.weight, rtol=0, atol=0)


def test_a_whole_compression_on_two_devices_is_that_of_one(llama, spread):
    windows, unseen = random_windows(6), random_windows(2, seed=1)
    measured, healings, logits, trainings = [], [], [], []
    for model in (llama, spread):
        blocks, stats = captured_whole(model, windows)
        plan = {block: m.fit(block, stats, m.NarrowMLP(24)) for block in blocks}
        training = m.Training(epochs=1, batch_tokens=16, check_tokens=32)
        plan[blocks[0]] = m.fit(blocks[0], stats, m.NarrowMLP(24), training=training)
        trainings.append(plan[blocks[0]].report.training.validation_curve)
        plans = {"all": plan, "last": {blocks[2]: plan[blocks[2]]}, "dense": {}}
        found = m.compare(model, plans, unseen, progress=False)
        measured.append(torch.tensor([[*found[label].nll, *found[label].kl] for label in plans]))
        healed, report = m.heal(model, plan, windows, unseen, m.planning.Healing(steps=1), progress=False)
        assert {b: {p.device for p in healed[b].parameters()} for b in blocks} == {b: {b.device} for b in blocks}
        healings.append(torch.tensor(report.validation_curve))
        logits.append(m.splice(model, healed)(unseen).logits)
    for pair in (measured, healings, logits, [torch.tensor(t) for t in trainings]):
        same(*pair, rtol=1e-3, atol=1e-4)


def test_prices_refit_streams_and_units_on_two_devices_are_those_of_one(llama, spread):
    windows, found = random_windows(4), []
    for model in (llama, spread):
        blocks, stats = captured_whole(model, windows)
        candidates = {block: [m.fit(block, stats, m.NarrowMLP(24))] for block in blocks}
        plan = {block: fitted[0] for block, fitted in candidates.items()}
        prices = m.planning.second_order_damage(model, candidates, windows[:2], progress=False)
        searched, history = m.planning.search(model, plan, candidates, windows[:2], rounds=1, progress=False)
        attention = m.find_blocks(model, "attention")
        heads = m.capture(model, attention, windows, validation_windows=0, progress=False)
        narrow = {b: m.fit(b, heads, m.replacements.NarrowAttention(3, 3, 6), samples=()) for b in attention}
        refitted = m.refit(model, plan | narrow, windows, progress=False).plan
        units = m.statistics.capture_units(model, blocks, m.models.token_batches(windows), progress=False)
        stream = m.statistics.capture_stream(model, windows, progress=False)
        cka = m.statistics.cka_map(units, blocks, progress=False)
        merged = m.methods.merge_mlps(blocks[:2], units)
        measured = m.compare(model, {"merged": merged, "refitted": refitted}, windows[:2], progress=False)
        rows = [torch.tensor(list(prices.values())), stream.distance, cka, torch.tensor([h["kl"] for h in history])]
        found.append([*rows, *(torch.from_numpy(r.nll) for r in measured.values())])
    for one, several in zip(*found, strict=True):
        same(several, one, rtol=1e-3, atol=1e-4)


def test_units_without_room_on_the_device_are_kept_on_the_cpu_and_compared_on_the_device(spread, monkeypatch):
    blocks, batches, found = find_blocks(spread), m.models.token_batches(random_windows(6)), []
    room = 2 * 50 * 2 * 4 * blocks[0].hidden_size  # half of it for 50 tokens of the two blocks there
    for free in (room, room - 1):
        monkeypatch.setattr(unit_similarity, "free_bytes", lambda device, free=free: free if device == FAKE else None)
        units = m.statistics.capture_units(spread, blocks, batches, most_tokens=50, progress=False)
        assert {units.of(block).device for block in blocks[::2]} == {FAKE if free == room else torch.device("cpu")}
        assert units.correlations(blocks[0], blocks[2]).device == FAKE
        found.append(m.statistics.cka_map(units, blocks, progress=False))
    assert torch.equal(*found)


def test_methods_that_remove_layers_work_on_two_devices(spread, llama):
    methods = ["replaceme", "replaceme_cosine", "streamline_layer", "streamline_mlp", "subfit", "uidl_linear"]
    measured = []
    for model in (llama, spread):
        known = m.methods.registry.calibrate(
            model, random_windows(6), [0.3], methods=methods, validation_windows=2, progress=False
        )
        plans = {method: m.METHODS[method](model, known, 0.3) for method in methods}
        found = m.compare(model, plans, random_windows(2, seed=1), progress=False)
        measured.append([found[method].perplexity for method in methods])
    assert measured[0] == pytest.approx(measured[1], rel=1e-2)


def test_a_spliced_copy_of_a_spread_model_stands_alone(spread):
    ids = random_windows(2)
    block = find_blocks(spread)[0]
    _, stats = capture_quietly(spread, random_windows(4))
    plan = {block: m.fit(block, stats, m.NarrowMLP(24))}
    before = spread(ids).logits
    compressed = m.splice(spread, plan)
    assert compressed.lm_head.weight is not spread.lm_head.weight
    same(compressed.lm_head.weight, spread.lm_head.weight, rtol=0, atol=0)
    assert all(module.forward.args[0] is module for module in compressed.modules() if hasattr(module, "_hf_hook"))
    assert compressed.to.__self__ is compressed
    same(spread(ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", loading.SPREAD)
def test_a_way_to_spread_a_model_reaches_transformers_and_the_model_stays_there(strategy, llama, tmp_path, monkeypatch):
    folder, asked = save_locally(llama, tmp_path / "model"), []

    def pretrained(model_class, path, **how):
        asked.append(how["device_map"])
        return over_two_devices(llama)

    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            m.load_model(folder, device=strategy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "pretrained", pretrained)
    model, _ = m.load_model(folder, device=strategy)
    assert asked == [strategy]
    assert {p.device.type for p in model.parameters()} == {"fake", "cpu"}
    assert m.models.resolve_device(strategy).type == "cuda"


def test_batches_follow_the_free_memory_of_the_fullest_gpu(spread, monkeypatch):
    blocks = find_blocks(spread)
    devices, window_bytes = (
        {block.device for block in blocks},
        moments._window_bytes(blocks, {"input_ids": random_windows(1, 16)}),
    )
    assert devices == {FAKE, torch.device("cpu")}
    assert window_bytes == 16 * 4 * (10 * blocks[0].hidden_size + 2 * blocks[0].n_params // blocks[0].hidden_size)
    assert memory.windows_at_once(devices, window_bytes) == memory.WINDOWS
    for windows, expected in ((0, 1), (1, 1), (5, 5), (1000, memory.MOST_WINDOWS)):
        free = {FAKE: 2 * windows * window_bytes, torch.device("cpu"): 10**12}
        monkeypatch.setattr(memory, "free_bytes", free.__getitem__)
        assert memory.windows_at_once(devices, window_bytes) == expected
