"""Blocks of low-rank projections: sizes, the least error in a projection's output, and exactness at full rank."""

import pytest
import torch
from conftest import capture_quietly
from decoding import logits
from tiny_models import build, random_windows

from mlpreplace import find_blocks, fit, splice
from mlpreplace.fitting.ridge import whitened
from mlpreplace.replacements import FactoredAttention, FactoredMLP
from mlpreplace.replacements.factored import attention_shapes, mlp_shapes

FAMILIES = {"mlp": (FactoredMLP, mlp_shapes), "attention": (FactoredAttention, attention_shapes)}


def full(block):
    family, shapes = FAMILIES[block.kind]
    ranks = {min(shape) for part, shape in shapes(block).items() if part in ("gate", "up", "query", "key")}
    return family(*sorted(ranks, reverse=True)) if len(ranks) > 1 or block.kind == "mlp" else family(*ranks, *ranks)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "qwen3", "falcon", "phi3"])
def test_at_full_rank_it_is_the_block(name, kind):
    model = build(name).double()
    blocks, stats = capture_quietly(model, random_windows(), kind, moments=("input", "hidden"))
    plan = {block: fit(block, stats, full(block)) for block in blocks}
    ids = random_windows(2, 9, seed=3)
    torch.testing.assert_close(logits(splice(model, plan), ids), logits(model, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_sizes_are_what_numel_says(name, kind):
    family, _ = FAMILIES[kind]
    block = find_blocks(build(name), kind)[1]
    for share in (0.2, 0.5, 0.9):
        found = family.nearest(block, share * block.n_params)
        assert found.n_params(block) == sum(p.numel() for p in found.build(block).parameters())
        assert found.n_params(block) == pytest.approx(share * block.n_params, abs=8 * block.hidden_size)  # a rank of all four


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_least_error_in_the_output_and_not_in_the_weight(shape, llama):
    """Against the paper's own steps in float64: SVD of WL with the Cholesky factor L of the moment, cut, times L⁻¹."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    scales = torch.logspace(0, 2, shape[1], dtype=torch.float64)
    x = torch.randn(200, shape[1], generator=g, dtype=torch.float64) * scales
    lower = torch.linalg.cholesky(x.T @ x)
    u, s, v = torch.linalg.svd(weight @ lower, full_matrices=False)
    expected = u[:, :5] * s[:5] @ torch.linalg.solve_triangular(lower.T, v[:5].T, upper=True).T
    down, up = whitened(find_blocks(llama)[0], weight, x.T @ x, 5)
    torch.testing.assert_close(up @ down, expected, rtol=1e-6, atol=1e-6)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = u[:, :5] * s[:5] @ v[:5]
    assert (x @ (up @ down - weight).T).square().sum() < 0.9 * (x @ (plain - weight).T).square().sum()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_few_tokens_summed_in_float32(shape, llama):
    """Rounding leaves their moment short of positive definite; a rank of as many as there are tokens is still exact on them."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    x = torch.randn(5, shape[1], generator=g, dtype=torch.float64)
    c = x.T @ x
    c -= 1e-7 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    down, up = whitened(find_blocks(llama)[0], weight, c, 5)
    torch.testing.assert_close(x @ (up @ down).T, x @ weight.T, rtol=1e-4, atol=1e-4)
