"""Rows that are left out, or that lose a part: counted by reason, every one of them named in a file."""

import json
import statistics
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from lit_llama.text.message import Conversation, Dropped
from lit_llama.wording import param

LOST_FILE = "lost.jsonl"
"""In a data folder: {"where", "what": "dropped" | "cut", "reason"} of every such row, in the order of the rows."""
FIRST = 1000
"""Places of each reason that stand in meta.json and the report as well."""
_REASONS = 200  # counted apart; some reasons name what stood in the row, and memory is to hold few of them
_OTHERS = f"for other reasons, see {LOST_FILE}"


@dataclass
class Tally:
    """Rows of one reason: how many, and the first of their places."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.first) < FIRST:
            self.first.append(where)


class RejectLog:
    """Account of what is lost; memory holds the first places of each reason only.

    Args:
        folder: Where the file is written.

    Attributes:
        cut: Kept rows that lost a part of their prompt or answer.
        dropped: The rows of each reason.
        by_choice: Those of them with nothing wrong.
        too_long: Tokens of those of them that are too long.
    """

    def __init__(self, folder: Path) -> None:
        self.cut = Tally()
        self.dropped: dict[str, Tally] = {}
        self.by_choice = 0
        self.too_long = array("i")
        self._file = (folder / LOST_FILE).open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, dropped: Iterable[Dropped], cut: Iterable[Conversation]) -> None:
        """Take in what became of some rows; those of a later call come after them."""
        rows: list[Dropped | Conversation] = [*dropped, *cut]
        for row in sorted(rows, key=lambda row: row.row):
            if isinstance(row, Dropped):
                known = row.reason in self.dropped or len(self.dropped) < _REASONS
                self.dropped.setdefault(row.reason if known else _OTHERS, Tally()).add(row.where)
                self.by_choice += row.by_choice
                self.too_long.extend([row.tokens] if row.tokens else [])
                entry = {"where": row.where, "what": "dropped", "reason": row.reason}
            else:
                self.cut.add(row.where)
                entry = {"where": row.where, "what": "cut"}
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    @property
    def dropped_rows(self) -> int:
        """Number of rows that are left out."""
        return sum(tally.rows for tally in self.dropped.values())

    def meta(self) -> dict[str, Any]:
        """Return the record of dropped and cut rows in meta.json."""
        return {
            "cut": asdict(self.cut),
            "dropped": {reason: asdict(tally) for reason, tally in self.dropped.items()},
            "dropped_by_choice": self.by_choice,
            "too_long": {
                "rows": len(self.too_long),
                "median": statistics.median_high(self.too_long) if self.too_long else 0,
            },
        }


def keep_long_rows(too_long: Mapping[str, int], max_seq_length: int) -> str:
    """Advise what to do about rows that are too long; "" if there is none. `too_long` stands in `RejectLog.meta`."""
    if not too_long["rows"]:
        return ""
    return (
        f"raise {param('max_seq_length')} ({max_seq_length}) or see {param('overflow')}: {too_long['rows']} rows are "
        "too long, half of "
        f"them with {too_long['median']:,} tokens or more"
    )
