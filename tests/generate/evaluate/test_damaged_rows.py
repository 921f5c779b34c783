"""The rows of an evaluation in their file: what a damaged disk left of them."""

from pathlib import Path
from typing import Any

import pytest

from lit_llama.generate.store import RowStore

HEADER = {"model": "m"}
ROWS: list[dict[str, Any]] = [{"task": "a", "index": index, "answer": "x"} for index in range(4)]
KEY = ("task", "index")


@pytest.mark.parametrize("damage", [b"{broken", b"[1]", b"{}", b'{"task": [], "index": 1}', b"\xff\xfe", b"null"])
def test_rows_behind_a_damaged_line_are_kept_aside(tmp_path: Path, damage: bytes) -> None:
    """Catches rows of hours that go in silence, and a file that is never read again."""
    path = tmp_path / "rows.jsonl"
    store = RowStore(path, HEADER, KEY)
    for row in ROWS:
        store.add(row)
    store.close()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    lines[3] = damage + b"\n"
    path.write_bytes(b"".join(lines))
    store = RowStore(path, HEADER, KEY)
    assert [*store.rows.values()] == ROWS[:2]
    assert (tmp_path / "rows.jsonl.damaged").read_bytes() == b"".join(lines)
    for row in ROWS[2:]:
        store.add(row)
    store.close()
    assert path.read_bytes() == whole


def test_a_line_that_a_kill_has_torn_is_no_damage(tmp_path: Path) -> None:
    """Catches a copy and a warning after each kill."""
    path = tmp_path / "rows.jsonl"
    store = RowStore(path, HEADER, KEY)
    store.add(ROWS[0])
    store.close()
    path.write_bytes(path.read_bytes() + b'{"task": "a", "ind')
    store = RowStore(path, HEADER, KEY)
    store.close()
    assert [*store.rows.values()] == ROWS[:1] and [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]
