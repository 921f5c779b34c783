"""Blocks of the cache of keys and values: who owns them, and what of them can be used again.

A block holds the keys and values of `size` neighbouring tokens, in all layers. A full block is known by its ids, the
block before it and the adapter that computed it, all of which are compared: two prompts share a block only where they
are the same. Blocks that no sequence holds stay known until their place is needed, the least recently used first
(Kwon et al. 2023, arXiv:2309.06180).
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_Key = tuple[Hashable, tuple[int, ...]]


class OutOfBlocks(Exception):
    """Lack of a block that is free or held by nobody."""


@dataclass(eq=False, slots=True)
class _Block:
    index: int
    holders: int = 0
    key: _Key | None = None  # while it is known
    serial: int = field(default=-1)  # of what it holds; a later content has another


class BlockPool:
    """Pool that counts who holds each block, and finds known ones.

    Args:
        count: Number of blocks.
        size: Tokens of a block.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._blocks = [_Block(index) for index in range(count)]
        self._empty = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, held by nobody, the oldest first
        self._known: dict[_Key, int] = {}
        self._serial = 0

    @property
    def available(self) -> int:
        """Blocks that can be had."""
        return len(self._empty) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that are known and held by nobody."""
        return len(self._idle)

    def allocate(self) -> int:
        """Allocate a block that nobody else holds.

        Raises:
            OutOfBlocks: There is none.
        """
        if self._empty:
            index = self._empty.pop()
        elif self._idle:
            index, _ = self._idle.popitem(last=False)
            self._forget(self._blocks[index])
        else:
            raise OutOfBlocks
        self._blocks[index].holders = 1
        return index

    def share(self, index: int) -> None:
        """Hold a block that somebody holds, or that is known."""
        block = self._blocks[index]
        if not block.holders:
            del self._idle[index]
        block.holders += 1

    def is_shared(self, index: int) -> bool:
        """Whether more than one sequence holds it, so that none may write into it."""
        return self._blocks[index].holders > 1

    def release(self, indices: Sequence[int]) -> None:
        """Hold them no longer. The last ones are forgotten first, as without those before them they are of no use."""
        for index in reversed(indices):
            block = self._blocks[index]
            block.holders -= 1
            if block.holders:
                continue
            if block.key is None:
                self._empty.append(index)
            else:
                self._idle[index] = None

    def publish(self, index: int, parent: Hashable, ids: tuple[int, ...]) -> Hashable:
        """Make a full block known under its ids and what precedes it.

        Args:
            index: The block.
            parent: What `publish` or `find` gave for the block before it; the adapter for the first one.
            ids: Of its tokens.

        Returns:
            What stands for the block, and all before it, as a parent. If another block with the same content is known
            already, that one stays known.
        """
        key = (parent, ids)
        known = self._known.setdefault(key, index)
        block = self._blocks[known]
        if known == index and block.key is None:
            self._serial += 1
            block.key, block.serial = key, self._serial
        return block.serial

    def find(self, parent: Hashable, ids: tuple[int, ...]) -> tuple[int, Hashable] | None:
        """Return the known block of these ids after that parent, and what stands for it as a parent."""
        index = self._known.get((parent, ids))
        return None if index is None else (index, self._blocks[index].serial)

    def is_held(self, index: int) -> bool:
        """Whether any sequence holds it."""
        return self._blocks[index].holders > 0

    def forget(self, indices: Iterable[int]) -> None:
        """Make blocks unknown, as their content is of no use."""
        for index in indices:
            if self._blocks[index].key is not None:
                self._forget(self._blocks[index])
                if index in self._idle:
                    del self._idle[index]
                    self._empty.append(index)

    def trim(self) -> list[int]:
        """Make everything unknown that no sequence holds; the blocks that are empty then."""
        self.forget(list(self._idle))
        return sorted(self._empty)

    def forget_adapter(self, name: str | None) -> None:
        """Make unknown what an adapter has computed, as another one has its name now.

        What follows the blocks of its first tokens is not found any more, and its place is used again in time.
        """
        first = [("adapter", name, long) for long in (False, True)]
        self.forget([index for (parent, _), index in self._known.items() if parent in first])

    def _forget(self, block: _Block) -> None:
        assert block.key is not None
        del self._known[block.key]
        block.key, block.serial = None, -1

    def check(self, holders: Mapping[int, int]) -> None:
        """Assert that each block is empty, or known and idle, or held by as many as are said."""
        assert holders == {block.index: block.holders for block in self._blocks if block.holders}
        empty, idle, held = set(self._empty), set(self._idle), set(holders)
        assert len(empty) == len(self._empty) and not (empty & idle or empty & held or idle & held)
        assert len(empty) + len(idle) + len(held) == self.count
        assert all(self._blocks[index].key == key for key, index in self._known.items())
        assert all(block.key is None or self._known[block.key] == block.index for block in self._blocks)
