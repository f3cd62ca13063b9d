"""What one run of `python -m mlpreplace compress` holds and takes, in parts, worked out from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from model_size import Size
from rates import BF16, FP32, FP64, LINK, eigen_seconds, fit_seconds

from mlpreplace.evaluation.sweep import SCORED_AT_ONCE_GPU
from mlpreplace.models.attention import attention_weights, key_units
from mlpreplace.models.blocks import Block
from mlpreplace.planning.candidates import WIDTH_STEPS, candidate_families
from mlpreplace.replacements import LowRank, NarrowAttention, NarrowPlusLinear
from mlpreplace.runtime.memory import MOST_WINDOWS, WINDOWS
from mlpreplace.statistics.gradients import WINDOWS as BACKWARD_WINDOWS
from mlpreplace.statistics.groups import grouped
from mlpreplace.statistics.moments import FIT_COPIES, _bytes, _window_bytes

RESERVE = 2e9  # bytes of a GPU: the CUDA context, workspaces of libraries, gaps between tensors
MOMENTS = ("input", "hidden", "cross")


@dataclass(frozen=True)
class Compression:
    """`compress` with --windows 128 --validation-windows 16 --seq-len 2048 --sparsity 0.25, method "recipe".

    Over several GPUs the weights and the plan are spread evenly. They work one after another, so time does not divide.
    """

    of: Size
    gpus: int = 1
    gpu: float = 80e9  # bytes of each
    host: float = 256e9  # bytes that are free
    windows: int = 128
    validation: int = 16
    seq_len: int = 2048
    sparsity: float = 0.25
    given: int | None = None  # --memory-budget, bytes

    @cached_property
    def weights(self) -> float:
        """Bytes on each GPU."""
        return self.of.parameters * self.of.itemsize / self.gpus

    @cached_property
    def plan(self) -> float:
        """Bytes of replacements for every MLP and no attention; where others are chosen it is about as many."""
        mlps, attention = self.of.of_kind("mlp"), self.of.of_kind("attention")
        return (mlps - self.sparsity * (mlps + attention)) * self.of.itemsize

    def states(self, windows: int) -> int:
        """Bytes of the hidden states that enter a layer."""
        return windows * self.seq_len * self.of.mlp.hidden_size * self.of.itemsize

    @cached_property
    def walking(self) -> int:
        """Bytes of the calibration text's hidden states between two groups of statistics."""
        return self.states(self.windows) if len(self.groups) > 1 else 0

    @cached_property
    def free(self) -> float:
        """Bytes of a GPU beside its weights."""
        return self.gpu - RESERVE - self.weights

    @cached_property
    def budget(self) -> int:
        """Bytes, as :func:`~mlpreplace.runtime.memory.memory_budget` has them."""
        return self.given or int(min(self.free, self.host) // 2)

    @cached_property
    def statistics(self) -> dict[Block, int]:
        """Bytes of each block's moments."""
        return {block: _bytes(block, MOMENTS, 0) for block in self.of.blocks}

    @cached_property
    def groups(self) -> list[list[Block]]:
        return grouped(self.of.blocks, self.statistics, self.budget - FIT_COPIES * max(self.statistics.values()))

    @cached_property
    def group(self) -> int:
        """Bytes of the largest group of statistics, at worst on one GPU."""
        return max(sum(map(self.statistics.get, group)) for group in self.groups)

    @cached_property
    def sensitivities(self) -> dict[Block, int]:
        """Bytes on disk of each block's inputs, outputs, gradients and outputs of heads on the validation text."""
        return {block: self.validation * self.seq_len * bytes_of_token(block) for block in self.of.blocks}

    @cached_property
    def felt(self) -> int:
        """Bytes of what the loss feels of every candidate on the validation text."""
        return 4 * sum(map(len, candidate_families(self.of.blocks).values())) * self.validation * self.seq_len

    @cached_property
    def capturing(self) -> int:
        """A batch in the widest place of an MLP with its product in float32; or the check that a moment is finite."""
        whole = {"input_ids": torch.empty(1, self.seq_len, device="meta")}
        windows = max(1, min(MOST_WINDOWS, int(self.free // (2 * _window_bytes(self.of.blocks, whole)))))
        d, m = self.of.mlp.hidden_size, self.of.mlp.intermediate_size
        return max(windows * self.seq_len * (6 * m + 16 * d) + 4 * m**2, 10 * m**2)

    @cached_property
    def backward(self) -> int:
        """Inputs of all layers, the inside of one, logits in the model's precision and three times in float32."""
        d, m, s = self.of.mlp.hidden_size, self.of.mlp.intermediate_size, self.of.itemsize
        inputs = -(-self.of.layers // self.gpus) * d * s
        return BACKWARD_WINDOWS * self.seq_len * (inputs + 14 * m + 40 * d + self.of.vocabulary * (s + 12))

    @cached_property
    def pricing(self) -> int:
        """Neurons of all validation tokens three times in float32, beside the factor of their moment; or a fit."""
        d, m, tokens = self.of.mlp.hidden_size, self.of.mlp.intermediate_size, self.validation * self.seq_len
        return 10 * tokens * d + max(8 * m**2 + 12 * tokens * m + 4 * m * d, self.fitting)

    @cached_property
    def fitting(self) -> int:
        """Copies of the moment, and the output weights in float64."""
        d, m = self.of.mlp.hidden_size, self.of.mlp.intermediate_size
        return FIT_COPIES * 8 * m**2 + 32 * m * d

    @cached_property
    def scoring(self) -> int:
        """Logits and dense probabilities of a batch, and the piece of it that is scored."""
        return WINDOWS * self.seq_len * self.of.vocabulary * (self.of.itemsize + 4) + 8 * SCORED_AT_ONCE_GPU

    @cached_property
    def refitting(self) -> int:
        """Sums of the widest regression twice in float64, its solutions; features of a batch, and those of validation text."""
        d, m = self.of.mlp.hidden_size, self.of.mlp.intermediate_size
        w = m - m // WIDTH_STEPS
        unseen = self.validation * self.seq_len * (w + d) * self.of.itemsize
        return 16 * w**2 + 32 * w * d + WINDOWS * self.seq_len * (8 * w + 40 * d) + unseen

    def forward(self, windows: int, head: bool = False) -> float:
        """Seconds."""
        return windows * self.seq_len * (self.of.layer_flops + head * self.of.head_flops) / BF16

    @cached_property
    def pass_seconds(self) -> float:
        """A pass over the calibration text with all moments. A layer whose blocks are in two groups runs twice."""
        again = sum(a[-1].layer == b[0].layer for a, b in pairwise(self.groups)) / self.of.layers
        products = self.windows * self.seq_len * sum(self.statistics.values()) / 4  # 2 FLOPs for each of 8 bytes
        copies = 2 * len(self.groups) * self.states(self.windows)
        return (1 + again) * self.forward(self.windows) + products / FP32 + copies / LINK

    @cached_property
    def price_seconds(self) -> float:
        """Of the candidates of one layer."""
        d, m, tokens = self.of.mlp.hidden_size, self.of.mlp.intermediate_size, self.validation * self.seq_len
        families = candidate_families([self.of.mlp, self.of.attention])
        linear = [family for family in families[self.of.mlp] if isinstance(family, NarrowPlusLinear)]
        ranked = len(linear) + any(isinstance(family, LowRank) for family in families[self.of.attention])  # factorisations
        factors = (m**3 / 3 + 2 * m**2 * d + 13 / 3 * d**3 * ranked) / FP64 + eigen_seconds(self.of.mlp) * ranked
        fits = sum(fit_seconds(self.of.mlp, family.width) for family in linear)
        errors = tokens * (m**2 + 6 * m * d) / FP32
        heads = sum(isinstance(f, NarrowAttention) and f.key_dim is None for f in families[self.of.attention])
        narrowed = heads * (7 * self.of.attention.inner_size**3 / FP64 + 2 * tokens * d * self.of.attention.inner_size / FP32)
        return factors + fits + errors + narrowed + 12 * self.states(self.validation) / LINK


def bytes_of_token(block: Block) -> int:
    """Of a block's input, output, gradient, outputs of heads, and what is felt of its queries and keys."""
    whole = 3 * block.hidden_size * block.dtype.itemsize
    if block.heads is None:
        return whole
    whole += block.inner_size * block.dtype.itemsize
    if (units := key_units(block)) is None:
        return whole
    return whole + len(attention_weights(block).key) * len(units) * torch.promote_types(block.dtype, torch.float32).itemsize
