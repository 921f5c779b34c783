"""Rows a block at a time: read, rendered and encoded at once, here by a thread for each of these."""

import contextlib
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol, TypeVar

from lit_llama import progress
from lit_llama.text.message import Conversation, Dropped
from lit_llama.text.pipeline.encoder import Encoded, Encoder
from lit_llama.text.pipeline.render import Rendered
from lit_llama.text.read.reading import Reader

T = TypeVar("T")
_YOUNG = 100_000  # objects after which Python looks for circles among them
ROWS = 2000
"""Rows of a block, enough for the tokenizer to use all cores."""


@dataclass(frozen=True)
class Block:
    """Some rows that follow each other.

    Args:
        number: From 0, the same in every run over the same data.
        conversations: What can be encoded.
        dropped: What cannot be.
    """

    number: int
    conversations: list[Conversation]
    dropped: list[Dropped]


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python look for circles of objects rarely: rows form none, and a tenth of the time would go there."""
    before = gc.get_threshold()
    gc.set_threshold(_YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def read_blocks(reader: Reader) -> Iterator[Block]:
    """Read all rows of a reader."""
    rows = iter(progress.count(reader, "encoding"))
    for number in count():
        if not (some := list(islice(rows, ROWS))):
            return
        conversations = [row for row in some if isinstance(row, Conversation)]
        yield Block(number, conversations, [row for row in some if isinstance(row, Dropped)])


class Executor(Protocol):
    """Encoder of blocks, whoever does the work: blocks go in, and come out in the same order with their samples."""

    def encode(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Encoded]]:
        """Encode each block into the samples that it comes to.

        Raises:
            UserError: What `Encoder` says of a row.
        """
        ...


class LocalExecutor:
    """Executor in this process: a thread renders, another encodes.

    Args:
        encoder: Makes samples of rows.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def encode(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Encoded]]:
        """Encode as Executor says."""
        return ahead(self._encoded(ahead(self._rendered(blocks))))

    def _rendered(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Rendered]]:
        for block in blocks:
            yield block, self._encoder.render(block.conversations)

    def _encoded(self, rendered: Iterator[tuple[Block, Rendered]]) -> Iterator[tuple[Block, Encoded]]:
        for block, part in rendered:
            yield block, self._encoder.encode(part)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Make each item in another thread while the one before is worked on.

    The tokenizer needs no Python: while it encodes, rows are read before it and written behind it.
    """
    pool = ThreadPoolExecutor(1)
    try:
        made = pool.submit(next, items, None)
        while (item := made.result()) is not None:
            made = pool.submit(next, items, None)
            yield item
    finally:
        with contextlib.suppress(RuntimeError):  # after an error this may end in that very thread
            pool.shutdown()
