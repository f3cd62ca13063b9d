"""Every family in the table of docs/models.md: the same properties, of a tiny random model of each."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from saved_models import saved_and_loaded
from tiny_models import (
    ENCODERS,
    HIDDEN,
    INTERMEDIATE,
    MIXTURES,
    MODELS,
    MULTIMODAL,
    SEQ2SEQ,
    VISION_ONLY,
    batches_for,
    build,
    outputs,
)
from torch.testing import assert_close

from mlpreplace import LowRank, Mean, NarrowMLP, TwoLayerMLP, capture, export, find_blocks, fit, splice, spliced
from mlpreplace.methods.calibration import Calibration
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.methods.subfit import subfit
from mlpreplace.models.architectures import layer_lists
from mlpreplace.models.parameters import count_parameters
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.splice import replacements_of, sparsity_of
from mlpreplace.replacements.whole_layers import Tuned

FAMILIES = {  # as that table calls them: the tiny models that stand for them here
    "Llama": ["llama"],
    "Mistral": ["mistral"],
    "Qwen 2, 3": ["qwen2", "qwen3"],
    "Gemma 1, 2, 3": ["gemma", "gemma2", "gemma3_text"],
    "Phi": ["phi"],
    "Phi-3, GLM, GLM-4": ["phi3", "glm", "glm4"],
    "GPT-2": ["gpt2"],
    "GPT-NeoX": ["gpt_neox"],
    "OPT": ["opt"],
    "Falcon": ["falcon"],
    "Mixtral": ["mixtral"],
    "Qwen 2, 3 MoE": ["qwen2_moe", "qwen3_moe"],
    "LLaVA, Gemma 3 with images": ["llava", "gemma3"],
    "BERT, RoBERTa, DistilBERT": ["bert", "roberta", "distilbert"],
    "T5, T5 v1.1": ["t5", "t5_gated"],
    "BART, Marian": ["bart", "marian"],
    "ViT, DeiT": ["vit", "deit"],
}
COLUMNS = ("capture", "replace", "SubFit-style", "merge", "save, load", "export")
REFUSED = {"SubFit-style": SEQ2SEQ, "merge": MIXTURES, "export": [*MIXTURES, *MULTIMODAL]}
GENERATES = [name for name in MODELS if name not in (*ENCODERS, *VISION_ONLY)]
KINDS = ("mlp", "attention")


def able(column: str) -> list[str]:
    """The tiny models of which the table says that ``column`` works."""
    return [name for name in MODELS if name not in REFUSED.get(column, ())]


@cache
def known(name: str):
    """(model, its MLP blocks, its attention blocks, statistics of all); tests leave the model as it is."""
    model = build(name)
    mlps, attentions = (find_blocks(model, kind) for kind in KINDS)
    (whole,) = batches_for(name, n=20, batch_size=20)
    stats = capture(model, [*mlps, *attentions], whole, validation_windows=4, sample_windows=None, progress=False)
    return model, mlps, attentions, stats


@cache
def small_plan(name: str) -> dict:
    """Half the neurons of every MLP (of experts: a dense MLP), and low-rank maps for attention where that can be."""
    _, mlps, attentions, stats = known(name)
    plan = {b: fit(b, stats, NarrowMLP(24) if b.has_neurons else TwoLayerMLP(24)) for b in mlps}
    return plan | {b: fit(b, stats, LowRank(4)) for b in attentions if name in able("SubFit-style")}


def test_the_table_says_what_is_tested():
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(MODELS)
    table = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
    head, _, *rows = table[table.index("| family | capture |") :].partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    expected = [[family, *("yes" if set(names) <= set(able(c)) else "–" for c in COLUMNS)] for family, names in FAMILIES.items()]
    assert cells == [["family", *COLUMNS], *expected]
    assert all(set(names) <= set(able(c)) or not set(names) & set(able(c)) for names in FAMILIES.values() for c in COLUMNS)


# finding


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_all_of_the_layers_but_norms(name):
    model, mlps, attentions, _ = known(name)
    for _, path, layers in layer_lists(model):
        inside = sum(p.numel() for p in layers.parameters())
        norms = sum(p.numel() for m in layers.modules() if "norm" in type(m).__name__.lower() for p in m.parameters())
        blocks = [b for b in (*mlps, *attentions) if b.stack == path]
        assert sum(b.n_params for b in blocks) == inside - norms
        assert all(b.n_params > 0 for b in blocks) and sum(b.kind == "mlp" for b in blocks) == len(layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_come_in_the_order_in_which_they_run(name, kind):
    model, ran = known(name)[0], []
    blocks = find_blocks(model, kind)
    hooks = [b.modules[0].register_forward_pre_hook(lambda m, args, b=b: ran.append(b)) for b in blocks]
    outputs(model, name, n=1)
    for hook in hooks:
        hook.remove()
    assert ran == blocks and len({b.name for b in blocks}) == len(blocks)
    for b in blocks:
        assert b.name == b.paths[0] and b.name.startswith(f"{b.stack}.{b.layer}.")
        assert b.host is model.get_submodule(f"{b.stack}.{b.layer}")
        assert all(model.get_submodule(path) is module for path, module in zip(b.paths, b.modules, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_parts_sum_to_the_total(name):
    model = known(name)[0]
    parts = count_parameters(model)
    total = parts.pop("total")
    assert total == sum(p.numel() for p in model.parameters()) == sum(parts.values())
    assert min(parts.values()) >= 0


@pytest.mark.parametrize("name", MODELS)
def test_weights_reproduce_the_block(name):
    """Any layer class, Conv1D included: down(act(up x)) or down(act(gate x) · up x) by hand is the modules' own output."""
    mlps = known(name)[1]
    assert any(b.has_neurons for b in mlps) == (name not in ("mixtral", "qwen2_moe"))
    for block in (b for b in mlps if b.has_neurons):
        w, x = block.weights(), torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
        assert (block.hidden_size, block.intermediate_size) == (HIDDEN, INTERMEDIATE)
        assert (w.up.shape, w.down.shape) == ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))

        def affine(weight, bias, x=x):
            return x @ weight.T + (0 if bias is None else bias)

        up = affine(w.up, w.up_bias)
        h = block.activation(up) if w.gate is None else block.activation(affine(w.gate, w.gate_bias)) * up
        with torch.no_grad():
            for module in block.modules:
                x = module(x)
        assert_close(affine(w.down, w.down_bias, h), x, rtol=1e-4, atol=1e-4)


# capture, fit, splice


@pytest.mark.parametrize("name", able("capture"))
def test_what_is_captured_is_what_the_blocks_read_and_give(name):
    _, mlps, attentions, stats = known(name)
    for block in (*mlps, *attentions):
        s = stats[block]
        x, y = (t.flatten(0, 1) for t in (s.train.x, s.train.y))
        assert s.tokens == s.train.tokens == len(x) and s.validation.tokens * 4 == s.tokens
        assert_close(s.xx, x.double().T @ x.double(), rtol=1e-4, atol=1e-4)
        assert_close(s.sum_y, y.double().sum(0), rtol=1e-4, atol=1e-4)
        assert (s.hh is not None) == (block.output_projection is not None)
        if block.kind == "mlp":
            given = s.train.x
            with torch.no_grad():
                for module in block.modules:
                    given = module(given)
            assert_close(given, s.train.y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", able("replace"))
def test_a_full_size_replacement_is_the_dense_model(name):
    model, mlps, _, stats = known(name)
    dense = outputs(model, name)
    with spliced(model, {b: Replacement(Tuned(), b) for b in mlps}):
        assert torch.equal(outputs(model, name), dense)
    full = {b: fit(b, stats, NarrowMLP(INTERMEDIATE)) for b in mlps if b.has_neurons}
    with spliced(model, full):
        assert_close(outputs(model, name), dense, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", able("replace"))
def test_a_fitted_mlp_differs_from_the_block_and_beats_its_mean(name):
    model, mlps, _, stats = known(name)
    means, dense = {b: fit(b, stats, Mean()) for b in mlps}, outputs(model, name)
    small = {b: r for b, r in small_plan(name).items() if b.kind == "mlp"}
    changed = []
    for plan in (means, small):
        with spliced(model, plan):
            changed.append(outputs(model, name))
    assert all((out - dense).abs().max() > 1e-2 for out in changed) and not torch.equal(*changed)
    for b in mlps:
        assert small[b].report.train.pooled < 0.95 * means[b].report.train.pooled
        assert small[b].n_params < b.n_params


@pytest.mark.parametrize("name", able("replace"))
def test_the_exact_modules_return_after_an_exception_too(name):
    model, plan = known(name)[0], small_plan(name)
    dense, before = outputs(model, name), dict(model.named_modules())
    with spliced(model, plan) as inside:
        assert inside is model and replacements_of(model) == {b.name: r for b, r in plan.items()}
        changed = outputs(model, name)
    assert (changed - dense).abs().max() > 1e-2
    assert dict(model.named_modules()) == before and torch.equal(outputs(model, name), dense)
    with pytest.raises(RuntimeError, match="inside"), spliced(model, plan):
        raise RuntimeError("inside")
    assert dict(model.named_modules()) == before and torch.equal(outputs(model, name), dense)


@pytest.mark.parametrize("name", GENERATES)
def test_generation_does_not_depend_on_the_cache(name):
    compressed = splice(known(name)[0], small_plan(name))
    (prompt,) = batches_for(name, n=2, batch_size=2, seed=4)
    prompt.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached, full = (compressed.generate(**prompt, use_cache=u, **options) for u in (True, False))
    assert torch.equal(cached, full) and cached.unique().numel() > 3


# SubFit-style


@pytest.mark.parametrize("name", able("SubFit-style"))
def test_subfit_bypasses_attention_and_mlps(name):
    model, _, _, stats = known(name)
    plan = subfit(model, Calibration(blocks=stats), 0.85, score="bypass")
    assert {b.kind for b in plan} == set(KINDS) and sparsity_of(model, plan) >= 0.85
    dense = outputs(model, name)
    with spliced(model, plan):
        assert (outputs(model, name) - dense).abs().max() > 1e-2
    assert torch.equal(outputs(model, name), dense)


@pytest.mark.parametrize("name", REFUSED["SubFit-style"])
def test_attention_of_an_encoder_decoder_is_refused(name):
    model, _, attentions, stats = known(name)
    for block in attentions:
        with pytest.raises(ValueError, match=f"{block.name}: attention of an encoder-decoder cannot be replaced"):
            splice(model, {block: fit(block, stats, LowRank(4))})


# merging, saving, exporting


@pytest.mark.parametrize("name", able("merge"))
def test_a_merged_model_stays_tied(name, tmp_path):
    model, mlps, _, _ = known(name)
    first, *others = pair = mlps[:2]
    merged = splice(model, merge_mlps(pair))
    assert (outputs(merged, name) - outputs(model, name)).abs().max() > 1e-2
    for again in (merged, copy.deepcopy(merged), saved_and_loaded(name, merge_mlps(pair), tmp_path)):
        a, b = replacements_of(again).values()
        assert a.body is b.body
        assert count_parameters(model)["total"] - count_parameters(again)["total"] == first.n_params
        assert torch.equal(outputs(again, name), outputs(merged, name))


@pytest.mark.parametrize("name", REFUSED["merge"])
def test_experts_are_not_merged(name):
    experts = [b for b in known(name)[1] if not b.has_neurons]
    with pytest.raises(ValueError, match="is no up/down MLP; its neurons cannot be selected"):
        merge_mlps(experts[:2])


@pytest.mark.parametrize("name", able("save, load"))
def test_saved_and_loaded_outputs_are_the_same_bit_for_bit(name, tmp_path):
    plan = small_plan(name)
    again = saved_and_loaded(name, plan, tmp_path)
    assert torch.equal(outputs(again, name), outputs(splice(known(name)[0], plan), name))
    found = {block_name: (r.family, r.report) for block_name, r in replacements_of(again).items()}
    assert found == {b.name: (r.family, r.report) for b, r in plan.items()}


@pytest.mark.parametrize("name", able("export"))
def test_transformers_loads_what_was_exported(name, tmp_path):
    model, mlps, _, stats = known(name)
    if name == "marian":  # its sinusoids are computed anew, never stored
        model = copy.deepcopy(model)
        for side in (model.model.encoder, model.model.decoder):
            side.embed_positions.weight.copy_(side.embed_positions.create_weight())
    plan = {b: fit(b, stats, NarrowMLP(24)) for b in mlps}
    compressed = splice(model, plan)
    again = type(model).from_pretrained(export(compressed, tmp_path / "out")).eval()
    assert torch.equal(outputs(again, name), outputs(compressed, name))
    assert not torch.equal(outputs(again, name), outputs(model, name))
    assert count_parameters(again)["total"] == count_parameters(compressed)["total"]


@pytest.mark.parametrize("name", REFUSED["export"])
def test_what_the_architecture_has_no_form_for_is_not_exported(name, tmp_path):
    plan = {b: r for b, r in small_plan(name).items() if b.kind == "mlp"}
    with pytest.raises(ValueError, match=r"save\(model, folder, standalone=True\) writes any model"):
        export(splice(known(name)[0], plan), tmp_path / "out")
    assert not list(tmp_path.iterdir())
