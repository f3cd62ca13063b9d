"""The linear probe: whose states it reads, that it finds what is linear in them, and GLUE's items for lm-eval."""

import random
from pathlib import Path

import lm_eval
import lm_tasks
import numpy as np
import pytest
import torch
import yaml
from lm_tasks import WORDS

from mlpreplace.evaluation import evaluate_tasks, linear_probe
from mlpreplace.evaluation.tasks import run
from mlpreplace.evaluation.tasks.probe import last_states
from mlpreplace.texts.glue import Labelled

HERE, LM_EVAL = Path(run.__file__).parent, Path(lm_eval.__file__).parent / "tasks" / "glue"


@pytest.fixture
def tokenizer():
    return lm_tasks.tokenizer()


def sentences(n: int, seed: int) -> tuple[str, ...]:
    rng = random.Random(seed)
    return tuple(" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(n))


def labelled(model, tokenizer, n: int, seed: int) -> Labelled:
    """Sentences whose label is the sign of a linear function of the states."""
    chosen = sentences(n, seed)
    states = last_states(model, tokenizer, chosen, progress=False)
    direction = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(0))
    return Labelled(chosen, tuple((states @ direction > 0).int().tolist()), {})


@pytest.mark.parametrize("batch_size", [1, 7])
def test_states_are_those_of_each_sentence_alone(batch_size, llama, tokenizer):
    chosen = sentences(12, seed=1)
    found = last_states(llama, tokenizer, chosen, batch_size=batch_size, progress=False)
    for sentence, state in zip(chosen, found, strict=True):
        ids = torch.tensor([tokenizer(sentence).input_ids])
        with torch.no_grad():
            alone = llama(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-5)


def test_what_is_linear_in_the_states_is_found(llama, tokenizer):
    train, test = (labelled(llama, tokenizer, n, seed) for n, seed in ((400, 2), (100, 3)))
    found = linear_probe(llama, tokenizer, train, test, task="made up", label="dense", progress=False)
    assert found.accuracy > 0.9 and found.n_items == 100
    larger = sum(train.labels) >= len(train.labels) / 2
    assert found.chance == sum(label == larger for label in test.labels) / 100
    assert (found.task, found.metric) == ("made up, probe", "acc")
    rng = random.Random(4)
    noise = Labelled(train.sentences, tuple(rng.randint(0, 1) for _ in train.labels), {})
    assert linear_probe(llama, tokenizer, noise, test, task="noise", label="dense", progress=False).accuracy < 0.75


def test_states_that_were_kept_are_the_same(llama, tokenizer, results):
    train, test = (labelled(llama, tokenizer, n, seed) for n, seed in ((40, 2), (20, 3)))
    options = dict(task="made up", label="dense", progress=False)
    once, kept, again = (linear_probe(llama, tokenizer, train, test, cached=c, **options) for c in (False, True, True))
    assert np.array_equal(once.correct, kept.correct) and np.array_equal(kept.correct, again.correct)
    assert len(list(results.glob("states-*"))) == 2


def test_errors(llama, tokenizer):
    few = Labelled(sentences(8, 1), (1, 1, 1, 1, 1, 0, 0, 0), {})
    with pytest.raises(ValueError, match="needs 5 training sentences of each class, got 3 of one"):
        linear_probe(llama, tokenizer, few, few, task="few", label="dense", progress=False)
    with pytest.raises(ValueError, match="has no tokens"):
        last_states(llama, tokenizer, ["w1", ""], progress=False)
    with pytest.raises(ValueError, match="64"):
        last_states(llama, tokenizer, ["w1 " * 65], progress=False)


@pytest.mark.parametrize("task", ["sst2", "cola"])
def test_a_task_of_glue_from_a_folder_is_asked_of_lm_eval(task, llama, tokenizer, tmp_path):
    """With its own prompt and options, and no network."""
    chosen = sentences(12, seed=5)
    (tmp_path / f"{task}_validation.tsv").write_text("".join(f"{s}\t{i % 2}\n" for i, s in enumerate(chosen)))
    (found,) = evaluate_tasks(llama, tokenizer, [task], label="dense", folder=tmp_path, progress=False)
    assert (found.task, found.metric, found.n_items, found.chance) == (task, "acc", 12, 0.5)
    own, ours = (yaml.safe_load(path.read_text()) for path in (LM_EVAL / task / "default.yaml", HERE / f"{task}.yaml"))
    for part in ("doc_to_text", "doc_to_choice", "doc_to_target", "output_type"):
        assert ours[part] == own[part]
