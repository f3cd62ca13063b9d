"""Hidden units: correlations and CKA against references made of the units themselves; padding and batches."""

from itertools import permutations

import numpy as np
import pytest
import torch
from merging_blocks import KINDS, as_doubles, plant, planted, real_tokens, reference_units, shuffled
from tiny_models import batches_for, build, random_windows
from torch.testing import assert_close

from mlpreplace import find_blocks
from mlpreplace.models.forward import watching
from mlpreplace.models.inputs import token_batches
from mlpreplace.statistics.unit_similarity import Rows, Units, capture_units, cka_map, match


def captured(model, batches, **options):
    blocks = find_blocks(model)
    return blocks, capture_units(model, blocks, batches, progress=False, **options)


def linear_cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """By its definition, of units [tokens, units]."""
    a, b = a - a.mean(0), b - b.mean(0)
    return float((b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))


@pytest.mark.parametrize("name", KINDS)
def test_correlations_are_those_of_the_units(name):
    """Every block type, images and pairs of sentences too: numpy's Pearson correlation of what the projections give."""
    model, batches = build(name), batches_for(name)
    blocks, units = captured(model, batches)
    a, b = [block for block in blocks if block.stack == blocks[-1].stack][:2]
    m = a.intermediate_size
    x, y = (reference_units(model, block, batches).numpy() for block in (a, b))
    expected = np.corrcoef(x, y, rowvar=False)[: x.shape[1], x.shape[1] :]
    found = units.correlations(a, b)
    assert found.shape == (x.shape[1] // m, m, m) and found.dtype == torch.float64
    for part, correlation in enumerate(found):
        own = slice(part * m, (part + 1) * m)
        assert_close(correlation, torch.from_numpy(expected[own, own]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_cka_is_that_of_the_units(name):
    model, batches = build(name), batches_for(name)
    blocks, units = captured(model, batches)
    side = [block for block in blocks if block.stack == blocks[0].stack]
    cka = cka_map(units, side, progress=False)
    of_units = [reference_units(model, block, batches) for block in side]
    expected = torch.tensor([[linear_cka(x, y) for y in of_units] for x in of_units], dtype=torch.float64)
    assert_close(cka, expected, rtol=0, atol=1e-5)
    assert_close(cka.diagonal(), torch.ones(len(side), dtype=torch.float64))
    assert (cka - torch.eye(len(side))).max() < 0.999


def test_cka_does_not_see_rotation_and_scale():
    model = build("gpt2").double()
    a, b, c = find_blocks(model)
    rotation = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    b.weights().up.copy_(3 * rotation @ a.weights().up)
    x = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    units = Units({block: x - x.mean(0) for block in (a, b, c)})
    cka = cka_map(units, [a, b, c], progress=False)
    assert cka[0, 1].item() == pytest.approx(1, abs=1e-12) and cka[0, 2] < 0.99


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "marian", "t5"])
def test_padding_is_ignored(name):
    """Whatever stands where the mask says no, of both sides; in float64, attention to padding is exactly none."""
    model, batches = build(name).double(), batches_for(name)
    masks = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
    for batch in batches:
        batch |= {masks[k]: real_tokens(*t.shape).long() for k, t in list(batch.items())}
    blocks, units = captured(model, batches)
    other = [{k: torch.where(b[masks[k]].bool(), t, 5) if k in masks else t for k, t in b.items()} for b in batches]
    _, again = captured(model, other)
    for block in blocks:
        side = "decoder_attention_mask" if "decoder" in block.stack and name in ("marian", "t5") else "attention_mask"
        real = torch.cat([b[side].flatten() for b in batches]).bool()
        assert units.tokens(block) == real.sum() < real.numel()
        assert_close(units.of(block), again.of(block), rtol=0, atol=1e-10)
        variance = reference_units(model, block, batches, real)[:, -48:].var(0, correction=0)
        assert_close(units.covariances(block, block)[-1].diagonal(), variance)


def test_labels_tell_what_the_decoder_reads():
    model = build("marian").double()
    (batch,) = batches_for("marian", batch_size=6, labels=True)
    del batch["decoder_input_ids"]
    batch["labels"] = batch["labels"].masked_fill(~real_tokens(6, 7), -100)
    blocks, units = captured(model, [batch])
    assert [units.tokens(b) for b in blocks] == [6 * 9] * 2 + [int(real_tokens(6, 7).sum())] * 2


@pytest.mark.parametrize("name", ["llama", "vit", "marian"])
def test_the_size_of_a_batch_does_not_matter(name):
    model = build(name).double()
    whole, parts = (captured(model, as_doubles(batches_for(name, 6, size)))[1] for size in (6, 1))
    for block in whole.inputs:
        assert_close(whole.of(block), parts.of(block), rtol=0, atol=1e-10)


def windows_of(n: int, seq_len: int = 16) -> list[dict]:
    return token_batches(random_windows(n, seq_len), batch_size=7)


def test_of_few_tokens_all_are_kept_and_centred_as_a_whole():
    """In one go, as if there were no bound: the same bits, on which published numbers depend."""
    model, seen = build("llama", hidden_size=96, num_attention_heads=4), []
    blocks = find_blocks(model)
    with watching(blocks[1].modules[0], enter=lambda x, _: seen.append(x.flatten(0, 1).clone())), torch.inference_mode():
        for batch in windows_of(40):
            model(**batch)
    x = torch.cat(seen)
    assert torch.equal(captured(model, windows_of(40), most_tokens=640)[1].of(blocks[1]), x.sub_(x.mean(0, dtype=torch.float64)))


def test_of_many_tokens_a_bounded_number_is_kept_evenly():
    model = build("llama")
    blocks, whole = captured(model, windows_of(400))
    _, few = captured(model, windows_of(400), most_tokens=2000)
    _, again = captured(model, token_batches(random_windows(400, 16), batch_size=3), most_tokens=2000)
    assert [whole.tokens(b) for b in blocks] == [6400] * 3
    assert all(1000 < few.tokens(b) <= 2000 for b in blocks)
    for block in blocks:
        assert_close(few.of(block), again.of(block), rtol=0, atol=1e-5)
    difference = few.correlations(*blocks[:2]) - whole.correlations(*blocks[:2])
    assert difference.square().mean().sqrt() < 1.5 * 1600**-0.5  # the standard error of as many tokens drawn at random
    a, b = (cka_map(units, blocks, progress=False) for units in (whole, few))
    assert_close(a, b, rtol=0, atol=0.02)


@pytest.mark.parametrize("seq_len", [16, 144, 197])
def test_tokens_that_are_kept_have_every_place_in_a_window(seq_len):
    """First tokens are unlike all others: a step that divides the length of a window would keep all or none of them."""
    rows, n = Rows(500, torch.device("cpu")), 5000 // seq_len * seq_len
    for part in torch.arange(n).float()[:, None].split(seq_len):
        rows.add(part)
        assert sum(len(kept) for _, kept in rows.parts) <= 500
    kept = torch.cat([kept for _, kept in rows.parts]).squeeze(1).long()
    assert 200 < len(kept) and torch.equal(kept, kept.unique())
    assert kept.diff().max() < 12 * n / len(kept), "no part of the text is left out"
    counts = torch.bincount(kept % seq_len, minlength=seq_len).double()
    assert counts.var() < 1.6 * counts.mean(), "as many as chance would have at a place"


def test_the_order_of_a_planted_copy_is_found():
    for name in ("llama", "gpt2", "vit"):
        model, [[a, b]], [order] = planted(name)
        _, units = captured(model, as_doubles(batches_for(name, 24)))
        assert torch.equal(order[match(units, a, b).order], torch.arange(48)), name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_match_is_the_best_of_all(name):
    """Brute force over all orders of five units; of a gated block for gate and up together."""
    sizes = {"n_inner": 5} if name == "gpt2" else {"intermediate_size": 5}
    for seed in range(3):
        model = build(name, seed, **sizes)
        (a, b, *_), units = captured(model, batches_for(name, seed=seed))
        correlation = units.correlations(a, b).sum(0)
        sums = {order: correlation[torch.arange(5), torch.tensor(order)].sum().item() for order in permutations(range(5))}
        assert tuple(match(units, a, b).order.tolist()) == max(sums, key=sums.__getitem__)


def test_constant_units_correlate_with_none():
    model = build("gpt2")
    a, b, *_ = find_blocks(model)
    with torch.no_grad():
        a.weights().up[3] = 0
        b.weights().up[7] = 0
    _, units = captured(model, batches_for("gpt2"))
    correlation = units.correlations(a, b)[0]
    assert torch.isfinite(correlation).all() and correlation.abs().max() <= 1 + 1e-9
    assert not correlation[3].any() and not correlation[:, 7].any() and correlation[4].any()
    assert sorted(match(units, a, b).order.tolist()) == list(range(48))
    with torch.no_grad():
        a.weights().up.zero_()
    with pytest.raises(ValueError, match=r"All units of transformer\.h\.0\.mlp are constant"):
        cka_map(units, [a, b], progress=False)


def test_what_is_kept_comes_back(results):
    model, batches = build("llama"), batches_for("llama")
    blocks, first = captured(model, batches, cached=True)
    made = [(cka_map(first, blocks, cached=True, progress=False), match(first, *blocks[:2], cached=True))]
    assert len(list(results.iterdir())) == 3
    _, again = captured(model, batches, cached=True)
    assert all(torch.equal(first.of(b), again.of(b)) for b in blocks)
    made.append((cka_map(again, blocks, cached=True, progress=False), match(again, *blocks[:2], cached=True)))
    assert torch.equal(made[0][0], made[1][0]) and made[0][1].seconds == made[1][1].seconds
    assert torch.equal(made[0][1].order, made[1][1].order)
    assert len(list(results.iterdir())) == 3
    plant(blocks[1], blocks[0], shuffled(48, 0))
    match(again, *blocks[:2], cached=True)
    assert len(list(results.iterdir())) == 4, "other weights, other match"


def test_errors():
    model, batches = build("marian"), batches_for("marian")
    blocks, units = captured(model, batches)
    with pytest.raises(ValueError, match="of different stacks: they do not see the same tokens"):
        match(units, blocks[1], blocks[2])
    with pytest.raises(ValueError, match="There are no batches"):
        captured(model, [])
    with pytest.raises(ValueError, match="token_batches"):
        captured(model, [random_windows()])
    with pytest.raises(ValueError, match="of one length in a batch"):
        captured(model, [{"input_ids": random_windows(3), "attention_mask": torch.ones(2, 12)}])
    with pytest.raises(ValueError, match="most_tokens=1"):
        captured(model, batches, most_tokens=1)
    with pytest.raises(ValueError, match="at least 2 real tokens"):
        captured(build("gpt2"), token_batches(random_windows(1, 1)))
    llama, other = build("llama"), build("llama")
    with pytest.raises(ValueError, match=r"given 36 tokens, the mask of its side is \(3, 1, 12, 12\)"):
        captured(llama, [batches_for("llama")[0] | {"attention_mask": torch.zeros(3, 1, 12, 12)}])
    with pytest.raises(ValueError, match="was not run"):
        capture_units(llama, find_blocks(other), batches_for("llama"), progress=False)
    with pytest.raises(ValueError, match="not among the captured"):
        capture_units(llama, find_blocks(llama)[:1], batches_for("llama"), progress=False).of(find_blocks(llama)[1])
    mixtral = build("mixtral")
    with pytest.raises(ValueError, match="neurons"):
        capture_units(mixtral, find_blocks(mixtral), batches_for("mixtral"), progress=False)
    with torch.no_grad():
        find_blocks(llama)[0].weights().down.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp are not finite"):
        captured(llama, batches_for("llama"))
