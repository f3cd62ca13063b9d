"""Statistics that are captured when they are asked for, as many layers at a time as fit into a memory budget.

Statistics of one block of an 8B model take 2.4 GB, those of all its blocks 85 GB. So a pass over the text stops behind a group of
layers, and goes on from its hidden states when a block of the next group is asked for. However many groups there are, asking for
blocks in the order of layers costs one pass, and every number is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..models.architectures import layer_lists
from ..models.blocks import Block
from ..models.inputs import Batch
from ..models.walk import Walk
from ..runtime.memory import AtOnce, give_back
from ..runtime.turns import turn
from .collect import Part, collect
from .records import BlockStatistics, Statistics


class InGroups(Mapping[Block, BlockStatistics]):
    """{block: BlockStatistics}, of which one group is in memory. Blocks come in the order of layers.

    A block of an earlier group starts another pass; one of a later group goes on with the present one. The model has to stay as
    it is until the last block was asked for.

    Args:
        groups: blocks that are captured together.
        batches: of a number of windows at a time, the parts and batches of a pass.
        collector: of a group, with a method ``result(block)``.
        windows: at a time. Where memory runs out, the pass starts again with half as many, which stay for later groups.
        key: what else the statistics depend on, for the cache.
        effects: of the blocks, which are part of their statistics.

    Raises (when a block is asked for):
        ValueError: the model was changed since, or has a plan in place; and what capturing raises.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Block]],
        batches: Callable[[int], list[tuple[Part, Batch]]],
        collector: Callable[[Sequence[Block]], object],
        *,
        windows: int,
        key: tuple = (),
        effects: Mapping[Block, Tensor] | None = None,
        progress: bool = True,
    ):
        self.model, self.groups, self.batches, self.collector = model, groups, batches, collector
        self.at_once, self.key, self.effects, self.progress = AtOnce(windows), key, effects or {}, progress
        self.group_of = {block: i for i, group in enumerate(groups) for block in group}
        self.held: dict[Block, BlockStatistics] = {}
        self.walk: Walk | None = None
        with turn(model):  # another thread may have other modules in place
            self.modules, self.parameters = list(model.modules()), list(model.parameters())
            self.written = _versions(self.parameters)

    def __getitem__(self, block: Block) -> BlockStatistics:
        if block not in self.held:
            group = self.groups[self.group_of[block]]
            self.drop(list(self.held))  # before there are others
            with turn(self.model):
                self.held = _with(self.at_once(lambda windows: self._capture(group, windows)), self.effects)
        return self.held[block]

    def __contains__(self, block: object) -> bool:
        return block in self.group_of  # without capturing it

    def __iter__(self) -> Iterator[Block]:
        return iter(self.group_of)

    def __len__(self) -> int:
        return len(self.group_of)

    __eq__, __hash__ = object.__eq__, object.__hash__  # to compare content would capture it all

    def cache_key(self) -> tuple:
        """What the statistics are made from."""
        return self.model, list(self.group_of), self.key, self.effects

    def drop(self, blocks: Collection[Block]) -> None:
        """Free what is in memory of some blocks. To ask for them again starts another pass."""
        for block in blocks:
            del self.held[block]
        if blocks:
            give_back()

    def only(self, blocks: Collection[Block]) -> InGroups:
        """The same of some of the blocks."""
        groups = [[block for block in group if block in blocks] for group in self.groups]
        return self._like([group for group in groups if group], self.effects)

    def with_effects(self, effects: Mapping[Block, Tensor]) -> InGroups:
        return self._like(self.groups, effects)

    def _like(self, groups: Sequence[Sequence[Block]], effects: Mapping[Block, Tensor]) -> InGroups:
        options = dict(windows=self.at_once.most, key=self.key, effects=effects, progress=self.progress)
        return InGroups(self.model, groups, self.batches, self.collector, **options)

    def _capture(self, group: Sequence[Block], windows: int) -> dict[Block, BlockStatistics]:
        if list(self.model.modules()) != self.modules:
            raise ValueError("The model has other modules than when its statistics were asked for: is a plan in place?")
        if _versions(self.parameters) != self.written:
            raise ValueError("The weights of the model were written since its statistics were asked for: capture it again.")
        batches = self.batches(windows)
        run = None if len(self.groups) == 1 or _stacks(self.model) > 1 else self._onward(group, [batch for _, batch in batches])
        collector = self.collector(group)
        collect(self.model, batches, collector, name="capture", progress=self.progress, run=run)
        return {block: collector.result(block) for block in group}

    def _onward(self, group: Sequence[Block], batches: list[Batch]) -> Callable[[int], object]:
        """Run a batch from where it stands to the last layer of ``group``, and leave it at the first one of the next group."""
        later = self.groups[self.group_of[group[0]] + 1 :]
        stop = max(block.layer for block in group) + 1
        then = min((block.layer for next_group in later for block in next_group), default=stop)
        stop = max(stop, then)  # layers between two groups run as well
        if self.walk is None or len(self.walk.at) != len(batches) or max(self.walk.at) > min(block.layer for block in group):
            self.walk = Walk(self.model, batches)
        walk = self.walk
        if not later:
            self.walk = None  # its hidden states are not needed any more
        return lambda batch: walk.run(batch, stop, then)


def _stacks(model: nn.Module) -> int:
    return len(layer_lists(model))


def _versions(parameters: Iterable[nn.Parameter]) -> list[int]:
    """How often each weight was written."""
    return [p._version for p in parameters if not p.is_inference()]


def grouped(blocks: Iterable[Block], sizes: Mapping[Block, int], budget: int) -> list[list[Block]]:
    """``blocks`` in the order of layers, in groups whose ``sizes`` (bytes) add up to ``budget`` at most; a block at least."""
    groups: list[list[Block]] = []
    left = 0
    for block in sorted(blocks, key=lambda block: (block.stack, block.layer)):  # which leaves those of a layer in their order
        if not groups or sizes[block] > left:
            groups.append([])
            left = budget
        groups[-1].append(block)
        left -= sizes[block]
    return groups


def only(statistics: Statistics, blocks: Collection[Block]) -> Statistics:
    """The statistics of some blocks, captured when they are asked for where those of all are."""
    asked = set(blocks)
    return statistics.only(asked) if isinstance(statistics, InGroups) else {b: s for b, s in statistics.items() if b in asked}


def with_effects(statistics: Statistics, effects: Mapping[Block, Tensor]) -> Statistics:
    """The same statistics with what :func:`~mlpreplace.statistics.fisher_effects` found, to choose neurons and heads by."""
    return statistics.with_effects(effects) if isinstance(statistics, InGroups) else _with(statistics, effects)


def _with(held: Mapping[Block, BlockStatistics], effects: Mapping[Block, Tensor]) -> dict[Block, BlockStatistics]:
    return {block: replace(s, effect=effects[block]) if block in effects else s for block, s in held.items()}


def release(statistics: Statistics | None, later: Collection[Block]) -> None:
    """Drop what is in memory of other blocks than the ``later`` ones."""
    if isinstance(statistics, InGroups):
        statistics.drop(statistics.held.keys() - set(later))


def by_group(statistics: Statistics | None, blocks: Iterable[Block]) -> list[list[Block]]:
    """``blocks`` in the groups in which their statistics are in memory at a time, in an order that costs one pass.

    Blocks without statistics are the last group.
    """
    blocks = list(blocks)
    if not isinstance(statistics, InGroups):
        return [blocks]
    asked = set(blocks)
    groups = [[block for block in group if block in asked] for group in statistics.groups]
    groups.append([block for block in blocks if block not in statistics])
    return [group for group in groups if group]
