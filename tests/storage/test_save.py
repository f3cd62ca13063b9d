"""What is saved comes back bit for bit, from a base that is the same or without one."""

import copy
import shutil

import pytest
import torch
from conftest import capture_quietly, save_locally
from hybrid_blocks import HYBRIDS, shaken
from merging_blocks import KINDS
from safetensors.torch import load_file
from saved_models import FORMS, logits, narrow_plan, record_of, run_python, three_families
from tiny_models import build, outputs, random_windows

from mlpreplace import (
    Linear,
    LowRank,
    Mean,
    NarrowMLP,
    NarrowPlusLinear,
    TwoLayerMLP,
    find_blocks,
    fit,
    load,
    load_model,
    save,
    splice,
    spliced,
)
from mlpreplace.evaluation.int8 import quantized
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.planning.distil import with_rest
from mlpreplace.replacements import FactoredAttention, FactoredMLP, NarrowAttention, NarrowAttentionPlusMean, NarrowPlusMean
from mlpreplace.replacements.families import FAMILIES, Replacement
from mlpreplace.replacements.nested import NestedMLP
from mlpreplace.replacements.splice import bodies, replacements_of
from mlpreplace.replacements.whole_layers import Removed, without_layers
from mlpreplace.statistics.moments import MOMENTS

FITTED = [Mean(), Linear(), LowRank(4), NarrowMLP(24), NarrowPlusMean(16), FactoredMLP(6), NarrowPlusLinear(12, 3)]
FITTED += [TwoLayerMLP(8), *HYBRIDS]
FILES = {
    False: ["README.md", "SHA256SUMS", "config.json", "replacements.json", "replacements.safetensors"],
    True: ["README.md", "SHA256SUMS", "config.json", "generation_config.json", "replacements.json", "weights.safetensors"],
}


def fitted_plan(model, family, **options):
    blocks, stats = capture_quietly(model, random_windows(), **options)
    return {b: shaken(fit(b, stats, family), i) for i, b in enumerate(blocks)}


def nested_plan(model):
    blocks = find_blocks(model)
    return {b: shaken(Replacement(NestedMLP(((0.1, 32), (0.2, 24)), active=0.2), b), i) for i, b in enumerate(blocks)}


def attention_plan(model):
    blocks, stats = capture_quietly(model, random_windows(), "attention", moments=("input",))
    return {blocks[1]: fit(blocks[1], stats, Linear())}


def narrow_attention_plan(model):
    blocks, stats = capture_quietly(model, random_windows(), "attention")
    return {b: fit(b, stats, NarrowAttention(3, 3, 6, key_dim)) for b, key_dim in zip(blocks, (None, 4, 6), strict=True)}


def inside_attention_plan(model, *families):
    blocks, stats = capture_quietly(model, random_windows(), "attention", moments=("input", "hidden"))
    return {b: fit(b, stats, family) for b, family in zip(blocks, families, strict=False)}


PLANS = {str(family): lambda model, family=family: fitted_plan(model, family, moments=MOMENTS) for family in FITTED} | {
    "NestedMLP": nested_plan,
    "Removed layers": lambda model: without_layers(model, [1]),
    "Removed MLP": lambda model: {b: Replacement(Removed(), b) for b in find_blocks(model)[1:]},
    "Merged": lambda model: merge_mlps(find_blocks(model)[:2]),
    "attention": attention_plan,
    "NarrowAttention": narrow_attention_plan,
    "attention with a mean, factored": lambda model: inside_attention_plan(
        model, NarrowAttentionPlusMean(3, 3, 6), FactoredAttention(5, 4)
    ),
    "Tuned": lambda model: {b: shaken(r) for b, r in with_rest(model, without_layers(model, [1])).items()},
}


@pytest.fixture
def base(tmp_path):
    """A folder with the tiny Llama."""
    return save_locally(build("llama"), tmp_path / "base")


@pytest.fixture
def model(base):
    return load_model(base, device="cpu")[0]


@pytest.fixture
def compressed(model):
    return three_families(model)


def files_of(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_every_family_is_among_the_plans(llama):
    found = {type(r.family) for make in PLANS.values() for r in make(llama).values()}
    assert found == {family for family in FAMILIES.values() if family.__module__.startswith("mlpreplace.")}


@FORMS
@pytest.mark.parametrize("plan", PLANS)
def test_the_same_logits_bit_for_bit(plan, standalone, model, tmp_path, windows):
    compressed = splice(model, PLANS[plan](model))
    folder = save(compressed, tmp_path / "out", standalone=standalone)
    again = load(folder, device="cpu")
    assert files_of(folder) == FILES[standalone]
    assert torch.equal(logits(again, windows), logits(compressed, windows))
    assert not torch.equal(logits(again, windows), logits(model, windows))
    before, after = (replacements_of(m) for m in (compressed, again))
    assert {n: (r.family, r.report) for n, r in before.items()} == {n: (r.family, r.report) for n, r in after.items()}
    assert again.source == model.source and not again.training


@FORMS
@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma", "mixtral"])
def test_other_causal_models(name, standalone, tmp_path, windows):
    model, _ = load_model(save_locally(build(name), tmp_path / "base"), device="cpu")
    compressed = splice(model, fitted_plan(model, LowRank(4)) if name == "mixtral" else narrow_plan(model, 24))
    again = load(save(compressed, tmp_path / "out", standalone=standalone), device="cpu")
    assert torch.equal(logits(again, windows), logits(compressed, windows))
    assert again.generate(windows[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("name", ["bert", "vit", "marian", "t5"])
def test_other_models_stand_alone(name, tmp_path):
    compressed = splice(model := build(name), merge_mlps(find_blocks(model)[:2]))
    again = load(save(compressed, tmp_path / "out", standalone=True), device="cpu")
    assert torch.equal(outputs(again, name), outputs(compressed, name)) and name in KINDS
    assert not torch.equal(outputs(again, name), outputs(model, name))


CODE = """
import sys
import torch
from tiny_models import random_windows
from mlpreplace import load
from safetensors.torch import save_file
from saved_models import logits

torch.set_num_threads(1)
save_file({str(i): logits(load(folder, device="cpu"), random_windows()) for i, folder in enumerate(sys.argv[2:])}, sys.argv[1])
"""


def test_a_fresh_process_loads_both_forms(compressed, tmp_path, windows):
    """The standalone one from a place where its base never was."""
    folders = [save(compressed, tmp_path / str(form), standalone=form) for form in (False, True)]
    run_python(CODE, tmp_path / "logits", *folders)
    found = load_file(tmp_path / "logits")
    assert len(found) == 2 and all(torch.equal(each, logits(compressed, windows)) for each in found.values())


def test_standalone_needs_no_base(base, compressed, tmp_path, windows):
    folder = save(compressed, tmp_path / "out", standalone=True)
    shutil.rmtree(base)
    assert torch.equal(logits(load(folder, device="cpu"), windows), logits(compressed, windows))


def test_a_standalone_model_can_be_moved_and_saved_again(compressed, tmp_path, windows):
    folder = save(compressed, tmp_path / "out", standalone=True).rename(tmp_path / "moved")
    again = load(save(load(folder, device="cpu"), tmp_path / "out", standalone=True), device="cpu")
    assert torch.equal(logits(again, windows), logits(compressed, windows))


@FORMS
def test_the_precision_is_saved(standalone, base, tmp_path, windows):
    model, _ = load_model(base, device="cpu", dtype=torch.bfloat16)
    compressed = splice(model, narrow_plan(model, 24))
    again = load(save(compressed, tmp_path / "out", standalone=standalone), device="cpu")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again, windows), logits(compressed, windows))


def test_a_cast_model_stands_alone(compressed, tmp_path, windows):
    """Also with what is computed at the start: rotary frequencies were cast with the rest."""
    cast = copy.deepcopy(compressed).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is not what .*cast.*standalone=True"):
        save(cast, tmp_path / "out")
    again = load(save(cast, tmp_path / "out", standalone=True), device="cpu")
    assert torch.equal(logits(again, windows), logits(cast, windows))


def test_a_model_in_int8_alone_is_saved(model, tmp_path, windows):
    """Nothing needs to be replaced for that; the base has other weights, so all are written."""
    small = quantized(model)
    with pytest.raises(ValueError, match="quantized since"):
        save(small, tmp_path / "delta")
    folder = save(small, tmp_path / "out", standalone=True)
    assert torch.equal(load(folder, device="cpu")(windows).logits, small(windows).logits)
    assert next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("# ")).endswith("in int8")


def test_quantized_models_stand_alone(compressed, tmp_path, windows):
    small = quantized(compressed)
    with pytest.raises(ValueError, match="quantized since"):
        save(small, tmp_path / "out")
    folder = save(small, tmp_path / "out", standalone=True)
    again = load(folder, device="cpu")
    assert torch.equal(logits(again, windows), logits(small, windows))
    assert not torch.equal(logits(again, windows), logits(compressed, windows))
    assert len(record_of(folder)["int8"]) == 3 * 4 + 1 + 1 + 3  # attention; Linear, one side of a LowRank(4), NarrowMLP


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_tied_is_stored_once_and_tied_again(tied, tmp_path):
    model = build("llama", tie_word_embeddings=tied)
    merged = splice(model, plan := merge_mlps(find_blocks(model)))
    folder = save(merged, tmp_path / "out", standalone=True)
    again = load(folder, device="cpu")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert len({r.body for r in replacements_of(again).values()}) == 1
    size = (folder / "weights.safetensors").stat().st_size
    assert 0 < size - 4 * sum(p.numel() for p in merged.parameters()) < 8192
    assert [p.shape for p in again.parameters()] == [p.shape for p in merged.parameters()]
    assert record_of(folder)["parameters"] == {
        "dense": sum(p.numel() for p in model.parameters()),
        "compressed": sum(p.numel() for p in model.parameters()) - 2 * sum(p.numel() for p in bodies(plan).parameters()),
    }


def test_only_what_was_replaced_is_written(compressed, tmp_path):
    folder = save(compressed, tmp_path / "deep" / "out")
    weights = sum(4 * r.n_params for r in replacements_of(compressed).values())
    assert weights < (folder / "replacements.safetensors").stat().st_size < weights + 4096


def test_a_model_still_in_the_context_can_be_saved(model, tmp_path, windows):
    with spliced(model, narrow_plan(model, 24)):
        folder, inside = save(model, tmp_path / "out"), logits(model, windows)
    assert torch.equal(logits(load(folder, device="cpu"), windows), inside)
