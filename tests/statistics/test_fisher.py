"""What the loss feels of neurons and heads, against prices of the same changes."""

import pytest
import torch
from tiny_models import CAUSAL, build, random_windows
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from mlpreplace import NarrowMLP, capture, find_blocks, fit
from mlpreplace.fitting.heads import HeadFits
from mlpreplace.fitting.neurons import ClosedForm
from mlpreplace.models.attention import attention_weights, key_units, query_columns
from mlpreplace.models.blocks import block_neurons
from mlpreplace.planning import second_order_damage
from mlpreplace.replacements import NarrowAttention
from mlpreplace.statistics import fisher_effects, fisher_gradients, with_effects
from mlpreplace.statistics.gradients import log_probabilities, loss_of
from mlpreplace.statistics.groups import InGroups

WINDOWS, QUIET = random_windows(4, 10, seed=2), dict(progress=False)
PREDICTED = 4 * 9


class Without(nn.Module):
    """An MLP without one of its neurons."""

    def __init__(self, block, neuron: int):
        super().__init__()
        self.block, self.neuron = block, neuron

    def forward(self, x):
        h = block_neurons(self.block, x.flatten(0, -2))[:, self.neuron, None]
        return self.block.modules[0](x) - (h * self.block.weights().down[:, self.neuron]).view_as(x)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_effect_of_a_neuron_is_twice_the_price_of_leaving_it_out(name):
    model = build(name)
    blocks = find_blocks(model)
    effects = fisher_effects(model, blocks, WINDOWS, **QUIET)
    prices = second_order_damage(model, {b: [Without(b, j) for j in (0, 7)] for b in blocks}, WINDOWS, **QUIET)
    for block in blocks:
        assert_close(effects[block][[0, 7]] / (2 * PREDICTED), torch.tensor(prices[block]).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "mixtral"])
def test_the_effect_of_all_heads_is_that_of_the_whole_output(name):
    """Heads add up to the block's output, but for its bias."""
    model = build(name)
    blocks = find_blocks(model, "attention")
    effects, seen = fisher_effects(model, blocks, WINDOWS, **QUIET), fisher_gradients(model, blocks, WINDOWS, **QUIET)
    for block in blocks:
        bias, n = attention_weights(block).output_bias, len(attention_weights(block).query)
        of_heads = effects[block][:n, :n]
        y = seen[block].y - (0 if bias is None else bias)
        whole = (y * seen[block].gradient).sum(-1).double().square().sum()  # none behind which a norm stands (Gemma 2)
        assert_close(of_heads.sum(), whole, rtol=1e-4, atol=1e-6 * of_heads.diagonal().sum().item())


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gpt_neox", "phi3"])
def test_what_is_felt_of_units_of_queries_is_the_gradient_of_scaling_them(name):
    """Σ_t qᵀ∂/∂q is the derivative of the loss by a factor on these outputs of the projection."""
    model, ids = build(name), WINDOWS[:2]
    block = find_blocks(model, "attention")[1]
    seen = fisher_gradients(model, [block], ids, **QUIET)[block]
    units, weights = key_units(block), attention_weights(block)
    factors = torch.ones(len(weights.key), len(units), requires_grad=True)  # [groups, units]
    of_dims = torch.zeros(len(units), weights.query.shape[1])
    of_dims[torch.arange(len(units))[:, None], units] = 1
    scale = (factors @ of_dims)[weights.group_of].flatten()  # [heads · head_dim]

    def scaled(module, args, output):
        return output.index_copy(-1, query_columns(block), output[..., query_columns(block)] * scale)

    with block.host.get_submodule(block.heads.query).register_forward_hook(scaled):
        loss_of(log_probabilities(model, ids), None, torch.Generator().manual_seed(0)).backward()
    assert_close(seen.keys.sum((0, 1)).view_as(factors), factors.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_the_price_of_narrower_keys_is_half_the_effect_of_what_is_left_out(name):
    model = build(name)
    blocks = find_blocks(model, "attention")
    effects = fisher_effects(model, blocks, WINDOWS, **QUIET)
    stats = with_effects(capture(model, blocks, random_windows(), validation_windows=2, **QUIET), effects)
    for block in blocks:
        n, (groups, value_dim, _) = len(attention_weights(block).query), attention_weights(block).value.shape
        narrow = NarrowAttention(n, groups, value_dim, 4)
        (price,) = second_order_damage(model, {block: [narrow]}, WINDOWS, stats, **QUIET)[block]
        left_out = HeadFits(block, stats[block], ClosedForm()).units_left_out(narrow).flatten()
        of_units = effects[block][n:, n:]
        assert_close(price, of_units[left_out][:, left_out].sum().item() / (2 * PREDICTED), rtol=1e-4, atol=0)


@pytest.mark.parametrize("pass_over", [fisher_effects, fisher_gradients])
def test_a_backward_pass_holds_nothing_of_the_inside_of_a_layer(pass_over, llama):
    """Of queries, keys and neurons nothing is left when the last layer is done."""
    made, alive = [], []
    for layer in llama.model.layers:
        for inside in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.up_proj):
            inside.register_forward_hook(lambda _, args, y: made.append(StorageWeakRef(y.untyped_storage())))
    llama.model.norm.register_forward_pre_hook(lambda *_: alive.append([ref.expired() for ref in made].count(False)))
    pass_over(llama, find_blocks(llama) + find_blocks(llama, "attention"), WINDOWS, **QUIET)
    assert made and alive == [0, 0]


def test_heads_and_neurons_are_kept_by_effect(llama):
    """Those without an effect go first, whatever their energy."""
    blocks = find_blocks(llama) + find_blocks(llama, "attention")
    stats = capture(llama, blocks, random_windows(), validation_windows=2, **QUIET)
    mlp, attention = blocks[1], blocks[4]
    felt, heads = torch.ones(mlp.intermediate_size), torch.eye(4 + 4 * 4)  # 4 heads, 4 pairs of each
    felt[:20], heads[2, 2] = 0, 0
    stats = with_effects(stats, {mlp: felt.double(), attention: heads.double()})
    narrow = fit(mlp, stats, NarrowMLP(mlp.intermediate_size - 20), selection="fisher")
    assert torch.equal(narrow.body.up.weight, mlp.weights().up[20:])
    kept = fit(attention, stats, NarrowAttention(3, 3, 8), selection="fisher")
    assert torch.equal(kept.body.query.weight, attention_weights(attention).query[[0, 1, 3]].flatten(0, 1))


def test_statistics_in_groups_have_their_effects(llama):
    blocks = find_blocks(llama)
    effects = fisher_effects(llama, blocks, WINDOWS, **QUIET)
    groups = with_effects(capture(llama, blocks, random_windows(), validation_windows=2, memory_budget=0, **QUIET), effects)
    assert isinstance(groups, InGroups)
    for block in blocks:
        assert torch.equal(groups[block].effect, effects[block])


@pytest.mark.parametrize("selection", ["fisher", "fisher_energy"])
def test_a_choice_by_effects_that_were_not_measured_is_refused(selection, captured):
    _, blocks, stats = captured
    with pytest.raises(ValueError, match="fisher_effects"):
        fit(blocks[0], stats, NarrowMLP(8), selection=selection)
