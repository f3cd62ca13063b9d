"""What is saved comes back bit for bit, from a base that is the same or without one."""

import copy
import json
import re
import shutil
from functools import partial

import pytest
import torch
import yaml
from conftest import capture_quietly, save_locally
from hybrid_blocks import HYBRIDS, shaken
from merging_blocks import KINDS
from safetensors.torch import load_file, save_file
from saved_models import logits, narrow_plan, run_python
from tiny_models import build, outputs, random_windows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import mlpreplace
from mlpreplace import (
    Linear,
    LowRank,
    Mean,
    NarrowMLP,
    NarrowPlusLinear,
    NestedMLP,
    Removed,
    Source,
    TwoLayerMLP,
    export,
    find_blocks,
    fit,
    load,
    load_model,
    merge_mlps,
    quantized,
    save,
    saving,
    splice,
    spliced,
    with_rest,
    without_layers,
)
from mlpreplace.capture import MOMENTS
from mlpreplace.replacements import FAMILIES, Replacement
from mlpreplace.splice import bodies, replacements_of

FITTED = [Mean(), Linear(), LowRank(4), NarrowMLP(24), NarrowPlusLinear(12, 3), TwoLayerMLP(8), *HYBRIDS]
FILES = {
    False: ["README.md", "config.json", "replacements.json", "replacements.safetensors"],
    True: ["README.md", "config.json", "generation_config.json", "replacements.json", "weights.safetensors"],
}
FORMS = pytest.mark.parametrize("standalone", [False, True], ids=["delta", "standalone"])


def fitted_plan(model, family, **options):
    blocks, stats = capture_quietly(model, random_windows(), **options)
    return {b: shaken(fit(b, stats, family), i) for i, b in enumerate(blocks)}


def nested_plan(model):
    blocks = find_blocks(model)
    return {b: shaken(Replacement(NestedMLP(((0.1, 32), (0.2, 24)), active=0.2), b), i) for i, b in enumerate(blocks)}


def attention_plan(model):
    blocks, stats = capture_quietly(model, random_windows(), "attention", moments=("input",))
    return {blocks[1]: fit(blocks[1], stats, Linear())}


PLANS = {str(family): lambda model, family=family: fitted_plan(model, family, moments=MOMENTS) for family in FITTED} | {
    "NestedMLP": nested_plan,
    "Removed layers": lambda model: without_layers(model, [1]),
    "Removed MLP": lambda model: {b: Replacement(Removed(), b) for b in find_blocks(model)[1:]},
    "Merged": lambda model: merge_mlps(find_blocks(model)[:2]),
    "attention": attention_plan,
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
    """The model of that folder with one block per family replaced."""
    blocks, stats = capture_quietly(model, random_windows())
    families = [Linear(), LowRank(4), NarrowMLP(24)]
    return splice(model, {b: fit(b, stats, family) for b, family in zip(blocks, families, strict=True)})


def files_of(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def record_of(folder) -> dict:
    return json.loads((folder / "replacements.json").read_text())


# round trips


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


# the base


def change(folder: str, name: str) -> None:
    """One number of one tensor of a checkpoint."""
    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_base_with_one_other_weight_is_refused(name, base, compressed, tmp_path):
    """Also where it is one that was replaced: the folder says what it was made from."""
    folder = save(compressed, tmp_path / "out")
    made = record_of(folder)["base"]["weights"]
    change(base, name)
    with pytest.raises(ValueError, match=f"base model differs.*{made}, found [0-9a-f]{{32}}.*base=model") as error:
        load(folder, device="cpu")
    assert len(set(re.findall("[0-9a-f]{32}", str(error.value)))) == 2


def test_a_base_that_moved_is_the_same_base(base, compressed, tmp_path, windows):
    folder = save(compressed, tmp_path / "out")
    moved = shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="Unknown model"):
        load(folder, device="cpu")
    again = load(folder, base=load_model(str(moved), device="cpu")[0])
    assert torch.equal(logits(again, windows), logits(compressed, windows))


def test_a_base_in_shards_is_the_same_base(base, compressed, tmp_path, windows):
    folder = save(compressed, tmp_path / "out")
    build("llama").save_pretrained(base, max_shard_size="20KB")
    assert torch.equal(logits(load(folder, device="cpu"), windows), logits(compressed, windows))


def test_a_base_of_another_configuration_is_refused(base, compressed, tmp_path):
    folder = save(compressed, tmp_path / "out")
    build("llama", rms_norm_eps=0.1).config.save_pretrained(base)
    with pytest.raises(ValueError, match=r"configuration.*made with rms_norm_eps=1e-06, found 0\.1"):
        load(folder, device="cpu")


def test_a_base_of_the_caller(tmp_path, windows):
    """A model that was made in memory has no files to be hashed."""
    model = build("llama")
    model.source = Source.of(model, "made in memory")
    compressed = splice(model, narrow_plan(model, 24))
    folder = save(compressed, tmp_path / "out")
    assert torch.equal(logits(load(folder, base=build("llama")), windows), logits(compressed, windows))
    with pytest.raises(ValueError, match="base model differs"):
        load(folder, base=build("llama", seed=1))
    with pytest.raises(ValueError, match="in torch.float64"):
        load(folder, base=build("llama").double())
    with pytest.raises(ValueError, match="without base="):
        load(save(compressed, tmp_path / "whole", standalone=True), base=model)


def test_a_hub_id_is_pinned_to_its_commit(tmp_path, monkeypatch, windows):
    """A repository as the hub's cache has it, and no network."""
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--owner--name"
    folder = save_locally(build("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache))
    model, _ = load_model("owner/name", device="cpu")
    assert model.source == Source("owner/name", revision=commit)
    compressed = splice(model, narrow_plan(model, 24))
    saved = save(compressed, tmp_path / "out")
    assert yaml.safe_load((saved / "README.md").read_text().split("---")[1])["base_model"] == "owner/name"
    assert torch.equal(logits(load(saved, device="cpu"), windows), logits(compressed, windows))
    change(folder, "model.norm.weight")
    with pytest.raises(ValueError, match="base model differs"):
        load(saved, device="cpu")


def test_what_was_trained_outside_the_replacements_is_not_lost(compressed, tmp_path, windows):
    compressed.model.norm.weight.data[0] += 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not what .*trained"):
        save(compressed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = load(save(compressed, tmp_path / "out", standalone=True), device="cpu")
    assert torch.equal(logits(again, windows), logits(compressed, windows))


# what is written


def test_the_record_and_the_card_say_what_it_is(compressed, base, tmp_path):
    metrics = {"perplexity ratio": 1.25, "windows": "8 × 512"}
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder = save(compressed, tmp_path / "out", metrics=metrics, tokenizer=tokenizer)
    record, card = record_of(folder), (folder / "README.md").read_text()
    assert record["base"]["id"] == base and record["metrics"] == metrics and record["form"] == "delta"
    assert record["versions"]["mlpreplace"] == mlpreplace.__version__ and record["versions"]["torch"] == torch.__version__
    narrowed = record["replacements"]["model.layers.2.mlp"]
    assert (narrowed["family"], narrowed["width"]) == ("NarrowMLP", 24)
    assert record["sparsity"] == pytest.approx(
        (3 * 3 * 32 * 48 - 32 * 33 - 32 * 9 - 3 * 32 * 24) / (3 * (3 * 32 * 48 + 4 * 32 * 32))
    )
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "mlpreplace", "pipeline_tag": "text-generation", "tags": ["mlpreplace", "compression"]}
    for said in (base, record["base"]["weights"], "| perplexity ratio | 1.25 |", "| LowRank(rank=4) | `model.layers.1.mlp` |"):
        assert said in card
    assert f"{record['sparsity']:.1%} of all attention and MLP parameters are gone" in card
    assert AutoTokenizer.from_pretrained(folder)("w3 w4").input_ids == [4, 5]


@pytest.mark.parametrize("write", [partial(save, standalone=True), export], ids=["standalone", "export"])
def test_how_to_generate_is_kept_as_it_is(write, model, tmp_path):
    """save_pretrained of transformers refuses this one."""
    compressed = splice(model, narrow_plan(model, 24))
    compressed.generation_config = GenerationConfig(do_sample=False, temperature=0.5, max_new_tokens=3)
    again = load(write(compressed, tmp_path / "out"), device="cpu").generation_config
    assert (again.temperature, again.max_new_tokens) == (0.5, 3)


def test_a_class_that_transformers_does_not_have(tmp_path, windows):
    class Own(LlamaForCausalLM):
        pass

    model = build("llama")
    model.__class__ = Own
    model.source = Source.of(model, "own")
    compressed = splice(model, narrow_plan(model, 24))
    with pytest.raises(ValueError, match="no class Own"):
        save(compressed, tmp_path / "out", standalone=True)
    again = load(save(compressed, tmp_path / "out"), base=model)
    assert torch.equal(logits(again, windows), logits(compressed, windows))


@FORMS
def test_save_never_overwrites(standalone, compressed, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists"):
        save(compressed, tmp_path / "out", standalone=standalone)
    assert not any((tmp_path / "out").iterdir())


@FORMS
def test_save_needs_something_to_save(standalone, model, tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        save(model, tmp_path / "out", standalone=standalone)
    assert not (tmp_path / "out").exists()


def test_save_needs_to_know_the_base(llama, tmp_path, windows):
    compressed = splice(llama, narrow_plan(llama, 24))
    with pytest.raises(ValueError, match="source is not known"):
        save(compressed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = load(save(compressed, tmp_path / "out", standalone=True), device="cpu")
    assert again.source is None and torch.equal(logits(again, windows), logits(compressed, windows))


@FORMS
def test_nothing_is_left_when_saving_fails(standalone, compressed, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save(compressed, tmp_path / "parent" / "out", standalone=standalone)
    assert not any((tmp_path / "parent").iterdir())


def test_metrics_that_json_cannot_hold_leave_nothing(compressed, tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        save(compressed, tmp_path / "parent" / "out", metrics={"perplexity": torch.ones(2)})
    assert not any((tmp_path / "parent").iterdir())


def test_transformers_does_not_take_a_standalone_model_for_its_own(compressed, tmp_path):
    """It would load the rest and leave replaced blocks at random."""
    folder = save(compressed, tmp_path / "out", standalone=True)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(folder)


# what is loaded


def test_load_refuses_a_folder_without_replacements(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no replacements\.json"):
        load(tmp_path)


def test_load_refuses_an_unknown_family(compressed, tmp_path):
    folder = save(compressed, tmp_path / "out")
    record = record_of(folder)
    next(iter(record["replacements"].values()))["family"] = "Cubic"
    (folder / "replacements.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="Unknown family 'Cubic'"):
        load(folder, device="cpu")


@FORMS
def test_load_refuses_weights_that_are_not_whole(standalone, compressed, tmp_path):
    folder = save(compressed, tmp_path / "out", standalone=standalone)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.body.down.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 tensors are missing .*\['model\.layers\.2\.mlp\.body\.down\.weight'\]"):
        load(folder, device="cpu")
