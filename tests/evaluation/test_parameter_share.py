"""Published configurations: their totals, their parts and what they spend per token."""

import pandas as pd
import pytest

from mlpreplace.evaluation.parameter_share import model_shares, parameter_shares, published_configs
from mlpreplace.models.parameters import count_parameters

PUBLISHED = {published.name: published for published in published_configs()}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return parameter_shares(context=512).set_index("model")


def flops(name: str, context: int) -> dict:
    return model_shares(PUBLISHED[name].build(), name, context)


def test_enough_architectures_under_unique_names(rows):
    assert len(rows) >= 18 and rows.index.is_unique
    assert rows["model_type"].nunique() >= 12
    assert set(rows["kind"]) == {"decoder", "encoder", "encoder-decoder", "vision"}
    assert not rows["measured"].any()


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_is_what_was_published(rows, name):
    assert rows.loc[name, "total"] == pytest.approx(PUBLISHED[name].published_params, rel=0.02)
    assert rows.loc[name, "model_type"] == PUBLISHED[name].model_type


def test_parts_sum_to_the_total(rows):
    parts = rows[["mlp", "attention", "embedding", "head", "other"]]
    assert (parts >= 0).all(axis=None)
    assert (parts.sum(axis=1) == rows["total"]).all()
    assert (rows["other"] < 0.02 * rows["total"]).all()  # nothing big was overlooked


def test_flops_sum_to_the_flops_per_token(rows):
    parts = rows[["mlp_flops", "attention_flops", "head_flops"]]
    assert (parts.sum(axis=1) == rows["flops_per_token"]).all()
    assert rows["mlp_share_of_flops"].between(0, 1, inclusive="neither").all()


def test_llama_2_has_the_share_of_the_closed_formula(rows):
    d, m = (PUBLISHED["Llama-2-7B"].config[key] for key in ("hidden_size", "intermediate_size"))
    assert rows.loc["Llama-2-7B", "mlp_share_of_blocks"] == pytest.approx(3 * d * m / (3 * d * m + 4 * d * d), abs=1e-12)


def test_llama_3_has_the_share_of_the_closed_formula_with_grouped_queries(rows):
    config = PUBLISHED["Llama-3-8B"].config
    d, m = config["hidden_size"], config["intermediate_size"]
    kv = d * config["num_key_value_heads"] // config["num_attention_heads"]
    expected = 3 * d * m / (3 * d * m + 2 * d * d + 2 * d * kv)
    assert rows.loc["Llama-3-8B", "mlp_share_of_blocks"] == pytest.approx(expected, abs=1e-12)


def test_a_mixture_uses_two_of_its_eight_experts(rows):
    mixtral, config = rows.loc["Mixtral-8x7B"], PUBLISHED["Mixtral-8x7B"].config
    router = config["num_hidden_layers"] * config["hidden_size"] * config["num_local_experts"]
    assert mixtral["mlp_active"] - router == (mixtral["mlp"] - router) // 4
    dense = rows.drop(index="Mixtral-8x7B")
    assert (dense["mlp_active"] == dense["mlp"]).all()


def test_tied_heads_cost_no_parameters_but_flops(rows):
    gpt2, config = rows.loc["GPT-2"], PUBLISHED["GPT-2"].config
    assert gpt2["head"] == 0
    assert gpt2["head_flops"] == 2 * config["vocab_size"] * config["n_embd"]
    assert rows.loc["BERT-base", "head_flops"] == 0  # an encoder without a language model head


def test_causal_attention_spends_the_closed_formula():
    row, config, context = flops("Llama-2-7B", 1000), PUBLISHED["Llama-2-7B"].config, 1000
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    assert row["attention_flops"] == layers * (2 * 4 * d * d + 4 * d * (context + 1) / 2)


def test_attention_without_a_mask_sees_the_whole_context():
    row, config = flops("BERT-base", 100), PUBLISHED["BERT-base"].config
    expected = 2 * row["attention"] + config["num_hidden_layers"] * 4 * config["hidden_size"] * 100
    assert row["attention_flops"] == expected


def test_translators_attend_three_times_and_only_the_decoder_is_masked():
    row, config, context = flops("T5-base", 100), PUBLISHED["T5-base"].config, 100
    width = config["num_heads"] * config["d_kv"]
    keys = context + (context + 1) / 2 + context  # encoder, decoder, decoder over the source
    assert row["attention_flops"] == pytest.approx(2 * row["attention"] + config["num_layers"] * 4 * width * keys)


def test_a_sliding_window_bounds_the_keys():
    config, context = PUBLISHED["Mistral-7B"].config, 10_000
    window = config["sliding_window"]
    keys = sum(min(i, window) for i in range(1, context + 1)) / context
    row = flops("Mistral-7B", context)
    spent = row["attention_flops"] - 2 * row["attention"]
    assert spent == pytest.approx(config["num_hidden_layers"] * 4 * config["hidden_size"] * keys)


def test_alternating_windows_count_their_layers_only():
    row, config, context = flops("Gemma-2-9B", 8192), PUBLISHED["Gemma-2-9B"].config, 8192
    windowed = sum(min(i, config["sliding_window"]) for i in range(1, context + 1)) / context
    width, half = config["num_attention_heads"] * config["head_dim"], config["num_hidden_layers"] / 2
    spent = row["attention_flops"] - 2 * row["attention"]
    assert spent == pytest.approx(4 * width * half * (windowed + (context + 1) / 2))


@pytest.mark.parametrize("name", ["GPT-2", "Llama-3-8B", "Mixtral-8x7B", "T5-base"])
def test_mlp_share_of_flops_falls_with_context(name):
    shares = [flops(name, context)["mlp_share_of_flops"] for context in (1, 64, 512, 1024)]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == len(shares)


def test_context_stops_at_the_longest_input():
    assert flops("GPT-2", 100_000)["context"] == PUBLISHED["GPT-2"].config["n_positions"]
    assert flops("ViT-B/16", 100_000)["context"] == 14 * 14 + 1  # patches and the class token
    assert flops("T5-base", 100_000)["context"] == 100_000  # relative positions have no end


def test_a_context_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        flops("GPT-2", 0)


@pytest.mark.bundled
def test_the_bundled_model_has_the_row_of_its_configuration(rows):
    from mlpreplace import load_model

    model, _ = load_model("bundled/smollm2-135m", device="cpu")
    measured, expected = model_shares(model, "SmolLM2-135M", 512), rows.loc["SmolLM2-135M"]
    assert measured["measured"]
    same = ["total", "mlp", "attention", "embedding", "head", "other", "flops_per_token", "mlp_share_of_flops"]
    assert {key: measured[key] for key in same} == {key: expected[key] for key in same}
    assert measured["total"] == count_parameters(model)["total"]
