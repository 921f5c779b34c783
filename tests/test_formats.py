"""Raw files: what is malformed is an error that names file, row and field; nothing is dropped without its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lit_llama.errors import DataError
from lit_llama.text.formats import Dropped, Example, read_alpaca, read_prompts, write_alpaca

Write = Callable[[bytes | str], Path]
ROW = {"instruction": "Add.", "input": "1 2", "output": "3"}
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a raw file under the name rows.json."""

    def put(content: bytes | str) -> Path:
        path = tmp_path / "rows.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def refused(path: Path, read: Callable[[Path], Any] = read_alpaca) -> str:
    """The message of the error, which always names the file."""
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_every_row_is_kept_or_dropped_by_name(write: Write) -> None:
    """Catches rows lost in silence, and numbers that count the kept rows instead of the raw ones."""
    rows = [
        ROW,
        ROW | {"instruction": " \n"},
        ROW | {"output": ""},
        ROW | {"output": "\u3000\t"},
        {"instruction": "No input.", "output": " as it is\n", "extra": 1},
        ROW | {"input": None},
    ]
    examples, dropped = read_alpaca(write(json.dumps(rows)))
    assert examples == [
        Example("Add.", "1 2", "3", 0),
        Example("No input.", "", " as it is\n", 4),
        Example("Add.", "", "3", 5),
    ]
    assert dropped == [Dropped(1, "empty instruction"), Dropped(2, "empty output"), Dropped(3, "empty output")]


def test_the_shared_alpaca_file_is_read_whole(alpaca_file: Path) -> None:
    """Catches a changed character or a lost row in real data: compared with plain json."""
    raw = json.loads(alpaca_file.read_bytes())
    examples, dropped = read_alpaca(alpaca_file)
    assert len(examples) + len(dropped) == len(raw)
    for row in examples:
        wanted = raw[row.row]
        assert (row.instruction, row.input, row.response) == (wanted["instruction"], wanted["input"], wanted["output"])


NOT_A_FILE_OF_ROWS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is empty"),
    "blank file": (b" \n\t\n", "is empty"),
    "only a byte order mark": (b"\xef\xbb\xbf", "not JSON"),
    "cp1252": ('[{"instruction": "caf\u00e9"}]'.encode("cp1252"), "not UTF-8: byte 0xe9 at offset 21"),
    "GBK": ('["你好"]'.encode("gbk"), "not UTF-8: byte 0xc4 at offset 2"),
    "UTF-16 with a mark": (json.dumps([ROW]).encode("utf-16"), "not UTF-8"),
    "UTF-16 without a mark": (json.dumps([ROW]).encode("utf-16-le"), "not JSON"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "HTML page": (b"\n<!DOCTYPE HTML>\n<html></html>", "HTML page"),
    "HTML page without a doctype": (b"<html lang=en>", "HTML page"),
    "failed download": (b"404: Not Found", "failed download"),
    "truncated": (json.dumps([ROW, ROW]).encode()[:-9], "not JSON.* at line 1, column"),
    "one object a line": (b'{"a": 1}\n{"a": 2}\n', "not JSON: Extra data at line 2, column 1"),
    "trailing comma": (b"[1,]", "not JSON"),
    "NaN": (b'[{"instruction": NaN}]', "NaN is not JSON"),
    "Infinity": (b"[-Infinity]", "-Infinity is not JSON"),
    "duplicate keys": (b'[{"output": "a", "instruction": "", "output": "b"}]', "field 'output' twice"),
    "huge integer": (b"[" + b"9" * 5000 + b"]", "digits"),
    "deep nesting": (b"[" * 100_000, "nested too deep"),
    "no rows": (b"[]", "holds no rows"),
    "object at the top": (b'{"rows": []}', "found an object at the top"),
    "text at the top": (b'"rows"', "found text at the top"),
    "null at the top": (b"null", "found null at the top"),
    "number at the top": (b"1e9", "found a number at the top"),
    "infinite number": (b"[1e999]", "number .1e999. is too large"),
}


@pytest.mark.parametrize("name", NOT_A_FILE_OF_ROWS)
def test_a_file_that_holds_no_rows_is_refused_with_what_it_is(name: str, write: Write) -> None:
    """Catches a traceback of the JSON module, a silent guess of the encoding, and a last-one-wins duplicate."""
    content, message = NOT_A_FILE_OF_ROWS[name]
    with pytest.raises(DataError, match=message):
        read_alpaca(write(content))


BROKEN_ROWS: dict[str, tuple[Any, str]] = {
    "no instruction": ({"input": "", "output": "b"}, "field instruction is missing (found input, output)"),
    "no output": ({"instruction": "a"}, "field output is missing (found instruction)"),
    "no field": ({}, "field instruction is missing (found nothing)"),
    "look-alike key": ({"instruction": "a", "\u043eutput": "b"}, "field output is missing"),
    "null instruction": (ROW | {"instruction": None}, "field instruction is null, expected text"),
    "number output": (ROW | {"output": 3}, "field output is a number, expected text"),
    "fraction output": (ROW | {"output": 3.5}, "field output is a number, expected text"),
    "true output": (ROW | {"output": True}, "field output is true/false, expected text"),
    "list input": (ROW | {"input": ["a"]}, "field input is a list, expected text"),
    "empty list input": (ROW | {"input": []}, "field input is a list, expected text"),
    "false input": (ROW | {"input": False}, "field input is true/false, expected text"),
    "zero input": (ROW | {"input": 0}, "field input is a number, expected text"),
    "object input": (ROW | {"input": {}}, "field input is an object, expected text"),
    "lone surrogate": (ROW | {"output": "ab\ud83d"}, "field output holds a lone surrogate at character 2"),
    "text row": ("a", "found text, expected an object"),
    "null row": (None, "found null, expected an object"),
    "list row": ([ROW], "found a list, expected an object"),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_row_of_another_form_is_an_error_with_file_row_and_field(name: str, write: Write) -> None:
    """Catches an error nobody can find in 50,000 rows, and a wrong value taken for an empty one."""
    row, message = BROKEN_ROWS[name]
    path = write(json.dumps([ROW, ROW, row]))
    assert refused(path).startswith(f"{path}:row 2: ") and message in refused(path)


def test_a_byte_order_mark_and_crlf_are_accepted(write: Write) -> None:
    """Catches refusing what Windows editors write."""
    text = json.dumps([ROW], indent=1).replace("\n", "\r\n")
    assert read_alpaca(write(b"\xef\xbb\xbf" + text.encode())) == ([Example("Add.", "1 2", "3")], [])


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    """Catches a bare FileNotFoundError without the folder it was looked for in."""
    assert f"does not exist (working folder: {Path.cwd()})" in refused(tmp_path / "no.json")
    assert "is a folder, expected a file" in refused(tmp_path)


def test_written_rows_are_read_back(tmp_path: Path) -> None:
    """Catches escapes that lose a character, and lines cut at U+2028 and its like inside a string."""
    texts = ["a\u2028b", "a\u0085b\x0bc\x0cd\x1ee", 'quote " and \\ and \n', "北京 😀 \ufffd", "\0"]
    examples = [Example(text, "in " + text, text + "!", row) for row, text in enumerate(texts)]
    write_alpaca(tmp_path / "rows.jsonl", examples)
    assert read_prompts(tmp_path / "rows.jsonl") == examples
    assert len((tmp_path / "rows.jsonl").read_bytes().split(b"\n")) == len(texts) + 1


def test_prompts_need_no_output_and_come_as_array_or_lines(tmp_path: Path) -> None:
    """Catches asking for the answer that is to be generated, and a blank line counted as a row."""
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text('[{"instruction": "a"}, {"instruction": "b", "input": "c", "output": "d"}]')
    lines.write_text('{"instruction": "a"}\r\n\n  \n{"instruction": "b", "input": "c", "output": "d"}')
    wanted = [Example("a"), Example("b", "c", "d", 1)]
    assert read_prompts(array) == wanted and read_prompts(lines) == wanted


def test_a_broken_line_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    """Catches numbers that skip blank lines, and a file of no rows that passes as zero answers."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a"}\n\n{"instruction": ')
    assert f"{path}:line 3 is not JSON" in refused(path, read_prompts)
    path.write_text('[{"instruction": "a"}]')
    assert "row 0: found a list, expected an object" in refused(path, read_prompts)
    path.write_bytes(b"\xef\xbb\xbf\n")
    assert "holds no rows" in refused(path, read_prompts)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
rows = st.fixed_dictionaries(
    {}, optional={name: json_values | st.text() for name in ("instruction", "input", "output", "extra")}
)


@FUZZ
@example(b"[\xff")
@given(st.binary(max_size=60) | st.text('[]{}",:\\u0d123456789e+-. \n\ufeff', max_size=60).map(str.encode))
def test_arbitrary_bytes_raise_nothing_but_a_data_error(write: Write, content: bytes) -> None:
    """Catches any traceback: of decoding, of the JSON module, of our own code."""
    path = write(content)
    assert str(path) in refused(path)
    lines = path.rename(path.with_suffix(".jsonl"))
    assert str(lines) in refused(lines, read_prompts)


@FUZZ
@given(st.lists(rows | json_values, max_size=4) | json_values)
def test_arbitrary_json_is_read_whole_or_raises_a_data_error(write: Write, value: Any) -> None:
    """Catches a traceback for an odd type in an odd place, and a row that is neither kept nor dropped."""
    path = write(json.dumps(value))
    try:
        examples, dropped = read_alpaca(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert sorted(entry.row for entry in [*examples, *dropped]) == list(range(len(value)))
