"""Files of any format: nothing but a DataError whatever they hold, and little memory however large they are."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_rows import CHAT, FORMS, ROWS, Put, read, values

from lit_llama.errors import DataError
from lit_llama.text.read import raw
from lit_llama.text.read.formats.sources import read_rows

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_a_row_without_an_end_stops_with_its_line(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file of many gigabytes that is gathered in memory because one quote is not closed."""
    for module in ("raw", "formats.json_rows", "formats.spreadsheets"):
        monkeypatch.setattr(f"lit_llama.text.read.{module}.LONGEST", 1000)
    monkeypatch.setattr("lit_llama.text.read.formats.files.BLOCK", 100)
    long = json.dumps({"a": "x" * 2000})
    assert (
        "line 2: a row that begins here has more than 1,000 characters"
        in read(put("a.jsonl", f"{{}}\n{long}\n{{}}"))[1]
    )
    assert "line 1: a row that begins here has more than 1,000" in read(put("a.json", '{"rows": [' + "{}," * 999))[1]
    assert "line 2: a quote that opens here is never closed" in read(put("a.csv", 'a\n"' + "b\n" * 999))[1]
    assert "line 2 has more than 1,000 characters" in read(put("a.csv", "a\n" + "b" * 2000))[1]


def good_files() -> dict[str, bytes]:
    """A file of each format."""
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**row, **CHAT} for row in ROWS]), out)
    array = json.dumps([*ROWS, CHAT]).encode()
    return {
        "json": array,
        "jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
        "csv": b'instruction,output\na,b\n"c\nd",e\n' * 3,
        "tsv": b"text\tn\na\t1\nb\t2\n",
        "parquet": out.getvalue(),
        "json.gz": gzip.compress(array),
        "jsonl.zst": pa.compress(array, "zstd", asbytes=True),
    }


def test_prose_is_sent_to_where_it_can_be_prepared(put: Put) -> None:
    """Catches an error that knows formats of rows only."""
    for name, told in (("a.txt", True), ("a.md.gz", True), ("a.xyz", False)):
        with pytest.raises(DataError, match="its format is not known") as caught:
            list(read_rows(put(name, "once upon a time")))
        assert ("plain text is for prepare/text.py" in str(caught.value)) is told


GOOD = good_files()
KEYS = '[]{}",:\\u0d123456789e+-. \n\r\t\ufeff'


@FUZZ
@given(st.sampled_from(sorted(GOOD)), st.binary(max_size=80) | st.text(KEYS, max_size=80).map(str.encode))
def test_arbitrary_bytes_raise_nothing_but_a_data_error(put: Put, ending: str, content: bytes) -> None:
    """Catches any traceback: of decoding, unpacking, JSON, CSV, Arrow, our own code."""
    read(put(f"fuzz.{ending}", content))


@settings(FUZZ, max_examples=500)
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_damaged_files_raise_nothing_but_a_data_error(put: Put, ending: str, data: st.DataObject) -> None:
    """Catches the same for files that are nearly right: bytes changed, cut out, doubled, or the end missing."""
    content = bytearray(GOOD[ending])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 40)))
        content[start:end] = data.draw(st.binary(max_size=12) | st.just(bytes(content[start:end] * 2)))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    read(put(f"fuzz.{ending}", bytes(content)))


@FUZZ
@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=9) | st.integers() | st.none(), min_size=1), min_size=1))  # fmt: skip # noqa: E501
def test_whatever_json_writes_is_read_back(put: Put, rows: list[dict[str, Any]]) -> None:
    """Catches an escape, a character or an empty object that is read differently, in any form."""
    for form in FORMS:
        if "UTF-8" in form or form == "lines":
            continue  # lone surrogates cannot be written without escapes
        assert values(put("a.json", FORMS[form](rows))) == json.loads(json.dumps(rows))


STREAM = """
import re, sys
from pathlib import Path
from lit_llama.text.read.formats.sources import read_rows
def peak():  # not ru_maxrss, which begins with that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
import pyarrow.parquet
before, rows = peak(), read_rows(Path(sys.argv[1]))
count = sum(1 for _ in rows)
print(count, peak() - before)
"""


@pytest.mark.parametrize("form", ["array", "lines", "csv", "parquet"])
def test_a_large_file_is_read_in_little_memory(form: str, tmp_path: Path) -> None:
    """Catches a reader that holds the file, its text or its rows."""
    row = {"instruction": "Explain. " * 40, "output": "It is so. " * 60}
    count = 300_000_000 // len(json.dumps(row))
    path = tmp_path / {"array": "a.json", "lines": "a.jsonl", "csv": "a.csv", "parquet": "a.parquet"}[form]
    if form == "parquet":
        with pq.ParquetWriter(
            path, pa.Table.from_pylist([row]).schema, use_dictionary=False, compression="none"
        ) as out:
            for _ in range(10):
                out.write_table(pa.Table.from_pylist([row] * (count // 10)))
    else:
        line = {"array": json.dumps(row) + ",\n", "lines": json.dumps(row) + "\n", "csv": ",".join(row.values()) + "\n"}
        with path.open("w") as file:
            file.write({"array": "[", "csv": "instruction,output\n"}.get(form, ""))
            for _ in range(count // 1000):
                file.write(line[form] * 1000)
            file.write("{}]" if form == "array" else "")
    run = subprocess.run(
        [sys.executable, "-c", STREAM, str(path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    path.unlink()
    read, kilobytes = map(int, run.stdout.split())
    print(f"{form}: {read} rows, {kilobytes / 1000:.0f} MB more")
    assert abs(read - count) < 1002 and kilobytes < (100_000 if form == "parquet" else 60_000)


def test_the_limit_of_a_row_is_far_above_any_real_one() -> None:
    """Catches a limit that refuses books in one row."""
    assert raw.LONGEST >= 50_000_000
