"""Parquet and folders of the datasets library: the rows that those give, damage named for what it is."""

import contextlib
import gzip
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from datasets.exceptions import DatasetNotFoundError
from raw_rows import CHAT, ROWS, errors, read, values

from lit_llama.errors import DataError, ResourceError, UserError
from lit_llama.text.read.formats import parquet, tables
from lit_llama.text.read.reading import read_conversations


def test_parquet_gives_the_rows_that_pyarrow_gives(tmp_path: Path) -> None:
    """Catches rows lost between batches and row groups, and nested chats that come out in another form."""
    rows = [{**row, **CHAT, "tags": ["a", None]} for row in ROWS * 99]
    table = pa.Table.from_pylist(rows)
    table = table.append_column("kind", pa.array(["x", "y"] * (len(rows) // 2)).dictionary_encode())
    table = table.append_column("large", pa.array(["é"] * len(rows), pa.large_string()))
    for compression in ("snappy", "zstd", "gzip", "none"):
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression=compression)
        assert values(tmp_path / "a.parquet") == pq.read_table(tmp_path / "a.parquet").to_pylist()
    (tmp_path / "a.parquet").rename(tmp_path / "no name")
    assert len(values(tmp_path / "no name")) == len(rows)


def test_columns_without_a_word_in_json_keep_their_type(tmp_path: Path) -> None:
    """Catches binary, decimal and dates turned to text in silence: the schema has to see what they are."""
    row = {"a": b"x", "b": Decimal("1.5"), "c": date(2020, 1, 1), "d": None}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [row]


def test_parquet_that_is_none_is_named(tmp_path: Path) -> None:
    """Catches Arrow's own words about a footer, and zero rows that pass as read."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[20:60] = b"\xff" * 40
    for content, message in (
        (whole[:-9], "is cut off: it ends with"),
        (whole[:-300], "is cut off: it ends with"),
        (b"[]", "is no Parquet file: it begins with b'[]', expected b'PAR1'"),
        (b"PAR1", "cannot be read as Parquet"),
        (b"PAR1" * 9, "cannot be read as Parquet"),
        (gzip.compress(whole), "is Parquet and packed once more: unpack it"),
        (bytes(middle), "cannot be read as Parquet"),
    ):
        path.write_bytes(content)
        assert message in read(path)[1]
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), path)
    assert "holds no rows" in read(path)[1]
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    assert "the column 'text' stands there twice" in read(path)[1]


def test_a_text_that_is_not_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    """Catches a UnicodeDecodeError without a place, and good rows of the same batch that get lost."""
    texts = pa.array([b"a", b"b\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"n": [1, 2, 3], "text": texts}), tmp_path / "a.parquet")
    found, error = read(tmp_path / "a.parquet")
    assert [row.value for row in found] == [{"n": 1, "text": "a"}, None, {"n": 3, "text": "c"}] and not error
    assert errors(tmp_path / "a.parquet") == ["row 1: field text is not UTF-8: byte 0xff at offset 1"]


def test_folders_of_the_datasets_library_are_read_as_it_reads_them(tmp_path: Path) -> None:
    """Catches a split left out, and rows in another order than the library's."""
    rows = [{**row, **CHAT} for row in ROWS * 99]
    whole = datasets.Dataset.from_list(rows)
    rows = list(whole)
    whole.select(range(len(rows) - 1, -1, -1)).save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": whole, "test": whole.select([3, 1])})
    splits.save_to_disk(str(tmp_path / "two"))
    assert values(tmp_path / "one") == rows[::-1]
    assert values(tmp_path / "two") == [*rows, rows[3], rows[1]]
    assert read(tmp_path / "two")[0][-1].where == f"{tmp_path / 'two'}/test:row 1"


def test_a_damaged_folder_of_the_datasets_library_is_named(tmp_path: Path) -> None:
    """Catches the library's traceback about a file that nobody has heard of."""
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:40])
    assert "cannot be" in read(tmp_path / "one")[1]
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot be opened as a folder of the datasets library" in read(tmp_path / "one")[1]


def test_a_name_of_the_hub_is_told_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mistyped path that is looked for in the network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert all(map(tables.is_hub_id, ["tatsu-lab/alpaca", "openai/gsm8k:main", "a/b#train[:10%]", "a/b:c#train_sft"]))
    assert not any(map(tables.is_hub_id, ["data/alpaca", "a/b.jsonl", "a/b/c", "alpaca", "../a", "a/b.csv.gz", "/a/b", "a b/c"]))  # fmt: skip # noqa: E501


def test_a_data_set_of_the_hub_that_cannot_be_fetched_says_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of the network for what may be a mistyped path, and the kinds of refusal mixed up."""

    def fail(error: Exception) -> Callable[..., Any]:
        def load(*_: object, **__: object) -> Any:
            raise error

        return load

    for error, kind, message in (
        (ConnectionError("Couldn't reach 'x/y' on the Hub"), ResourceError, "cannot be fetched from the Hub: Couldn't"),
        (
            DatasetNotFoundError("Dataset 'x/y' doesn't exist"),
            UserError,
            "neither a file .*hf auth login",
        ),
        (
            ValueError("Config name is missing.\nPick one among: ['a']"),
            UserError,
            "Pick one.*configuration as x/y:N",
        ),
    ):
        monkeypatch.setattr(datasets, "load_dataset", fail(error))
        with pytest.raises(kind, match=message):
            read_conversations(["x/y"])


def test_a_data_set_of_the_hub_is_read_with_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a configuration or split that is not passed on."""
    asked = []
    made = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"instruction": name, "output": name}]) for name in ("train", "test_sft")}
    )

    def load(name: str, configuration: str | None, split: str | None) -> Any:
        asked.append((name, configuration, split))
        return made[split] if split else made

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = list(read_conversations(["x/y:main"]))
    assert [(entry.where, getattr(entry, "split", "")) for entry in found] == [
        ("x/y:main/train:row 0", "train"),
        ("x/y:main/test_sft:row 0", "test"),
    ]
    assert [entry.where for entry in read_conversations(["x/y#test_sft"])] == ["x/y/test_sft:row 0"]
    assert asked == [("x/y", "main", None), ("x/y", None, "test_sft")]


def zigzag(value: int) -> bytes:
    """A number as Thrift's compact protocol writes it."""
    value, out = value << 1, b""
    while value > 127:
        value, out = value >> 7, out + bytes([value & 127 | 128])
    return out + bytes([value])


PEAK = """
import resource, sys
from pathlib import Path
from lit_llama.text.read.formats.tables import read_parquet
import pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(len(list(read_parquet(Path(sys.argv[1])))))
except ValueError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_page_of_two_gigabytes_in_a_small_file_is_refused(compression: Any, tmp_path: Path) -> None:
    """Catches Arrow allocating, and touching, what a damaged page header names."""
    texts = [f"some words {n} " * 8 for n in range(3000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, compression=compression, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    head = bytes(data[column.data_page_offset :][:20])
    # Fields 1 and 2: the type and the uncompressed size; field 3, a byte 0x15 before it, is to be replaced.
    at = column.data_page_offset + head.index(b"\x15", 3) + 1
    end = next(place for place in range(at, at + 5) if data[place] < 128) + 1
    data[at:end] = zigzag(2**31 - 5)
    path.write_bytes(data)
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, cwd=ROOT, check=True)
    said, grown = done.stdout.splitlines()
    assert f"{path} cannot be " in said and ("damaged" in said or "cannot be read as Parquet" in said), said
    assert int(grown) < 100


def test_all_kinds_of_pages_are_passed_over(tmp_path: Path) -> None:
    """Catches a good file that is refused: pages of both versions, with statistics, checksums, long values, nothing."""
    rows = [{"text": "x" * n, "words": ["a"] * (n % 4), "n": n % 3, "b": n % 2 > 0, "no": None} for n in range(2000)]
    table = pa.Table.from_pylist(rows)
    table = table.append_column("id", pa.array([bytes([n % 256]) * 16 for n in range(2000)], pa.binary(16)))
    for version in ("1.0", "2.0"):
        for compression in ("none", "zstd"):
            pq.write_table(
                *(table, tmp_path / "a.parquet"),
                data_page_version=version,
                compression=compression,
                data_page_size=4000,
                row_group_size=700,
                write_page_checksum=True,
                write_page_index=version == "2.0",
            )
            assert values(tmp_path / "a.parquet") == pq.read_table(tmp_path / "a.parquet").to_pylist()


BOMBS: dict[str, Callable[[], pa.Table]] = {
    "one text": lambda: pa.table({"output": ["x" * 150_000_000]}),
    "one text by a dictionary": lambda: pa.table({"output": pa.array(["x" * 70_000_000]).dictionary_encode()}),
    "a text again and again": lambda: pa.table(
        {"output": pa.DictionaryArray.from_arrays(pa.array([0] * 9000, pa.int32()), pa.array(["x" * 100_000]))}
    ),
    "a list of nothing": lambda: pa.table({"output": pa.array([[None] * 20_000_000])}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_little_file_of_much_text_is_refused(tmp_path: Path, bomb: str) -> None:
    """Catches the memory that is taken by text of a few packed bytes, as JSON's rows do not take it either."""
    path = tmp_path / "a.parquet"
    pq.write_table(BOMBS[bomb](), path, compression="zstd")
    assert path.stat().st_size < 20_000
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, cwd=ROOT, check=True)
    said, grown = done.stdout.splitlines()
    words = ("unpacks to more than",) if bomb == "a text again and again" else ("row 0: the row has", "67,108,864")
    assert all(word in said for word in words), said
    assert int(grown) < 50


def test_no_flipped_bit_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    """Catches an exception of Arrow's that nobody catches: all is rows or an error of ours, and reading goes on."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    draw = random.Random(1)
    for place in draw.sample(range(len(whole) - 8 - footer, len(whole) - 4), 60):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        os.utime(path, ns=(place, place))
        with contextlib.suppress(DataError):
            list(tables.read_parquet(path))
    path.write_bytes(whole)
    assert values(path) == pq.read_table(path).to_pylist()


def test_a_reader_that_ends_is_told_and_the_next_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an end of the bounded process that ends this one, or all that is read after it."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    process = parquet._process()
    ask = process.ask

    def die(request: str) -> str | int:
        process.start()
        assert process.process is not None
        process.process.send_signal(signal.SIGSTOP)
        threading.Timer(0.05, process.process.send_signal, [signal.SIGABRT]).start()
        threading.Timer(0.1, process.process.send_signal, [signal.SIGCONT]).start()
        return ask(request)

    monkeypatch.setattr(process, "ask", die)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet: its reader ended with status -6"):
        list(tables.read_parquet(path))
    monkeypatch.undo()
    assert values(path) == pq.read_table(path).to_pylist()


def test_a_file_is_unpacked_once_for_each_state_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check for every row or pass, and one that a changed file is spared."""
    path, asked = tmp_path / "a.parquet", list[str]()
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    process = parquet._process()
    ask = process.ask
    monkeypatch.setattr(process, "ask", lambda request: asked.append(request) or ask(request))
    for _ in range(3):
        list(tables.read_parquet(path))
    assert len(asked) == 1
    os.utime(path, ns=(1, 1))
    list(tables.read_parquet(path))
    assert len(asked) == 2


def test_a_column_outside_of_the_file_is_named() -> None:
    """Catches a footer that is believed."""

    class Column:
        data_page_offset, has_dictionary_page, total_compressed_size, path_in_schema = 4, False, 10**9, "text"

    with pytest.raises(ValueError, match="column text does not fit into the file"):
        parquet._check_column(Column(), 10**8)
    parquet._check_column(Column(), 10**9)
