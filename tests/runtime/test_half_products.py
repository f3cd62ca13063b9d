"""Products of half-precision matrices are those of float32, rounded once, wherever a CPU has no instructions for them."""

import pytest
import torch
from tiny_models import build, random_windows
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mlpreplace import find_blocks, perplexity
from mlpreplace.models.forward import eval_mode
from mlpreplace.runtime import half_products
from mlpreplace.runtime.half_products import HALF, quick_products
from mlpreplace.statistics import fisher_effects

PRODUCTS = {  # name → (function of tensors, their shapes)
    "linear": (F.linear, [(2, 5, 96), (64, 96)]),
    "with a bias": (F.linear, [(2, 5, 96), (64, 96), (64,)]),
    "batches": (torch.matmul, [(3, 4, 96), (3, 96, 8)]),
    "a vector": (torch.matmul, [(8, 96), (96,)]),
    "Conv1D": (torch.addmm, [(8,), (5, 96), (96, 8)]),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 3 * [(1, 2, 12, 16)]),
}


@pytest.fixture
def without_instructions(monkeypatch):
    monkeypatch.setattr(half_products, "has_instructions", lambda dtype: False)


class Precisions(TorchDispatchMode):
    """Records the precisions in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in half_products.PRODUCTS:
            self.found |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_and_its_gradients_are_those_of_float32_rounded(name, dtype, without_instructions):
    product, shapes = PRODUCTS[name]
    torch.manual_seed(0)
    own = [torch.randn(shape).to(dtype) for shape in shapes]
    half, whole = ([t.detach().to(d).requires_grad_() for t in own] for d in (dtype, torch.float32))
    with quick_products(half):
        found = product(*half)
        gradient = torch.randn(found.shape).to(dtype)
        found.backward(gradient)
        with torch.inference_mode():
            again = product(*own)
    expected = product(*whole)
    rounded = expected.to(dtype)
    assert found.dtype == dtype and torch.equal(found, rounded) and torch.equal(again, rounded)
    if name == "attention":  # whose backward pass reads the rounded output
        return
    expected.backward(gradient.float())
    for a, b in zip(half, whole, strict=True):
        assert torch.equal(a.grad, b.grad.to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_attention_gives_gradients_near_those_of_float32(dtype, without_instructions):
    product, shapes = PRODUCTS["attention"]
    torch.manual_seed(0)
    own = [torch.randn(shape).to(dtype) for shape in shapes]
    half, whole = ([t.detach().to(d).requires_grad_() for t in own] for d in (dtype, torch.float32))
    with quick_products(half):
        product(*half).square().sum().backward()
    product(*whole).square().sum().backward()
    for a, b in zip(half, whole, strict=True):
        assert (a.grad.float() - b.grad).norm() < 0.02 * b.grad.norm()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_runs_a_model_multiplies_in_float32_and_a_clock_does_not(dtype, without_instructions):
    model, windows = build("llama").to(dtype), random_windows(2, 8)
    runs = {
        "measured": lambda: perplexity(model, windows, progress=False),
        "gradients": lambda: fisher_effects(model, find_blocks(model), windows, progress=False),
    }
    for run in runs.values():
        with Precisions() as seen:
            run()
        assert seen.found <= {torch.float32}
    with Precisions() as seen, eval_mode(model, as_it_is=True), torch.no_grad():
        model(windows)
    assert dtype in seen.found


def test_where_there_are_instructions_nothing_changes(monkeypatch):
    monkeypatch.setattr(half_products, "has_instructions", lambda dtype: True)
    model = build("llama").to(torch.bfloat16)
    with Precisions() as seen, eval_mode(model), torch.no_grad():
        model(random_windows(2, 8))
    assert torch.bfloat16 in seen.found
