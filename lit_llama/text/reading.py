"""Sources of any kind -> one stream of conversations in a fixed order, every row accounted for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from lit_llama.text.conversation import Conversation, Dropped

OnError = Literal["stop", "skip"]
Tree = Literal["best", "all"]


class Reader:
    """Conversations of all sources, in an order that is the same in every run; each loop over it begins anew.

    Attributes:
        rows: Conversations and dropped rows so far: each has a number below this.
        schemas: Rows of each schema.
        files: Path, sha256 and number of raw rows of what has been read to its end.
        cut_turns: Last turns without an answer that were left off.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.schemas: dict[str, int] = {}
        self.files: list[dict[str, Any]] = []
        self.cut_turns = 0

    def __iter__(self) -> Iterator[Conversation | Dropped]:
        """Read.

        Raises:
            DataError: A source or a row that cannot be used; the message names the place.
        """
        raise NotImplementedError


def read_conversations(
    sources: Sequence[str],
    *,
    fields: Mapping[str, str] = {},  # noqa: B006 -- never written to
    on_error: OnError = "stop",
    tree: Tree = "best",
    weights: Sequence[float] | None = None,
    seed: int = 42,
) -> Reader:
    """Read instruction, chat or text data; nothing is read before the loop over the result begins."""
    raise NotImplementedError
