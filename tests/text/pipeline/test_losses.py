"""What becomes of rows is counted by reason, and every row is named."""

import json
from pathlib import Path

from lit_llama.text.message import Conversation, Dropped
from lit_llama.text.pipeline.reject_log import FIRST, LOST_FILE, RejectLog


def test_every_row_is_named_in_order_and_memory_holds_the_first(tmp_path: Path) -> None:
    """Catches a list that grows with the data, a row that stands in no file, and rows out of order."""
    message = {"role": "assistant", "content": "x"}
    with RejectLog(tmp_path) as losses:
        for start in range(0, 3000, 100):
            rows = range(start, start + 100)
            dropped = [Dropped(n, f"a:{n}", f"no {n % 2}") for n in rows if n % 3]
            losses.add(reversed(dropped), [Conversation((message,), n, f"a:{n}") for n in rows if not n % 3])
    assert losses.dropped_rows == 2000 and losses.cut.rows == 1000
    assert {reason: tally.rows for reason, tally in losses.dropped.items()} == {"no 0": 1000, "no 1": 1000}
    lines = [json.loads(line) for line in (tmp_path / LOST_FILE).open()]
    assert [line["where"] for line in lines] == [f"a:{n}" for n in range(3000)]
    assert {line["what"] + line.get("reason", "") for line in lines} == {"cut", "droppedno 0", "droppedno 1"}
    assert FIRST == 1000 and losses.meta()["cut"] == {"rows": 1000, "first": [f"a:{n}" for n in range(0, 3000, 3)]}


def test_reasons_that_differ_in_every_row_are_counted_together(tmp_path: Path) -> None:
    """Catches a reason that names what stands in the row, and so a report of a million headings."""
    with RejectLog(tmp_path) as losses:
        losses.add([Dropped(n, f"a:{n}", f"byte {n}") for n in range(5000)], [])
    assert len(losses.dropped) == 201 and losses.dropped_rows == 5000
    assert losses.dropped["for other reasons, see lost.jsonl"].rows == 4800
    assert [json.loads(line)["reason"] for line in (tmp_path / LOST_FILE).open()] == [f"byte {n}" for n in range(5000)]
