"""Latency of compressed models, and the speed-up that their sizes allow.

A served model does two computations. *Prefill* reads a prompt and gives the logits of the next token. It is bound by arithmetic,
so its ideal speed-up is a ratio of FLOPs. *Decode* adds one token at a time to the KV cache. It reads every weight for a single
token and is bound by memory, so its ideal speed-up is a ratio of bytes.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from ..models.blocks import KINDS, find_blocks
from ..models.forward import eval_mode
from ..models.inputs import check_batch_size, check_windows, input_device
from ..replacements.hybrids import CausalAttention
from ..replacements.narrow_attention import HeadAttention
from ..replacements.splice import bodies, replacements_of
from .perplexity import bootstrap

ROUNDS = 5
DENSE = "dense"


def interleaved(functions: Mapping[Hashable, Callable[[], object]], rounds: int = ROUNDS) -> dict[Hashable, list[float]]:
    """Seconds of each function in every round, {name: [rounds]}.

    All run in one process in turn, since the speed of a machine drifts: only ratios within a round are meaningful. Another
    function starts each round. A first round warms up and is not counted.
    """
    seconds: dict[Hashable, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            functions[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def flops(model: nn.Module, tokens: int) -> float:
    """Floating-point operations of the prefill of one prompt by a causal language model, dense or spliced.

    2 for every weight of a linear map that a token passes, and 4 · width for every pair of a token and one that it attends to.
    The LM head counts for the last token alone where the model can skip the others (``logits_to_keep``). Norms, activations,
    softmax, biases and embedding lookups are not counted. Attention counts as causal and full: no sliding window, and nothing
    for the masked half.
    """
    head = model.get_output_embeddings()
    of_head = 0 if head is None else head.weight.numel()
    body = sum(share * t.numel() for module, t, share in _weights_read(model) if module is not head and t.dim() > 1)
    attended = tokens * (tokens + 1) / 2
    return (
        2 * body * tokens + 2 * of_head * (1 if _keeps_logits(model) else tokens) + 4 * sum(_attention_widths(model)) * attended
    )


def bytes_read(model: nn.Module, cache_bytes: float = 0) -> float:
    """Bytes that one decode step has to read: the KV cache, and every weight that a token passes, LM head included.

    A weight that several layers share counts once, although a processor with a small cache reads it again.

    Args:
        cache_bytes: keys and values of all sequences of the batch, see :class:`Latency`.
    """
    return sum({id(t): share * t.numel() * t.element_size() for _, t, share in _weights_read(model)}.values()) + cache_bytes


def _weights_read(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor, float]]:
    """(module, tensor, share of it that one token uses), once for each time that a token passes it. Embeddings are left out."""
    mixtures = [r for r in replacements_of(model).values() if r.n_active_params < r.n_params]
    shares = {module: r.n_active_params / r.n_params for r in mixtures for module in r.modules()}
    per_token = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    for _, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding):
            continue
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            experts = tensor.dim() == 3 and per_token  # [expert, out, in]
            yield module, tensor, per_token / tensor.shape[0] if experts else shares.get(module, 1.0)


def _attention_widths(model: nn.Module) -> list[float]:
    """heads · head size of every attention in the model: the blocks that are left, and attention inside of replacements.

    Where values are narrower than keys, the mean of both.
    """
    replacements = replacements_of(model)
    left = [block for block in find_blocks(model, "attention") if block.n_params and block.name not in replacements]
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inside = [m.q.weight.shape[0] for m in model.modules() if isinstance(m, CausalAttention)]
    inside += [len(m.group_of) * (m.key_dim + m.value_dim) / 2 for m in model.modules() if isinstance(m, HeadAttention)]
    return [config.num_attention_heads * head_dim] * len(left) + inside


def ideal_speedup(dense: nn.Module, model: nn.Module, tokens: int) -> float:
    """FLOPs of ``dense`` ÷ FLOPs of ``model`` for a prompt of ``tokens``: the speed-up if only arithmetic took time."""
    return flops(dense, tokens) / flops(model, tokens)


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def size_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, tied tensors once: the size of the model in memory and on disk."""
    return sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values())


def cache_bytes(cache) -> int:
    """Bytes of the keys and values in a model's cache. A layer whose attention was replaced has none."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))


@dataclass(frozen=True)
class Latency:
    """Times of one model in every round. Models that are compared were timed in the same rounds."""

    prefill: np.ndarray  # [rounds] seconds for a batch of prompts
    decode: np.ndarray  # [rounds] seconds per step, which is one token for every sequence of the batch
    cache_bytes: int  # keys and values after prefill, of the whole batch
    batch_size: int
    prompt: int  # tokens of a prompt
    context: float  # mean tokens in the cache while decoding

    @property
    def cache_while_decoding(self) -> float:
        """Mean bytes of keys and values that a step reads."""
        return self.cache_bytes * self.context / self.prompt


class _Session:
    """A model, its prompts, and its KV cache."""

    def __init__(self, model: nn.Module, ids: Tensor):
        self.model, self.ids = model, ids.to(input_device(model))
        self.options = {"use_cache": True, **({"logits_to_keep": 1} if _keeps_logits(model) else {})}

    def prefill(self) -> None:
        self.cache = None
        self._step(self.ids)
        self.token.cpu()  # waits for an accelerator

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._step(self.token)
        self.token.cpu()

    def _step(self, ids: Tensor) -> None:
        output = self.model(ids, past_key_values=self.cache, **self.options)
        self.cache, self.token = output.past_key_values, output.logits[:, -1:].argmax(-1)  # [batch, 1]


def latency(
    models: Mapping[Hashable, nn.Module],
    windows: Tensor,
    *,
    decode_tokens: int = 16,
    batch_size: int = 1,
    rounds: int = ROUNDS,
) -> dict[Hashable, Latency]:
    """Time prefill and greedy decoding of several models in interleaved rounds.

    Args:
        models: {label: causal language model}, the dense one among them. Compressed ones come from
            :func:`~mlpreplace.replacements.splice`, as they would be served.
        windows: prompts, token ids [windows, seq_len]; the first ``batch_size`` are used.
        decode_tokens: decode steps in a round. Each round continues the one before, so the context grows.
        rounds: rounds that count; one more warms up.

    Raises:
        ValueError: too few windows, windows or a context that a model cannot read, a model that does not generate, fewer than
            one round or decoded token.
    """
    if rounds < 1 or decode_tokens < 1:
        raise ValueError(f"Expected rounds ≥ 1 and decode_tokens ≥ 1, got {rounds} and {decode_tokens}.")
    check_batch_size(batch_size)
    for model in models.values():
        check_windows(windows, model)
    if len(windows) < batch_size:
        raise ValueError(f"A batch of {batch_size} needs as many windows; there are {len(windows)}.")
    ids, steps = windows[:batch_size], decode_tokens * (rounds + 1)
    for label, model in models.items():
        _check(label, model, ids, steps)
    sessions = {label: _Session(model, ids) for label, model in models.items()}
    with torch.inference_mode(), _all_in_eval_mode(models.values()):
        prefill = interleaved({label: s.prefill for label, s in sessions.items()}, rounds)
        sizes = {label: cache_bytes(s.cache) for label, s in sessions.items()}
        decode = interleaved({label: partial(s.decode, decode_tokens) for label, s in sessions.items()}, rounds)
    context = ids.shape[1] + decode_tokens + (steps - decode_tokens) / 2  # mean over the rounds that count
    return {
        label: Latency(np.array(prefill[label]), np.array(decode[label]) / decode_tokens, sizes[label], *ids.shape, context)
        for label in models
    }


@contextmanager
def _all_in_eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in sorted(models, key=id):  # in one order, so that no two threads wait for each other
            stack.enter_context(eval_mode(model, as_it_is=True))
        yield


def _check(label: Hashable, model: nn.Module, ids: Tensor, steps: int) -> None:
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{label!r} is a {type(model).__name__}; speed is measured of causal language models.")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and ids.shape[1] + steps > context:
        raise ValueError(
            f"A prompt of {ids.shape[1]} tokens and {steps} decoded ones are more than the context of {context} of {label!r}: "
            "shorten the windows, or take fewer rounds or decode_tokens."
        )


def speedup(seconds: np.ndarray, dense: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Median over rounds of dense ÷ model seconds with its 95 % bootstrap interval over rounds, (value, low, high)."""
    ratios = np.asarray(dense) / np.asarray(seconds)
    return float(np.median(ratios)), *bootstrap(lambda i: np.median(ratios[i], axis=1), len(ratios), seed)


def speed_rows(models: Mapping[Hashable, nn.Module], latencies: Mapping[Hashable, Latency], *, seed: int = 0) -> list[dict]:
    """One record a model: its size, its speed-up over the dense model, and the ideal speed-up.

    Args:
        models: the models that were timed, by label; the dense one is called "dense".
        latencies: what :func:`latency` returned for them.

    Returns:
        Records with method (the label), sparsity_achieved, prefill_seconds (of a batch of prompts), prefill_speedup with its
        95 % interval prefill_low, prefill_high, prefill_ideal (a ratio of FLOPs), share_of_ideal (prefill_speedup ÷
        prefill_ideal), the same of decode (decode_seconds_per_token; decode_ideal is a ratio of bytes read), parameter_mb,
        kv_cache_fraction (of the dense model's), cache_mb, batch_size, prompt and context (tokens). MB are 10⁶ bytes.

    Raises:
        ValueError: no dense model among the models.
    """
    if DENSE not in models:
        raise ValueError(f"No model {DENSE!r} among {', '.join(map(repr, models))}: give the dense one this label.")
    with _all_in_eval_mode(models.values()):
        return _speed_rows(models, latencies, seed)


def _speed_rows(models: Mapping[Hashable, nn.Module], latencies: Mapping[Hashable, Latency], seed: int) -> list[dict]:
    dense, base = models[DENSE], latencies[DENSE]
    rows = []
    for label, model in models.items():
        own = latencies[label]
        prefill, decode = speedup(own.prefill, base.prefill, seed=seed), speedup(own.decode, base.decode, seed=seed)
        ideal = ideal_speedup(dense, model, own.prompt)
        rows.append(
            {
                "method": label,
                "sparsity_achieved": 1 - _block_weights(model) / _block_weights(dense),
                "prefill_seconds": float(np.median(own.prefill)),
                **dict(zip(("prefill_speedup", "prefill_low", "prefill_high"), prefill, strict=True)),
                "prefill_ideal": ideal,
                "share_of_ideal": prefill[0] / ideal,
                "decode_seconds_per_token": float(np.median(own.decode)),
                **dict(zip(("decode_speedup", "decode_low", "decode_high"), decode, strict=True)),
                "decode_ideal": bytes_read(dense, base.cache_while_decoding) / bytes_read(model, own.cache_while_decoding),
                "parameter_mb": size_bytes(model) / 1e6,
                "kv_cache_fraction": own.cache_bytes / base.cache_bytes,
                "cache_mb": own.cache_bytes / 1e6,
                "batch_size": own.batch_size,
                "prompt": own.prompt,
                "context": own.context,
            }
        )
    return rows


def _block_weights(model: nn.Module) -> int:
    """Parameters of all attention and MLP blocks, or of what stands in their place."""
    replacements = replacements_of(model)
    blocks = {block.name: block for kind in KINDS for block in find_blocks(model, kind)}
    plan = {block: replacements[name] for name, block in blocks.items() if name in replacements}
    left = sum(block.n_params for block in blocks.values() if block not in plan)
    return left + sum(p.numel() for p in bodies(plan).parameters())
