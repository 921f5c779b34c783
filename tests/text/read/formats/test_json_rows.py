"""JSON: every form gives the rows that the json module gives, every mistake is named with its place."""

import gzip
import json

import pytest
from raw_rows import CHAT, FORMS, ROW, ROWS, Put, errors, read, values

from lit_llama.errors import DataError
from lit_llama.text.read.formats.sources import read_rows


@pytest.mark.parametrize("ending", ["json", "jsonl", "json.gz"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_json_gives_the_rows_that_json_gives(form: str, ending: str, put: Put) -> None:
    """Catches a form taken for another, rows cut at U+2028, and rows lost or split on the border of two blocks."""
    rows = [*ROWS, CHAT, {}, {"number": [1, -2.5, 10**30, True, None, {"a": {}}]}]
    rows += [{"instruction": "long " * size, "n": size} for size in (1, 300_000, 7, 100_000, 500_000)]
    if form == "one behind another" and ending == "jsonl":
        ending = "json"  # .jsonl promises one object a line
    content = FORMS[form](rows).encode()
    assert values(put(f"a.{ending}", gzip.compress(content) if ending.endswith("gz") else content)) == rows


HABITS: dict[str, tuple[str, str, int, str]] = {
    "joined files": ("jsonl", '\ufeff{"a": 1}\n\ufeff{"a": 2}\n', 2, ""),
    "joined arrays of lines": ("json", '{"a": 1}\ufeff\n \ufeff{"a": 2}', 2, ""),
    "commas at line ends": ("jsonl", '{"a": 1},\n{"a": 2},\n', 2, "commas stand behind its rows"),
    "commas at line ends, .json": ("json", '{"a": 1},\n{"a": 2}\n', 2, "commas stand behind its rows"),
    "commas between objects": ("json", '{\n"a": 1\n},\n{"a": 2}\n', 2, "commas stand between its rows"),
    "a comma behind the last row": ("json", '[{"a": 1}, {"a": 2},\n]\n', 2, "a comma stands behind the last row"),
    "several a line": ("jsonl", '{"a": 1}{"a": 2}\n{"a": 3} {"a": 4}\n', 4, ""),
    "indented objects": ("jsonl", '{\n "a": 1\n}\n{\n "a": 2\n}\n', 2, ""),
}


@pytest.mark.parametrize("name", HABITS)
def test_habits_of_other_programs_are_read_and_said(name: str, put: Put) -> None:
    """Catches rows lost at a mark, a comma or a line end, and what is no JSON passed over in silence."""
    ending, content, count, remark = HABITS[name]
    said: list[str] = []
    rows = list(read_rows(put(f"a.{ending}", content), remark=said.append))
    assert [row.value for row in rows] == [{"a": number} for number in range(1, count + 1)]
    assert all(remark in sentence for sentence in said) and bool(said) == bool(remark)


def test_borders_of_blocks_fall_anywhere(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error in the middle of a number, a literal, an escape or a character that two blocks share."""
    rows = [{"a": [1234567, -1.5e-7, True, None, False], "b": '😀 é \\ " 北京'}, {"c": {"d": []}}] * 3
    for form in FORMS:
        for size in (1, 2, 3, 5, 7, 64):
            monkeypatch.setattr("lit_llama.text.read.formats.files.BLOCK", size)
            assert values(put("a.json", FORMS[form](rows))) == rows


def test_places_are_those_in_the_file(put: Put) -> None:
    """Catches places counted from the last block, from the kept rows, or without blank lines."""
    rows = [{"a": "é\n" * 9, "b": "x" * 300_000}] * 9
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    path = put("a.json", text[:-1] + ', {"c": tru }]')
    found, error = read(path)
    assert [row.where for row in found] == [f"{path}:row {number}" for number in range(9)]
    column = len(text.splitlines()[-1]) + len(', {"c": ')
    byte = len((text[:-1] + ', {"c": ').encode())
    assert f"a.json:row 9 is not JSON: Expecting value at line {text.count(chr(10)) + 1}, column {column}, byte {byte}, near" in error  # fmt: skip # noqa: E501
    path = put("a.jsonl", '\n{"a": 1}\n\r\n{"b": }\n{"c": 3}\n')
    rows_, error = read(path)
    assert [row.where for row in rows_] == [f"{path}:line {number}" for number in (2, 4, 5)] and not error
    (message,) = errors(path)
    assert message.startswith("line 4 is not JSON: Expecting value at line 4, column 7, byte 18, near ")


BAD_JSON: dict[str, tuple[bytes, int, str]] = {
    "no rows": (b"[]", 0, "holds no rows"),
    "blank": (b" \n\t\r\n", 0, "holds no rows"),
    "only a mark": (b"\xef\xbb\xbf", 0, "holds no rows"),
    "NULs": (b"\0\0\0\0", 0, "byte 0x00 at offset 0"),
    "prose": (b"Hello, world", 0, "row 0 is not JSON: Expecting value at line 1, column 1, byte 0"),
    "cut off in an array": (b'[{"a": 1}, {"a": "xy', 1, "row 1 is not JSON: Unterminated.*ends here: it is cut off"),
    "cut off behind a row": (b'[{"a": 1}', 1, "the end of row 0 is not JSON: expected , or ].*cut off, fetch it again"),
    "cut off behind a comma": (b'[{"a": 1},\n', 1, "row 1 is not JSON: Expecting value.*cut off"),
    "no comma": (b'[{"a": 1} {"a": 2}]', 1, "row 0 is not JSON: expected , or ] .*at line 1, column 11"),
    "two commas": (b'[{"a": 1},,]', 1, "row 1 is not JSON: Expecting value at line 1, column 11, byte 10"),
    "two arrays": (b'[{"a": 1}]\n[{"a": 2}]', 1, "the end is not JSON: more text behind the array at line 2, column 1"),
    "single quotes": (b"[{'a': 1}]", 0, "row 0 is not JSON: Expecting property name.*; this is how Python prints obj"),
    "newline in a text": (b'[{"a": "b\nc"}]', 0, "row 0 is not JSON: Invalid control character at line 1, column 10"),
    "bad escape": (rb'[{"a": "\x41"}]', 0, r"row 0 is not JSON: Invalid \\escape at line 1, column 9"),
    "nested too deep": (b"[" * 100_000, 0, "row 0, which begins at line 1, column 2, byte 1, is nested too deep"),
    "Latin-1 behind a row": (b'[{"a": 1}, {"a": "\xe9"}]', 1, "is not UTF-8: byte 0xe9 at offset 18; it may be CP1252"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_none_ends_with_its_place(name: str, put: Put) -> None:
    """Catches a traceback, rows before the mistake that get lost, and a file cut off that passes as whole."""
    content, rows, message = BAD_JSON[name]
    path = put("a.json", content)
    found, error = read(path)
    assert len(found) == rows
    with pytest.raises(DataError, match=message):
        list(read_rows(path))
    assert error


BAD_ROWS: dict[str, tuple[str, str]] = {
    "text": ('"a"', "found text, expected an object"),
    "number": ("17", "found a number, expected an object"),
    "null": ("null", "found null, expected an object"),
    "list": ("[[1]]", "found a list, expected an object"),
    "the same field twice": ('{"a": [{"output": 1, "output": 2}]}', "an object has the field 'output' twice"),
    "Infinity": ('{"a": [-Infinity]}', "-Infinity is not JSON"),
    "infinite number": ('{"a": 1e999}', "the number '1e999' is too large"),
    "huge integer": ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
    "long names": (f'{{"{"x" * 999}": 1, "{"x" * 999}": 2}}', "an object has the field 'xxxxx"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_refused_row_leaves_the_others_readable(name: str, put: Put) -> None:
    """Catches the last of two equal fields winning, numbers no other program reads, and other rows that are lost."""
    row, message = BAD_ROWS[name]
    good = json.dumps(ROW)
    path = put("a.json", f"[{good}, {row},\n{good}, {row}]")
    found, error = read(path)
    assert not error and [row.value for row in found] == [ROW, None, ROW, None]
    for number in (1, 3):
        assert (
            str(found[number].error).startswith(f"{path}:row {number}: {message}")
            and len(str(found[number].error)) < 300
        )
        assert found[number].reason in str(found[number].error)
    path = put("a.jsonl", f"{good}\n{row}\n{good}\n")
    found, error = read(path)
    assert not error and [row.value for row in found] == [ROW, None, ROW]
    assert str(found[1].error).startswith(f"{path}:line 2: {message}")


def test_a_broken_line_leaves_the_others_readable(put: Put) -> None:
    """Catches a whole file that is refused for one line, and a number of a line that is off."""
    good = json.dumps(ROW)
    deep = "[" * 100_000
    lines = [good, '{"a": ', "nonsense", "", deep, '{"a": 1} ["b"]', good, '{"a": "b']
    path = put("a.jsonl", "\n".join(lines))
    found, error = read(path)
    assert not error and [row.where for row in found] == [f"{path}:line {n}" for n in (1, 2, 3, 5, 6, 7, 8)]
    assert [row.reason for row in found] == [
        "", "not JSON", "not JSON", "is nested too deep", "not JSON", "", "not JSON"
    ]  # fmt: skip
    messages = errors(path)
    assert messages[0].startswith("line 2 is not JSON: Expecting value at line 2, column 7, byte ")
    assert "cut off" not in messages[0] and "the file ends here: it is cut off" in messages[-1]
    assert "Extra data at line 6, column 10" in messages[3]
