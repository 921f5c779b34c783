"""Rows that are kept as they come."""

import json
from contextvars import Context
from pathlib import Path

import pytest

from lit_llama.errors import LockedError, ResourceError, UserError
from lit_llama.generate.store import open_rows, unfinished

KEY = ("row",)


def test_a_torn_line_goes_and_the_rest_stays(tmp_path: Path) -> None:
    """A row that was half written, taken for one; or all rows lost with it."""
    path, header = tmp_path / "rows.jsonl", {"a": 1}
    with open_rows(path, header, KEY) as store:
        for row in (2, 0, 1):
            store.add({"row": row, "text": "é\n\ud800"})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with open_rows(path, header, KEY) as store:
            assert [*store.rows] == [(2,), (0,), (1,)][: max(0, whole[:cut].count(b"\n") - 1)]
            for row in (2, 0, 1):
                if (row,) not in store.rows:
                    store.add({"row": row, "text": "é\n\ud800"})
            assert path.read_bytes() == whole
            store.sort([(0,), (1,), (2,)])
        assert [json.loads(line).get("row") for line in path.read_bytes().splitlines()] == [None, 0, 1, 2]


def test_rows_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with open_rows(path, {"model": {"weights": "a", "dtype": "x"}}, KEY) as store:
        store.add({"row": 0})
    other = {"model": {"weights": "b", "dtype": "x"}}
    with (
        pytest.raises(UserError, match=r'made otherwise: model\.weights was "a", is "b"') as caught,
        open_rows(path, other, KEY),
    ):
        pass
    assert "dtype" not in str(caught.value)
    with open_rows(path, other, KEY, anew=True) as store:
        assert store.begun_anew and not store.rows
    path.write_text("my notes")
    with pytest.raises(UserError, match="no file of an evaluation"), open_rows(path, other, KEY, anew=True):
        pass
    assert path.read_text() == "my notes"


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_rows(tmp_path / "rows.jsonl", {}, KEY) as store:

        class Full:
            def write(self, _: bytes) -> None:
                raise OSError(28, "No space left on device")

            close = flush = lambda self: None

        store._file.close()
        store._file = Full()  # type: ignore[assignment]
        with pytest.raises(ResourceError, match=r"rows\.jsonl cannot be written: No space left"):
            store.add({"row": 0})
        assert not store.rows


def test_one_process_at_a_time_writes_a_file(tmp_path: Path) -> None:
    """Two runs whose rows are mixed, and what is unfinished left behind when it is finished."""
    output = tmp_path / "out.jsonl"
    with unfinished(output, {}, KEY) as store:
        store.add({"row": 0})
        with pytest.raises(LockedError, match="another run is at work"):
            Context().run(unfinished(output, {}, KEY).__enter__)
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(KeyError), unfinished(output, {}, KEY) as store:
        store.add({"row": 0})
        raise KeyError
    with unfinished(output, {}, KEY) as store:
        assert [*store.rows] == [(0,)]
