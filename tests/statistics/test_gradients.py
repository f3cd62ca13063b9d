"""Probed gradients against finite differences, for every causal architecture, dense and replaced blocks of both kinds."""

from functools import lru_cache

import pytest
import torch
from attention_blocks import both_kinds, precise
from conftest import activations, capture_quietly
from hybrid_blocks import fitted
from tiny_models import CAUSAL, build, random_windows

from mlpreplace import AttentionMLP, ConvMLP, compare, find_blocks, spliced
from mlpreplace.statistics.gradients import OBJECTIVES, probe

DOUBLE = ("gpt2", "gpt_neox", "falcon", "phi", "opt")  # in float64 throughout; RMS norms are in float32 in any case
WINDOWS = random_windows(3, 10, seed=4)
PLANS = ["empty", "both kinds"]


def blocks_of(model):
    return find_blocks(model) + find_blocks(model, "attention")


@lru_cache
def case(name: str, plan: str = "both kinds"):
    """(model, plan), in float64 where the architecture can be."""
    model = precise(name)
    return model, {} if plan == "empty" else both_kinds(model)


def pushed_loss(model, plan, block, push, log_p, drawn) -> float:
    """The objective in float64 when ``push`` [windows, seq_len, hidden] is added to the output of one block."""

    def add(module, args, output):
        if isinstance(output, tuple):
            return (output[0] + push.to(output[0].dtype), *output[1:])
        return output + push.to(output.dtype).reshape(output.shape)

    with spliced(model, plan), torch.no_grad():
        handle = model.get_submodule(block.paths[-1]).register_forward_hook(add)
        try:
            log_q = model(WINDOWS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        finally:
            handle.remove()
    if drawn is not None:
        return -log_q.flatten(0, 1).gather(-1, drawn).sum().item()
    return (log_p.exp() * (log_p - log_q)).sum().item()


def assert_gradients(model, plan, objective, monkeypatch):
    with torch.no_grad():
        log_p = model(WINDOWS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    drawn = None
    if objective == "sampled":
        drawn = torch.randint(log_p.shape[-1], (log_p.shape[0] * log_p.shape[1], 1), generator=torch.Generator().manual_seed(1))
        monkeypatch.setattr(torch, "multinomial", lambda *args, **options: drawn)
    blocks = blocks_of(model)
    ((loss, probes),) = probe(model, plan, blocks, WINDOWS, objective, batch_size=3, progress=False)
    step, tolerance = (1e-5, 1e-5) if model.config.model_type in DOUBLE else (1e-3, 5e-3)
    for i, block in enumerate(blocks):
        p = probes[block]
        push = torch.randn(p.y.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        above, below = (pushed_loss(model, plan, block, sign * step * push, log_p, drawn) for sign in (1, -1))
        expected = (above - below) / (2 * step)
        scale = 1 + abs(expected) + p.gradient.norm().item()  # of KL at an empty plan all but the 1 is zero
        assert abs((p.gradient * push).sum().item() - expected) < tolerance * scale
    assert loss == pytest.approx(pushed_loss(model, plan, blocks[0], 0 * push, log_p, drawn), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CAUSAL)
def test_the_gradient_is_what_the_loss_does_when_an_output_moves(name, plan, objective, monkeypatch):
    assert_gradients(*case(name, plan), objective, monkeypatch)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_gradients_pass_through_replacements_that_look_back(name, monkeypatch):
    model, plan = fitted(name, AttentionMLP(12, head_dim=4), ConvMLP(12, kernel=3))
    assert_gradients(model, plan, "kl", monkeypatch)


@pytest.mark.parametrize("name", CAUSAL)
def test_x_and_y_are_what_a_block_sees_and_gives(name):
    model, plan = case(name)
    blocks = blocks_of(model)
    ((_, probes),) = probe(model, plan, blocks, WINDOWS, batch_size=3, progress=False)
    close = dict(rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for block, p in probes.items():
            assert p.x.shape == p.y.shape == p.gradient.shape == (*WINDOWS.shape, block.hidden_size)
            assert p.residual_energy.shape == WINDOWS.shape
            standing = plan[block](p.x) if block in plan else p.dense(block)
            torch.testing.assert_close(standing, p.y, **close)
            assert (block in plan) == (not torch.allclose(p.dense(block), p.y, **close))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_dense_model_is_probed_as_it_is_captured(name):
    model, _ = case(name)
    for kind in ("mlp", "attention"):
        blocks, statistics = capture_quietly(
            model, WINDOWS, kind, moments=("input",), validation_windows=0, sample_windows=None, batch_size=3
        )
        ((_, probes),) = probe(model, {}, blocks, WINDOWS, batch_size=3, progress=False)
        for block, p in probes.items():
            sample = statistics[block].train
            torch.testing.assert_close((p.x, p.y), (sample.x, sample.y))
            torch.testing.assert_close(p.residual_energy, sample.residual_energy)


def test_the_dense_output_of_a_replaced_block_is_the_blocks_own():
    """At the first layer, whose input no replacement has changed: attention is called with its masks and positions."""
    model, plan = case("llama")
    first = [block for block in plan if block.layer == 0 and block.kind == "attention"]
    ((_, probes),) = probe(model, plan, first, WINDOWS, batch_size=3, progress=False)
    ((_, dense),) = probe(model, {}, first, WINDOWS, batch_size=3, progress=False)
    for block in first:
        torch.testing.assert_close(probes[block].dense(block), dense[block].y)
        assert not torch.allclose(probes[block].y, dense[block].y)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_add_up_to_the_divergence_that_compare_measures(batch_size):
    model = build("llama")
    plan, windows = both_kinds(model), random_windows(5, 10)
    batches = list(probe(model, plan, plan, windows, batch_size=batch_size, progress=False))
    assert sum(len(next(iter(probes.values())).x) for _, probes in batches) == 5
    measured = compare(model, {"plan": plan}, windows, progress=False)["plan"]
    assert sum(loss for loss, _ in batches) == pytest.approx(measured.kl.sum(), rel=1e-4)


def test_tokens_are_drawn_from_the_spliced_model():
    """Then the loss averages to the entropy of what the spliced model predicts, and gradients to zero."""
    model = build("llama")
    plan = both_kinds(model)
    blocks, n = find_blocks(model), 4000
    windows = random_windows(1, 2).expand(n, 2)
    with spliced(model, plan), torch.no_grad():
        log_q = model(windows[:1], use_cache=False).logits[0, 0].double().log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum().item()
    deviation = (log_q.exp() * (log_q + entropy).square()).sum().item() ** 0.5
    ((loss, probes),) = probe(model, plan, blocks, windows, "sampled", seed=3, batch_size=n, progress=False)
    assert abs(loss / n - entropy) < 4 * deviation / n**0.5
    for p in probes.values():
        gradient = p.gradient[:, 0]  # [windows, hidden]; the last token predicts nothing
        assert (gradient.mean(0).abs() < 5 * gradient.std(0) / n**0.5 + 1e-7).all()
        assert not p.gradient[:, 1].any()


def test_a_seed_draws_the_same_tokens_again():
    model = build("llama")
    blocks = find_blocks(model)[2:]
    losses = [[loss for loss, _ in probe(model, {}, blocks, WINDOWS, "sampled", seed=s, progress=False)] for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.fixture
def marked():
    """A model in training mode with mixed flags and a gradient, a plan whose parameters ask for theirs, and a check."""
    model = build("gpt2")
    plan = both_kinds(model)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    held = next(model.parameters())
    held.grad = torch.ones_like(held)
    for replacement in plan.values():
        replacement.requires_grad_(True)
    model.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = list(model.modules())

    def check():
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert torch.equal(held.grad, torch.ones_like(held))
        assert [p.grad for p in model.parameters() if p is not held] == [None] * (len(flags) - 1)
        assert all(p.requires_grad and p.grad is None for replacement in plan.values() for p in replacement.parameters())
        assert list(model.modules()) == modules and all(module.training for module in modules)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)

    return model, plan, check


def test_between_batches_and_afterwards_the_model_is_as_it_was(marked):
    model, plan, check = marked
    batches = probe(model, plan, blocks_of(model), WINDOWS, batch_size=1, progress=False)
    next(batches)
    check()  # though two batches are left
    for _, probes in batches:
        check()
        assert not any(t.requires_grad for p in probes.values() for t in (p.x, p.y, p.gradient, p.residual_energy))


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_after_an_exception_the_model_is_as_it_was(marked, fails, monkeypatch):
    model, plan, check = marked

    def fail(*args, **options):
        raise RuntimeError("enough")

    if fails == "backward":
        monkeypatch.setattr(torch.Tensor, "backward", fail)
    else:
        monkeypatch.setattr(plan[find_blocks(model)[1]], "forward", fail)
    with pytest.raises(RuntimeError, match="enough"):
        next(probe(model, plan, blocks_of(model), WINDOWS, progress=False))
    check()


def test_dropout_is_off():
    """GPT-2 drops a tenth of its activations in training mode."""
    model = build("gpt2")
    plan = both_kinds(model)
    loss, _ = next(probe(model, plan, plan, WINDOWS, progress=False))
    again, _ = next(probe(model.train(), plan, plan, WINDOWS, progress=False))
    assert loss == pytest.approx(again, rel=1e-6)


def test_what_cannot_be_probed_is_refused_at_the_call():
    model = build("llama")
    deeper = find_blocks(build("llama", num_hidden_layers=5))
    blocks = find_blocks(model)
    with pytest.raises(ValueError, match="'nll'.*kl, sampled"):
        probe(model, {}, blocks, WINDOWS, "nll")
    with pytest.raises(ValueError, match="longer than the model's context"):
        probe(model, {}, blocks, random_windows(2, 100))
    with pytest.raises(ValueError, match="no block to probe"):
        probe(model, {}, [], WINDOWS)
    with pytest.raises(ValueError, match="no module model.layers.3.mlp: the blocks are of another model"):
        probe(model, {}, deeper, WINDOWS)


def test_x_is_what_enters_the_dense_block():
    model, _ = case("llama")
    blocks = find_blocks(model)
    ((_, probes),) = probe(model, {}, blocks, WINDOWS, batch_size=3, progress=False)
    for block, p in probes.items():
        seen = activations(model, block, WINDOWS)
        torch.testing.assert_close((p.x.flatten(0, 1), p.y.flatten(0, 1)), (seen["x"], seen["y"]))
