"""A folder that asks for something else than its files hold is refused, by file and key, before memory is taken."""

import json
import resource
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import save_locally
from forked import SERVER
from safetensors.torch import load_file, save_file
from saved_models import change_record, logits, narrow_plan, reseal, three_families
from tiny_models import build

from mlpreplace import export, load, load_model, save, splice
from mlpreplace.evaluation.int8 import quantized
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.models.blocks import find_blocks

LINEAR, LOW_RANK, NARROW = (f"model.layers.{i}.mlp" for i in range(3))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{form: folder} of saved models, to be copied."""
    root = tmp_path_factory.mktemp("written")
    model, _ = load_model(save_locally(build("llama"), root / "base"), device="cpu")
    merged = splice(model, merge_mlps(find_blocks(model)[:2]))
    return {
        "delta": save(three_families(model), root / "delta"),
        "standalone": save(three_families(model), root / "standalone", standalone=True),
        "int8": save(quantized(three_families(model)), root / "int8", standalone=True),
        "merged": save(merged, root / "merged"),
        "plain": export(splice(model, narrow_plan(model, 24)), root / "plain"),
        "widths": export(splice(model, narrow_plan(model, 24, 16, 8)), root / "widths"),
    }


@pytest.fixture
def of(written, tmp_path):
    """of(form): a copy of that folder."""
    return lambda form: shutil.copytree(written[form], tmp_path / "copy")


def one(name: str, **changes):
    return lambda record: record["replacements"][name].update(changes)


def without(*path: str):
    def change(record) -> None:
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return change


def with_block(name: str):
    return lambda record: record["replacements"].update({name: record["replacements"].pop(NARROW)})


HOSTILE = {  # form: {what the error says: change of the record}
    "delta": {
        "form.*'pickle'": lambda r: r.update(form="pickle"),
        "has no 'form'": without("form"),
        "has no 'dtype'": without("dtype"),
        "dtype.*'float33'": lambda r: r.update(dtype="float33"),
        "dtype.*'load'": lambda r: r.update(dtype="load"),
        "dtype.*'int8'": lambda r: r.update(dtype="int8"),
        "'dtype' is 3": lambda r: r.update(dtype=3),
        "has no 'replacements'": without("replacements"),
        "'replacements' is \\[": lambda r: r.update(replacements=[]),
        "'base' is null": lambda r: r.update(base=None),
        "base has no 'weights'": without("base", "weights"),
        "base: 'id' is \\{": lambda r: r["base"].update(id={}),
        "architecture has no 'type'": without("architecture", "type"),
        "architecture: 'stacks' is no list of Stacks": lambda r: r["architecture"].update(stacks=[{"layers": "layers"}]),
        "architecture: 'stacks' is 1": lambda r: r["architecture"].update(stacks=1),
        "architecture' is 'llama'": lambda r: r.update(architecture="llama"),
        "has no 'tied'": without("tied"),
        "'int8' and 'tied' should name": lambda r: r.update(tied={"a": 1}),
        "nothing cannot be tied": lambda r: r.update(tied={"nothing": f"{NARROW}.body.up.weight"}),
        "cannot be tied to nothing": lambda r: r.update(tied={f"{NARROW}.body.up.weight": "nothing"}),
        "'int8' names 'model.norm'": lambda r: r.update(int8=["model.norm"]),
        "'int8' names 'nowhere'": lambda r: r.update(int8=["nowhere"]),
        "no block model.layers.9.mlp": with_block("model.layers.9.mlp"),
        f"replacement of {NARROW} has no 'family'": without("replacements", NARROW, "family"),
        f"replacement of {NARROW} should be an object": lambda r: r["replacements"].update({NARROW: 1}),
        "Unknown family 'os.system'": one(NARROW, family="os.system"),
        f"{NARROW}.*30,000,000|{NARROW}.*width=30000000": one(NARROW, width=30_000_000),
        f"{NARROW}.*width=-1": one(NARROW, width=-1),
        f"{NARROW}.*made.*'many'": one(NARROW, width="many"),
        f"{NARROW}.*made": one(NARROW, width=None),
        f"{NARROW}.*made.*whole number": one(NARROW, width=24.5),
        f"{NARROW}.*made.*sparsity": one(NARROW, sparsity=0.5),
        f"{NARROW}.*report|{NARROW}.*tokens": one(NARROW, report={"seconds": 1}),
        f"{NARROW}.*'body' is 1": one(NARROW, body=1),
        f"{NARROW}.*elsewhere": one(NARROW, body="elsewhere"),
        f"{NARROW}.*cannot share": one(NARROW, body=LINEAR),
        f"{LOW_RANK}.*rank=33": one(LOW_RANK, rank=33),
        f"{LOW_RANK}.body.* is torch.float32 \\[4, 32\\].* \\[5, 32\\]": one(LOW_RANK, rank=5),
        f"{NARROW}.*parameters, the file of weights holds": one(
            NARROW, family="MixtureOfExperts", width=1, experts=10**9, body=NARROW
        ),
    },
    "standalone": {
        "no class Nothing": lambda r: r.update(model="Nothing"),
        "no class pipeline": lambda r: r.update(model="pipeline"),
        "no class torch": lambda r: r.update(model="torch"),
        "no class PreTrainedModel": lambda r: r.update(model="PreTrainedModel"),
        "is no GPT2Config|GPT2LMHeadModel|no block": lambda r: r.update(model="GPT2LMHeadModel"),
        "parameters, the file of weights holds|width=30000000": one(NARROW, width=30_000_000),
        "tensors are missing or have no place": without("replacements", LINEAR),
        "cannot be tied": lambda r: r.update(tied={"lm_head.weight": "model.norm.weight"}),
    },
    "merged": {f"{LINEAR}.*width|{LINEAR}.*made": one(LINEAR, family="NarrowMLP", width=30_000_000)},
    "int8": {"missing or have no place": lambda r: r.update(int8=[]), "'int8' names": lambda r: r["int8"].append("lm_head.x")},
    "plain": {"has no 'widths'": without("widths"), "no class Nothing": lambda r: r.update(model="Nothing")},
    "widths": {"'widths' is 1": lambda r: r.update(widths=1)},
}
CASES = [(form, said) for form, changes in HOSTILE.items() for said in changes]


@pytest.mark.parametrize(("form", "said"), CASES)
def test_a_record_that_is_not_of_its_files(form, said, of):
    folder = of(form)
    change_record(folder, HOSTILE[form][said])
    with pytest.raises(ValueError, match=said) as error:
        load(folder, device="cpu")
    assert str(folder) in str(error.value) or "no class" in str(error.value)


CONTENTS = [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b"{'form': 1}"]


@pytest.mark.parametrize("content", CONTENTS, ids=[str(content[:9]) for content in CONTENTS])
@pytest.mark.parametrize("name", ["replacements.json", "config.json", "generation_config.json"])
def test_a_file_that_is_no_json(name, content, of):
    folder = of("standalone")
    (folder / name).write_bytes(content)
    reseal(folder)
    with pytest.raises(ValueError, match=rf"{name} (is no json|should hold a json object)"):
        load(folder, device="cpu")


CONFIGURATIONS = {
    "wide": dict(hidden_size=2**30),
    "many tokens": dict(vocab_size=2**31),
    "deep": dict(num_hidden_layers=10**9),
    "no heads": dict(num_attention_heads=0),
    "heads of a name": dict(num_attention_heads="four"),
    "an activation": dict(hidden_act="__import__"),
    "no frequencies": dict(rope_parameters={"rope_type": "none"}),
    "fewer layers": dict(num_hidden_layers=2),
    "more layers": dict(num_hidden_layers=4),
    "heads of another size": dict(head_dim=16),
}


def changed_config(folder, changes: dict):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    reseal(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("form", ["standalone", "plain", "widths"])
def test_a_configuration_that_is_not_of_its_weights(form, name, of):
    folder = changed_config(of(form), CONFIGURATIONS[name])
    with pytest.raises(ValueError, match=str(folder)):
        load(folder, device="cpu")


def test_no_kernel_of_a_configuration_is_fetched(of, windows):
    """attn_implementation may name a repository of code."""
    folder = of("standalone")
    expected = logits(load(folder, device="cpu"), windows)
    changes = {name: "somebody/kernel" for name in ("attn_implementation", "_attn_implementation", "experts_implementation")}
    again = load(changed_config(folder, changes), device="cpu")
    assert again.config._attn_implementation in ("sdpa", "eager")
    assert torch.equal(logits(again, windows), expected)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {name: x for name, x in t.items() if name != UP}, UP),
        (lambda t: t | {UP: t[UP][:, :-1]}, UP),
        (lambda t: t | {f"{UP}.more": torch.ones(1)}, f"{UP}.more"),
        (lambda t: {name.replace(UP, "other"): x for name, x in t.items()}, f"other|{UP}"),
    ],
)
@pytest.mark.parametrize("form", ["plain", "widths"])
def test_no_weight_of_an_exported_model_is_random(form, change, said, of):
    test_weights_that_are_not_of_the_record(form, change, said, of)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {name: x.to(torch.int8) for name, x in t.items()}, "is torch.int8"),
        (lambda t: {name: x.reshape(-1) for name, x in t.items()}, "the rest of the folder says"),
        (lambda t: t | {"more": torch.ones(1)}, r"have no place.*\['more'\]"),
        (lambda t: {}, "missing|numbers"),
    ],
)
@pytest.mark.parametrize("form", ["delta", "standalone"])
def test_weights_that_are_not_of_the_record(form, change, said, of):
    folder = of(form)
    (file,) = folder.glob("*.safetensors")
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)
    reseal(folder)
    with pytest.raises(ValueError, match=said):
        load(folder, device="cpu")


def peak_after(folder) -> tuple[str, float]:
    """What load raises, and by how many megabytes it raised the peak of the process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load(folder, device="cpu")
    except Exception as error:
        return type(error).__name__, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return "", 0


@pytest.mark.parametrize("form", ["delta", "standalone", "merged", "plain", "widths"])
def test_two_kilobytes_take_no_gigabytes(form, of):
    folder = of(form)
    if form in ("plain", "widths"):
        changed_config(folder, dict(intermediate_size=30_000_000, vocab_size=30_000_000))
    else:
        spec = {"family": "TwoLayerMLP", "width": 30_000_000}
        change_record(folder, lambda r: [item.update(spec) for item in r["replacements"].values()])
        changed_config(folder, dict(intermediate_size=30_000_000) if form == "standalone" else {})
    with ProcessPoolExecutor(1, mp_context=SERVER) as pool:
        kind, megabytes = pool.submit(peak_after, folder).result(timeout=120)
    assert kind == "ValueError" and megabytes < 200
