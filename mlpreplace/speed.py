"""Does it get faster, and by how much of what it could?

Two computations, as a model is served. *Prefill* reads a prompt and gives the logits of the next token only: its length
is the time to the first token, and arithmetic bounds it, so its ideal is a ratio of FLOPs. *Decode* adds a token at a time to
the cache of keys and values: every weight is read for one token, memory bounds it, and its ideal is a ratio of bytes.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from .blocks import KINDS, find_blocks
from .evaluate import RESAMPLES
from .hybrids import CausalAttention
from .models import check_windows, eval_mode, input_device
from .splice import bodies, replacements_of

ROUNDS = 5
DENSE = "dense"


def interleaved(functions: Mapping[Hashable, Callable[[], object]], rounds: int = ROUNDS) -> dict[Hashable, list[float]]:
    """Seconds of each function in every round, all in one process: machines drift, so only ratios within a round tell.

    Who goes first turns from round to round, and a first round, which warms up, is not counted.
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


# What a computation needs, whoever does it.


def flops(model: nn.Module, new: int, past: int = 0) -> float:
    """Floating-point operations of one call of a causal language model, dense or spliced, on one sequence.

    2 for every weight of a linear map that a token passes, and 4 · width for every earlier or present token that it attends
    to, over all layers with attention. The LM head counts for the last token alone where the model can leave the others out
    (``logits_to_keep``). Not counted: norms, activations, softmax, biases, the embedding, which is looked up. Attention
    is taken as causal and full: no sliding window, and nothing for the masked half, which a good kernel skips.

    Args:
        new: tokens of the call, the prompt's length for prefill and 1 for decode.
        past: tokens in the cache.
    """
    head = model.get_output_embeddings()
    of_head = 0 if head is None else head.weight.numel()
    body = sum(share * t.numel() for module, t, share in _passed(model) if module is not head and t.dim() > 1)
    seen = new * past + new * (new + 1) / 2  # pairs of a token and one that it attends to
    return 2 * body * new + 2 * of_head * (1 if _keeps_logits(model) else new) + 4 * sum(_attention_widths(model)) * seen


def bytes_read(model: nn.Module, cache_bytes: float = 0) -> float:
    """Bytes that one decode step cannot but read: every weight that a token passes, LM head included, and the cache. A weight
    that several layers share counts once: whether it is read again is the processor's cache to decide.

    Args:
        cache_bytes: of the keys and values of all sequences of the batch, see :class:`Latency`.
    """
    return sum({id(t): share * t.numel() * t.element_size() for _, t, share in _passed(model)}.values()) + cache_bytes


def _passed(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor, float]]:
    """(module, tensor, share of it that one token uses) of everything but embeddings, which are looked up; as often as a token
    passes it.
    """
    mixtures = [r for r in replacements_of(model).values() if r.n_active_params < r.n_params]
    shares = {module: r.n_active_params / r.n_params for r in mixtures for module in r.modules()}
    per_token = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    for _, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding):
            continue
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            experts = tensor.dim() == 3 and per_token  # [expert, out, in]
            yield module, tensor, per_token / tensor.shape[0] if experts else shares.get(module, 1.0)


def _attention_widths(model: nn.Module) -> list[int]:
    """Width of the queries, heads · head size, of every attention in the model: the blocks that are left, and hybrids."""
    replacements = replacements_of(model)
    left = [block for block in find_blocks(model, "attention") if block.n_params and block.name not in replacements]
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hybrids = [m.q.weight.shape[0] for m in model.modules() if isinstance(m, CausalAttention)]
    return [config.num_attention_heads * head_dim] * len(left) + hybrids


def ideal_speedup(dense: nn.Module, model: nn.Module, new: int, past: int = 0) -> float:
    """FLOPs of ``dense`` ÷ FLOPs of ``model`` for the same call: how much faster it would be if only arithmetic took time."""
    return flops(dense, new, past) / flops(model, new, past)


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def size_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, a tied tensor once: what the model takes in memory and on disk."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


def cache_bytes(cache) -> int:
    """Bytes of the keys and values in a model's cache, layer by layer: one whose attention was replaced has none."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))


# What it takes.


@dataclass(frozen=True)
class Latency:
    """How long one model took in every round, beside other models in the same rounds."""

    prefill: np.ndarray  # [rounds] seconds for a batch of prompts
    decode: np.ndarray  # [rounds] seconds per step: one token for every sequence of the batch
    cache_bytes: int  # keys and values after prefill, of the whole batch
    batch_size: int
    prompt: int  # tokens of a prompt
    context: float  # tokens in the cache while decoding, on average

    @property
    def cache_while_decoding(self) -> float:
        """Bytes of keys and values that a step reads, on average."""
        return self.cache_bytes * self.context / self.prompt


class _Session:
    """A model, what it reads, and the cache that goes on from there."""

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
    """Time prefill and greedy decoding of several models, interleaved round by round.

    Args:
        models: {label: causal language model}, the dense one among them; compressed ones as they would be served, from
            :func:`~mlpreplace.splice.splice`.
        windows: prompts, token ids [windows, seq_len]; the first ``batch_size`` are used.
        decode_tokens: steps a round. A round goes on where the one before it stopped, so the context grows.
        rounds: that count; one more warms up.

    Raises:
        ValueError: too few windows, windows or a context that a model cannot read, a model that does not generate.
    """
    if len(windows) < batch_size:
        raise ValueError(f"A batch of {batch_size} needs as many windows; there are {len(windows)}.")
    ids, steps = windows[:batch_size], decode_tokens * (rounds + 1)
    for label, model in models.items():
        _check(label, model, ids, steps)
    sessions = {label: _Session(model, ids) for label, model in models.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for model in models.values():
            stack.enter_context(eval_mode(model))
        prefill = interleaved({label: s.prefill for label, s in sessions.items()}, rounds)
        sizes = {label: cache_bytes(s.cache) for label, s in sessions.items()}
        decode = interleaved({label: partial(s.decode, decode_tokens) for label, s in sessions.items()}, rounds)
    context = ids.shape[1] + decode_tokens + (steps - decode_tokens) / 2  # of the rounds that count
    return {
        label: Latency(np.array(prefill[label]), np.array(decode[label]) / decode_tokens, sizes[label], *ids.shape, context)
        for label in models
    }


def _check(label: Hashable, model: nn.Module, ids: Tensor, steps: int) -> None:
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{label!r} is a {type(model).__name__}; speed is measured of causal language models.")
    check_windows(ids, model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and ids.shape[1] + steps > context:
        raise ValueError(
            f"A prompt of {ids.shape[1]} tokens and {steps} decoded ones are more than the context of {context} of {label!r}: "
            "shorten the windows, or take fewer rounds or decode_tokens."
        )


def speedup(seconds: np.ndarray, dense: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Median over rounds of dense ÷ model seconds, and its 95 % bootstrap interval over rounds: (value, low, high)."""
    ratios = np.asarray(dense) / np.asarray(seconds)
    draws = np.random.default_rng(seed).choice(ratios, size=(RESAMPLES, len(ratios)))
    return float(np.median(ratios)), *map(float, np.quantile(np.median(draws, axis=1), [0.025, 0.975]))


def speed_rows(
    models: Mapping[Hashable, nn.Module], latencies: Mapping[Hashable, Latency], *, dense: Hashable = DENSE, seed: int = 0
) -> list[dict]:
    """One record a model: what it takes, and how much faster than the dense model it is and could be.

    Args:
        models: as they were timed.
        latencies: what :func:`latency` made of them.
        dense: the label of the dense model.

    Returns:
        Records with method (the label), sparsity_achieved, prefill_seconds (a batch of prompts), prefill_speedup with its
        95 % interval prefill_low, prefill_high, prefill_ideal (a ratio of FLOPs), share_of_ideal (prefill_speedup ÷
        prefill_ideal), the same of decode (decode_seconds_per_token; decode_ideal is a ratio of bytes read), parameter_mb,
        kv_cache_fraction (of the dense model's), cache_mb, batch_size, prompt and context (tokens). MB are 10⁶ bytes.

    Raises:
        ValueError: no ``dense`` among the models.
    """
    if dense not in models:
        raise ValueError(f"No model {dense!r} among {', '.join(map(repr, models))}: name the dense one with dense=.")
    base, weights = latencies[dense], _block_weights(models[dense])
    rows = []
    for label, model in models.items():
        own = latencies[label]
        prefill, decode = speedup(own.prefill, base.prefill, seed=seed), speedup(own.decode, base.decode, seed=seed)
        ideal = ideal_speedup(models[dense], model, own.prompt)
        rows.append(
            {
                "method": label,
                "sparsity_achieved": 1 - _block_weights(model) / weights,
                "prefill_seconds": float(np.median(own.prefill)),
                **dict(zip(("prefill_speedup", "prefill_low", "prefill_high"), prefill, strict=True)),
                "prefill_ideal": ideal,
                "share_of_ideal": prefill[0] / ideal,
                "decode_seconds_per_token": float(np.median(own.decode)),
                **dict(zip(("decode_speedup", "decode_low", "decode_high"), decode, strict=True)),
                "decode_ideal": bytes_read(models[dense], base.cache_while_decoding)
                / bytes_read(model, own.cache_while_decoding),
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
