"""Tiny random models, windows and statistics for every test; the real model for those marked ``bundled``."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mlpreplace import BlockStatistics, Sample, assets, cache, capture, find_blocks, load_model
from mlpreplace.capture import MOMENTS

t.logging.set_verbosity_error()

HIDDEN, INTERMEDIATE, VOCABULARY, CONTEXT = 32, 48, 101, 64
SIZES = dict(
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=CONTEXT,
)
GROUPED = SIZES | dict(num_key_value_heads=2)
HEADS = GROUPED | dict(head_dim=8)
TOKENS = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=2)

MODELS = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig(**SIZES)),
    "mistral": (t.MistralForCausalLM, t.MistralConfig(**GROUPED)),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**GROUPED)),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**HEADS)),
    "gemma": (t.GemmaForCausalLM, t.GemmaConfig(**HEADS)),
    "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config(**HEADS)),
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=CONTEXT, **TOKENS)),
    "gpt_neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**SIZES)),
    "falcon": (
        t.FalconForCausalLM,
        t.FalconConfig(hidden_size=32, ffn_hidden_size=48, num_hidden_layers=3, num_attention_heads=4, **TOKENS),
    ),
    "phi": (t.PhiForCausalLM, t.PhiConfig(**SIZES)),
    "opt": (
        t.OPTForCausalLM,
        t.OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            vocab_size=VOCABULARY,
        ),
    ),
    "mixtral": (t.MixtralForCausalLM, t.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "bert": (t.BertForMaskedLM, t.BertConfig(**SIZES)),
    "t5": (
        t.T5ForConditionalGeneration,
        t.T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=VOCABULARY),
    ),
    "marian": (
        t.MarianMTModel,
        t.MarianConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=CONTEXT,
            vocab_size=VOCABULARY,
            **SPECIAL,
        ),
    ),
    "vit": (
        t.ViTForImageClassification,
        t.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
        ),
    ),
}
CAUSAL = [name for name in MODELS if name not in ("bert", "t5", "marian", "vit")]
READS_TOKENS = [*CAUSAL, "bert"]  # one stack of layers, one sequence of tokens in


def build(name: str, seed: int = 0, **changes):
    """A random model in eval mode. Weights keep activations at unit scale, so that every block matters; no bias is zero."""
    model_class, config = MODELS[name]
    config = type(config)(**config.to_dict() | changes)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in type(module).__name__.lower():
                parameter.data += 0.2 * noise
            elif isinstance(module, torch.nn.Embedding):
                parameter.data = 0.5 * noise
            elif parameter.dim() == 1:
                parameter.data = 0.3 * noise
            else:
                parameter.data = 1.5 * noise / parameter.shape[-1] ** 0.5
    return model


def random_windows(n: int = 8, seq_len: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (n, seq_len), generator=torch.Generator().manual_seed(seed))


def activations(model, block, windows: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Reference: float64 inputs x, neurons h and outputs y of a block, [tokens, width], stored whole."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name, value):
        seen[name] = value.detach().double().reshape(*windows.shape, -1)[... if mask is None else mask]

    def first(name):
        return lambda module, args, kwargs: keep(name, args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack, torch.no_grad():
        hooks = [
            block.modules[0].register_forward_pre_hook(first("x"), with_kwargs=True),
            block.modules[-1].register_forward_hook(lambda module, args, output: keep("y", output)),
        ]
        if block.has_neurons:
            hooks.append(block.down.register_forward_pre_hook(first("h"), with_kwargs=True))
        for hook in hooks:
            stack.callback(hook.remove)
        model(windows, attention_mask=None if mask is None else mask.long())
    return {name: value.reshape(-1, value.shape[-1]) for name, value in seen.items()}


def noise(*shape, seed: int = 0) -> torch.Tensor:
    """Gaussian, in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample_of(x: torch.Tensor, y: torch.Tensor) -> Sample:
    """[tokens, hidden] pairs as a sample of one window, residual energy 1."""
    ones = torch.ones(1, len(x))
    return Sample(x.float()[None], y.float()[None], ones, ones.bool())


def statistics_of(x: torch.Tensor, y: torch.Tensor, h: torch.Tensor | None = None) -> BlockStatistics:
    """Statistics of float64 pairs [tokens, width]; the last quarter of the tokens is held out."""
    n = max(1, len(x) * 3 // 4)
    validation = sample_of(x[n:], y[n:]) if n < len(x) else None
    x, y = x[:n], y[:n]
    s = BlockStatistics(n, x.sum(0), y.sum(0), xx=x.T @ x, xy=x.T @ y, train=sample_of(x, y), validation=validation)
    if h is not None:
        s.sum_h, s.hh = h[:n].sum(0), h[:n].T @ h[:n]
    return s


def joint_statistics(block, x: torch.Tensor, h: torch.Tensor) -> BlockStatistics:
    """Statistics of a block whose neurons gave ``h``, [tokens, intermediate], on ``x``."""
    own = block.weights()
    y = h @ own.down.double().T + (0 if own.down_bias is None else own.down_bias.double())
    s = statistics_of(x, y, h)
    s.hx = h[: s.tokens].T @ x[: s.tokens]
    return s


def capture_quietly(model, windows: torch.Tensor, kind: str = "mlp", **options):
    """(blocks, statistics) of a model."""
    blocks = find_blocks(model, kind)
    return blocks, capture(model, blocks, windows, **{"validation_windows": 2, "sample_windows": 2, "progress": False} | options)


def captured_whole(model, windows: torch.Tensor, **options):
    """(blocks, statistics) with every moment and all fitting windows as the sample."""
    return capture_quietly(model, windows, **{"moments": MOMENTS, "sample_windows": None} | options)


def word_tokenizer(words) -> t.PreTrainedTokenizerFast:
    """One token a word, split at white space; every other word is token 0."""
    vocabulary = {"[UNK]": 0} | {word: i for i, word in enumerate(words, 1)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def save_locally(model, folder) -> str:
    """A folder that load_model can read."""
    model.save_pretrained(folder)
    word_tokenizer(f"w{i}" for i in range(VOCABULARY - 1)).save_pretrained(folder)
    return str(folder)


def notebook_text(*sources: str, outputs: int = 0, tags: dict[int, list[str]] | None = None) -> str:
    """A notebook of code cells as ipynb text; ``tags`` by position."""
    cells = [
        {
            "cell_type": "code",
            "source": source.splitlines(keepends=True),
            "metadata": {"tags": (tags or {}).get(i, [])},
            "outputs": [{"output_type": "stream", "name": "stdout", "text": ["1"]}] * outputs,
            "execution_count": outputs,
        }
        for i, source in enumerate(sources)
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def fail_after(calls: int, function, error: Exception):
    """``function`` that raises ``error`` from call number ``calls`` + 1 on."""
    count = 0

    def failing(*args, **kwargs):
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return function(*args, **kwargs)

    return failing


@pytest.fixture(autouse=True)
def one_thread(request):
    """Tiny matrices are slower on two threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    if not {"bundled", "notebooks"} & {marker.name for marker in request.node.iter_markers()}:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def gpt2():
    return build("gpt2")


@pytest.fixture
def windows():
    return random_windows()


@pytest.fixture
def captured(llama, windows):
    """(model, blocks, statistics) of the tiny Llama."""
    return llama, *capture_quietly(llama, windows)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty cache of this test's own; returns the folder of its results."""
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "results"


@pytest.fixture
def fresh_assets():
    """Nothing remembered about assets or code, before and after a test that moves them."""
    memories = assets.asset, assets.asset_hashes, cache.code_hash
    for memory in memories:
        memory.cache_clear()
    yield
    for memory in memories:
        memory.cache_clear()


@pytest.fixture(scope="session")
def bundled():
    """The real bundled model and its tokenizer, on the CPU."""
    try:
        return load_model("bundled/smollm2-135m", device="cpu")
    except FileNotFoundError as error:
        if "make setup" not in str(error):
            raise
        pytest.skip(str(error))
