"""Methods that narrow every block from inside: FLAP-type, MoDeGPT-type, SVD-LLM-type."""

from dataclasses import replace

import pytest
import torch
from conftest import capture_quietly
from decoding import logits
from layer_blocks import calibrated, deep
from tiny_models import HIDDEN, random_windows

from mlpreplace import capture, compare, find_blocks, fit, splice
from mlpreplace.fitting.heads import HeadFits
from mlpreplace.fitting.neurons import ClosedForm, fluctuation
from mlpreplace.methods.calibration import preferred
from mlpreplace.methods.flap import flap, keeping, standardised
from mlpreplace.methods.modegpt import modegpt
from mlpreplace.methods.svd_llm import svd_llm
from mlpreplace.models.blocks import NotApplicable


def constant_channels(model, neurons=8):
    """A GPT-2 whose MLPs have so many constant neurons, and whose first head is constant, in every layer."""
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.mlp.c_fc.weight[:, :neurons] = 0
            layer.mlp.c_fc.bias[:neurons] = 1
            dim = HIDDEN // model.config.n_head
            values = slice(2 * HIDDEN, 2 * HIDDEN + dim)
            layer.attn.c_attn.weight[:, values] = 0
            layer.attn.c_attn.bias[values] = 1
    return model


@pytest.mark.parametrize("ridge", [float("inf"), 1e-2])
def test_what_is_constant_goes_first_and_costs_nothing(ridge):
    model, ids = constant_channels(deep("gpt2")), random_windows(2, 9)
    known, plan = calibrated(model, (0.3,), ["flap"]), {}
    for block, s in known.blocks.items():
        scores = standardised(block, s)
        constant = 8 if block.kind == "mlp" else 1
        assert scores.argsort()[:constant].sort().values.tolist() == list(range(constant))
        family = keeping(block, torch.arange(len(scores)) >= constant)
        plan[block] = fit(block, known.blocks, family, selection="fluctuation", ridge=ridge)
    torch.testing.assert_close(logits(splice(model, plan), ids), logits(model, ids))


def test_fluctuation_is_that_of_what_enters_the_output_projection(llama):
    blocks, stats = capture_quietly(llama, random_windows(), moments=("hidden",), sample_windows=None)
    block, s = blocks[0], stats[blocks[0]]
    x = s.train.x[s.train.mask].double()
    h = (torch.nn.functional.silu(x @ block.gate.weight.double().T) * (x @ block.up.weight.double().T)).detach()
    expected = (h - h.mean(0)).square().sum(0) * block.down.weight.detach().double().square().sum(0)
    torch.testing.assert_close(fluctuation(s, block.down.weight.detach()), expected, rtol=1e-4, atol=1e-9)
    scores = standardised(block, s)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-9) and float(scores.std()) == pytest.approx(1)


def test_heads_are_kept_by_their_own_scores_whatever_their_group():
    model = deep("qwen2")
    blocks = find_blocks(model, "attention")
    stats = capture(model, blocks, random_windows(8, 16), moments=("hidden",), progress=False)
    for block in blocks:
        scores = standardised(block, stats[block])
        for n in range(1, len(scores)):
            kept = torch.zeros(len(scores), dtype=torch.bool).scatter(0, scores.topk(n).indices, True)
            fits = HeadFits(block, stats[block], ClosedForm(selection="fluctuation"))
            assert fits.kept(keeping(block, kept)).tolist() == kept.nonzero().flatten().tolist()


def test_without_refit_the_weights_that_stay_are_the_block_s_own():
    model = deep("llama")
    for block, replacement in flap(model, calibrated(model, (0.3,), ["flap"]), 0.3).items():
        body, own = replacement.body, block.modules[0]
        kept, all_of = (body.down, own.down_proj) if block.kind == "mlp" else (body.output, own.o_proj)
        assert all((column[:, None] == all_of.weight).all(0).any() for column in kept.weight.T)
        assert kept.bias.abs().max() > 0


def test_a_layer_that_changes_the_stream_more_loses_less():
    model = deep("llama")
    known = calibrated(model, (0.3,), ["modegpt"])
    influence = known.stream.distance.diagonal(1)

    def left(temperature):
        plan = modegpt(model, known, 0.3, temperatures=[temperature])
        kept = torch.ones(len(influence), dtype=torch.float64)
        for block, replacement in plan.items():
            if block.kind == "mlp":
                kept[block.layer] = replacement.n_params / block.n_params
        return kept

    assert left(1e3).std() < 0.02
    spread = left(float(influence.std()))
    assert spread.std() > 0.05 and (spread.argsort(stable=True)[:2].tolist() == influence.argsort()[:2].tolist())


def test_the_temperature_that_validation_prefers():
    """Of several, the one of least divergence on the validation windows."""
    model = deep("llama")
    known, ids = calibrated(model, (0.3,), ["modegpt"]), random_windows(2, 9)
    plans = [modegpt(model, known, 0.3, temperatures=[temperature]) for temperature in (0.02, 0.2)]
    divergence = [compare(model, {0: plan}, known.validation)[0].mean_kl for plan in plans]
    best = plans[divergence.index(min(divergence))]
    found = modegpt(model, known, 0.3, temperatures=[0.02, 0.2])
    assert torch.equal(logits(splice(model, found), ids), logits(splice(model, best), ids))
    for order in ((0, 1), (1, 0)):
        assert preferred(model, known, order, plans.__getitem__) is best
    assert preferred(model, replace(known, validation=None), (1, 0), plans.__getitem__) is plans[1]


def test_projections_of_low_rank_are_found_again():
    model, ids = deep("llama"), random_windows(2, 9)
    with torch.no_grad():
        for block in find_blocks(model) + find_blocks(model, "attention"):
            for layer in block.modules[0].modules():
                if isinstance(layer, torch.nn.Linear):
                    u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
                    layer.weight.copy_(u[:, :4] * s[:4] @ v[:4])
    plan = svd_llm(model, calibrated(model, (0.3,), ["svd_llm"]), 0.3)
    torch.testing.assert_close(logits(splice(model, plan), ids), logits(model, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [flap, modegpt, svd_llm])
def test_experts_are_refused_by_name(method):
    model = deep("mixtral")
    with pytest.raises(NotApplicable, match=r"model\.layers\.0\.mlp: its neurons or heads are not known"):
        method(model, calibrated(model, (0.3,), [method.__name__]), 0.3)


@pytest.mark.parametrize("method", [flap, modegpt, svd_llm])
def test_what_cannot_be_reached_is_said(method):
    model = deep("llama")
    known = calibrated(model, (0.3,), [method.__name__])
    with pytest.raises(ValueError, match=r"0\.999 cannot be reached: at most 0\.\d+"):
        method(model, known, 0.999)
