"""KL of choices that go through the model side by side is that of their plans in place."""

import pytest
import torch
from tiny_models import build, random_windows

from mlpreplace import LowRank, Mean, NarrowMLP, capture, compare, find_blocks, fit
from mlpreplace.planning import choice_kl
from mlpreplace.planning.choice_kl import choice_kls

WINDOWS = random_windows(5, seed=7)


def case(name: str):
    model = build(name)
    mlps, attentions = find_blocks(model), find_blocks(model, "attention")
    stats = capture(model, mlps + attentions, random_windows(40), progress=False)
    fitted = fit(mlps[2], stats, NarrowMLP(12))
    choices = {
        "one": {mlps[0]: NarrowMLP(24), mlps[2]: fitted},
        "other": {mlps[0]: NarrowMLP(24), attentions[1]: Mean()},
        "last": {attentions[2]: LowRank(4), mlps[2]: NarrowMLP(24)},
        "none": {},
    }
    return model, stats, choices


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "gemma2"])
def test_it_is_that_of_the_plans(name):
    model, stats, choices = case(name)
    plans = {
        label: {b: fit(b, stats, c, samples=()) if isinstance(c, (NarrowMLP, LowRank, Mean)) else c for b, c in choice.items()}
        for label, choice in choices.items()
    }
    found = choice_kls(model, choices, WINDOWS, stats, batch_size=2, progress=False)
    measured = compare(model, plans, WINDOWS, batch_size=2, progress=False)
    assert found == pytest.approx({label: m.mean_kl for label, m in measured.items()}, rel=1e-4, abs=1e-7)
    assert found["none"] == pytest.approx(0, abs=1e-6)


def test_what_choices_share_is_fitted_and_run_once(monkeypatch):
    model, stats, choices = case("llama")
    fitted, runs = [], []
    own = choice_kl.fitted_to
    monkeypatch.setattr(choice_kl, "fitted_to", lambda stats, chosen, **how: fitted.extend(chosen) or own(stats, chosen, **how))
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    for norm in norms:
        norm.register_forward_hook(lambda *_: runs.append(1))
    choice_kls(model, choices, WINDOWS, stats, batch_size=5, progress=False)
    # NarrowMLP(24) of the first block once; one layer of two pasts, then of two, then of four
    assert len(fitted) == len(set(fitted)) == 5
    assert len(runs) == 2 + 3 + 4


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_without_room_it_starts_again_with_half_the_windows():
    model, stats, choices = case("llama")
    expected = choice_kls(model, choices, WINDOWS, stats, batch_size=2, progress=False)

    def full(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError

    model.model.layers[1].mlp.register_forward_pre_hook(full)
    assert choice_kls(model, choices, WINDOWS, stats, batch_size=4, progress=False) == pytest.approx(expected, rel=1e-5)


def test_families_need_statistics():
    model, stats, choices = case("llama")
    with pytest.raises(ValueError, match=r"Not in the statistics: model\.layers\.0\.mlp"):
        choice_kls(model, choices, WINDOWS, progress=False)
