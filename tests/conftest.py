"""Tiny random models, windows and statistics for every test; the real model for those marked ``bundled``."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers as t
from tiny_models import VOCABULARY, build, random_windows
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit

from mlpreplace import capture, find_blocks, fit, load_model
from mlpreplace.fitting.errors import sample_errors
from mlpreplace.models.architectures import ARCHITECTURES
from mlpreplace.models.forward import eval_mode
from mlpreplace.runtime import cache, cache_dir
from mlpreplace.statistics.moments import MOMENTS, BlockStatistics, Sample
from mlpreplace.texts import assets


def pytest_collection_modifyitems(items) -> None:
    """The longest tests come first, so that no worker is left with one of them at the end; the order stays otherwise."""
    items.sort(key=lambda item: "notebooks" not in item.keywords)


def activations(model, block, windows: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Reference: float64 inputs x, neurons h and outputs y of a block, [tokens, width], stored whole."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name, value):
        seen[name] = value.detach().double().reshape(*windows.shape, -1)[... if mask is None else mask]

    def first(name):
        return lambda module, args, kwargs: keep(name, args[0] if args else kwargs["hidden_states"])

    with eval_mode(model), ExitStack() as stack, torch.no_grad():
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


BYTES = 257  # tokens of byte_tokenizer


def byte_tokenizer() -> t.PreTrainedTokenizerFast:
    """One token a byte of UTF-8, so that any text can be read, and token 0 for its end."""
    vocabulary = {piece: i for i, piece in enumerate(["<end>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_locally(model, folder, tokenizer=None) -> str:
    """A folder that load_model can read; the tokenizer knows w0, w1 … unless another is given."""
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer(f"w{i}" for i in range(VOCABULARY - 1))).save_pretrained(folder)
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
def registry():
    """The registered architectures, for a test to write into."""
    before = dict(ARCHITECTURES)
    yield ARCHITECTURES
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


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
    """An empty cache of this test's own, beside the assets that are there; returns the folder of its results."""
    own = tmp_path / "cache"
    own.mkdir()
    (own / "assets").symlink_to(cache_dir().resolve() / "assets")
    monkeypatch.setenv("MLPREPLACE_CACHE", str(own))
    return own / "results"


@pytest.fixture
def fresh_assets():
    """Nothing remembered about assets or code, before and after a test that moves them."""
    memories = assets.asset, assets.listed_assets, cache.code_hash
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


@pytest.fixture(scope="module")  # no longer: its event loop runs as long as it does
def browser():
    """A headless chromium or chrome: the system's, or the one that `playwright install chromium` brings."""
    from playwright.sync_api import sync_playwright  # which few tests need

    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")))
    with sync_playwright() as playwright:
        path = next(found, playwright.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("no chromium or chrome on the PATH: install the system's, or python -m playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def train_error(block, stats, family, **options) -> float:
    """Pooled error over all sampled tokens, with next to no ridge."""
    small = fit(block, stats, family, **{"ridge": 1e-6, "samples": ()} | options)
    return sample_errors(small, stats[block].train).pooled
