"""What a sweep over many plans costs: common prefixes shared, beside one whole pass for each plan."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from common import show
from torch import Tensor, nn

from mlpreplace import NarrowMLP, capture, compare, find_blocks, fit, spliced
from mlpreplace.evaluation.speed import interleaved

NAIVE, SHARED = "naive: every pass from the first layer", "compare: common prefixes shared"


def bench_sweeps(model: nn.Module, windows: Tensor) -> None:
    """A sweep of single-block replacements, and one of pairs of six of them."""
    blocks = find_blocks(model)
    stats = capture(model, blocks, windows[:3], validation_windows=1, progress=False)
    small = {block: fit(block, stats, NarrowMLP(block.intermediate_size // 2)) for block in blocks}
    some = blocks[:: max(1, len(blocks) // 6)][:6]
    singles = {block.layer: {block: small[block]} for block in blocks}
    pairs = {(a.layer, b.layer): {a: small[a], b: small[b]} for a, b in combinations(some, 2)}
    _bench_sweep(f"sweep of {len(singles)} single-block replacements", model, singles, windows)
    _bench_sweep(f"sweep of all {len(pairs)} pairs of {len(some)} of them", model, pairs, windows)


def _bench_sweep(title: str, model: nn.Module, plans: dict, windows: Tensor) -> None:
    """NLL and KL of every plan and of the dense model on one batch, by both ways; prints how far the results differ."""
    plans = {"dense": {}} | plans
    n_tokens = windows[:, 1:].numel()
    found: dict[str, Tensor] = {}  # [plans, 2] nats per token

    @torch.inference_mode()
    def naive():
        log_p = model(windows, use_cache=False).logits[:, :-1].log_softmax(-1)
        rows = []
        for plan in plans.values():
            log_q = log_p
            if plan:
                with spliced(model, plan):
                    log_q = model(windows, use_cache=False).logits[:, :-1].log_softmax(-1)
            nll = -log_q.gather(-1, windows[:, 1:, None]).mean()
            kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / n_tokens
            rows.append((nll, kl))
        found[NAIVE] = torch.tensor(rows)

    def shared():
        measured = compare(model, plans, windows, batch_size=len(windows), progress=False).values()
        found[SHARED] = torch.tensor([(m.nll.sum() / m.n_tokens, m.mean_kl) for m in measured])

    seconds = interleaved({NAIVE: naive, SHARED: shared}, rounds=1)
    show(f"{title}, {windows.numel():,} tokens each", seconds, SHARED)
    print(f"  largest difference {(found[NAIVE] - found[SHARED]).abs().max():.1e} nats per token")
