"""Tests of sources that a URL names: the same rows as of local files, under the names of the store."""

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from lit_llama.errors import DataError, ResourceError, UserError
from lit_llama.text.message import Conversation
from lit_llama.text.read.reading import read_conversations

ROWS = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """An object store within this process."""
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/", recursive=True)


def read(*sources: str) -> list[Conversation]:
    found = list(read_conversations(sources))
    assert all(isinstance(one, Conversation) for one in found)
    return [one for one in found if isinstance(one, Conversation)]


def answers(found: list[Conversation]) -> list[str]:
    return [str(one.messages[-1]["content"]) for one in found]


def test_rows_of_a_store_are_those_of_a_file(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    """Catches places that name a copy, which is gone when anybody looks, and other bytes in each run."""
    store.pipe("/bucket/rows.jsonl", LINES.encode())
    (tmp_path / "rows.jsonl").write_text(LINES)
    found, local = read("memory://bucket/rows.jsonl"), read(str(tmp_path / "rows.jsonl"))
    assert [one.messages for one in found] == [one.messages for one in local]
    assert [one.where for one in found] == [f"memory:///bucket/rows.jsonl:line {n + 1}" for n in range(5)]


def test_patterns_and_folders_are_taken_in_order_with_their_splits(store: fsspec.AbstractFileSystem) -> None:
    for name in ("b.jsonl", "a.jsonl", "train/x.jsonl", "test/x.jsonl", ".hidden/y.jsonl", "README.md"):
        store.pipe(f"/bucket/{name}", json.dumps({"instruction": "q", "output": name}).encode())
    assert answers(read("memory://bucket/?.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert answers(read("memory://bucket")) == ["a.jsonl", "b.jsonl", "test/x.jsonl", "train/x.jsonl"]
    assert answers(read("memory://bucket/a.jsonl", "memory://bucket/?.jsonl")) == ["a.jsonl", "b.jsonl"], "once each"
    reader = read_conversations(["memory://bucket/train", "memory://bucket/test"])
    assert reader.division.sides == {
        "train": ["memory:///bucket/train/x.jsonl"],
        "test": ["memory:///bucket/test/x.jsonl"],
    }
    assert [name for name, _, _ in reader.identity()] == [
        "memory:///bucket/train/x.jsonl",
        "memory:///bucket/test/x.jsonl",
    ]


def test_packed_tables_and_workbooks_are_read(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    pytest.importorskip("python_calamine")
    store.pipe("/bucket/rows.csv.gz", gzip.compress(b"instruction,output\nq,packed\n"))
    book = openpyxl.Workbook()
    book.active.title = "chats"
    for line in (["instruction", "output"], ["q", "cell"]):
        book.active.append(line)
    book.save(tmp_path / "book.xlsx")
    store.pipe("/bucket/book.xlsx", (tmp_path / "book.xlsx").read_bytes())
    assert answers(read("memory://bucket/rows.csv.gz", "memory://bucket/book.xlsx#chats")) == ["packed", "cell"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"instruction": "q", "output": 3}\n', r"^memory:///bucket/rows\.jsonl:line 1"),
        (b"{\n", r"^memory:///bucket/rows\.jsonl"),
        (b"PK\x03\x04", r"^memory:///bucket/rows\.jsonl"),
        (b"", r"^memory:///bucket/rows\.jsonl is empty"),
    ],
)
def test_errors_name_the_url(store: fsspec.AbstractFileSystem, content: bytes, said: str) -> None:
    store.pipe("/bucket/rows.jsonl", content)
    with pytest.raises(DataError, match=said) as error:
        read("memory://bucket/rows.jsonl")
    assert "lit-llama-" not in str(error.value), "the folder of the copies"


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ("memory://bucket/absent.jsonl", DataError, "^memory://bucket/absent.jsonl does not exist$"),
        ("memory://bucket/*.jsonl", DataError, "matches no file"),
        ("memory://other", DataError, r"holds README\.md"),
        ("nosuch://bucket/rows.jsonl", ResourceError, "^nosuch://bucket/rows.jsonl cannot be read: .*nosuch"),
        (
            "http://127.0.0.1:9/rows.jsonl",
            DataError,
            "^http://127.0.0.1:9/rows.jsonl does not exist, or cannot be reached: ",
        ),
    ],
)
def test_what_cannot_be_fetched_is_one_line(
    store: fsspec.AbstractFileSystem, source: str, kind: type[UserError], said: str
) -> None:
    store.pipe("/other/README.md", b"words")
    with pytest.raises(kind, match=said) as error:
        read(source)
    assert "\n" not in str(error.value)


def test_a_package_that_is_missing_is_named() -> None:
    if "s3" in fsspec.available_protocols() and __import__("importlib").util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(ResourceError, match=r"^s3://bucket/rows.jsonl needs a package .*s3fs"):
        read("s3://bucket/rows.jsonl")


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *words: object) -> None:
        pass


def test_a_server_is_read_and_the_key_in_its_url_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text(LINES)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/data/rows.jsonl"
        found = read(f"{url}?key=secret")
        assert answers(found) == [row["output"] for row in ROWS]
        assert found[0].where == f"{url}:line 1"
        with pytest.raises(UserError, match=r"rows\.jsonl has no part #Sheet1"):
            read(f"{url}#Sheet1")
        with pytest.raises(DataError, match=r"absent\.jsonl does not exist$"):
            read(url.replace("rows", "absent"))
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://name:se@cret@127.0.0.1:9/rows.jsonl", "ftp://127.0.0.1:9/rows.jsonl"),
        ("abfs://container@account.host/rows.jsonl", "abfs://container@account.host/rows.jsonl"),
    ],
)
def test_passwords_in_urls_of_any_kind_are_not_shown(url: str, shown: str) -> None:
    """Catches a password in a log, and a container that is taken for a user."""
    with pytest.raises(UserError) as error:
        read(url)
    assert str(error.value).startswith(shown) and "cret" not in str(error.value)
