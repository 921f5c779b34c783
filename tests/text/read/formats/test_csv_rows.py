"""CSV: read as the csv module reads it, every mistake named with its line."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from raw_rows import ROWS, Put, errors, read, values

from lit_llama.text.read.formats.files import UTF8, Dialect
from lit_llama.text.read.formats.sources import read_rows


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_is_read_as_the_csv_module_reads_it(delimiter: str, end: str, mark: str, put: Put) -> None:
    """Catches a wrong delimiter, a mark that becomes part of the first name, and lines cut inside quotes."""
    out = io.StringIO()
    rows = [*ROWS, {"instruction": "x" * 200_000, "output": "behind a field longer than the module's limit"}]
    writer = csv.DictWriter(out, ["instruction", "output"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    limit = csv.field_size_limit()
    assert values(put("a.csv", mark + out.getvalue())) == rows and csv.field_size_limit() == limit
    assert values(put("b.csv", f"{mark}sep={delimiter}{end}{out.getvalue()}")) == rows
    if delimiter == "\t":
        assert values(put("a.tsv", mark + out.getvalue())) == rows


def test_lines_of_csv_are_counted_in_the_file(put: Put) -> None:
    """Catches numbers of records in place of lines, as soon as a field holds a line break."""
    path = put("a.csv", 'a,b\n1,"x\ny\nz"\n\n2,3\n4\n5,6\n')
    found, error = read(path)
    assert not error and [row.where for row in found] == [f"{path}:line {number}" for number in (2, 6, 7, 8)]
    assert errors(path) == ["line 7: found 1 fields, expected 2 (a, b); put fields that hold the delimiter into quotes"]
    path = put("a.csv", 'sep=;\na;b\n"x\ny";1\n2\n')
    assert [row.where for row in read(path)[0]] == [f"{path}:line 3", f"{path}:line 5"]


BAD_CSV: dict[str, tuple[str, list[str]]] = {
    "ragged": ("a,b\n1\n2,3,4\n5,6", ["line 2: found 1 fields, expected 2 (a, b)", "line 3: found 3 fields"]),
    "the same column twice": ("a,b,a\n1,2,3", ["line 1: the column 'a' stands there twice; expected a header"]),
    "column without a name": ("a,,c\n1,2,3", ["line 1: column 2 has no name; expected a header"]),
    "no header, long text": (f"{'Explain. ' * 30},Yes.\nb,c", ["line 1: 'Explain. Expl"]),
    "no header, numbers": ("1,2\n3,4", ["line 1: '1' is no name of a column; expected a header"]),
    "empty header": (",\n1,2", ["line 1: found no header"]),
    "blank header": (" \n1", ["line 1: found no header"]),
    "only a header": ("a,b\n", ["holds no rows, only a header"]),
    "blank": ("\n \n", ["line 2: found no header"]),
    "quote never closed": ('a,b\n1,2\n3,"4\n5,6\n', ["line 3: a quote that opens here is never closed"]),
    "quote closed too early": ('a,b\n1,"2" 3\n', ["line 2: a quote ends inside of a field"]),
    "old Mac lines": ("a,b\r1,2\r3,4", ["line 1: a carriage return stands alone"]),
    "NUL": ("a,b\n1,\0\n", ["line 2: found a NUL character: the file is damaged or not CSV"]),
    "JSON": ('[{"a": 1}]', ["is named .csv but holds JSON: rename it"]),
    "long sep": ("sep=--\na,b", ["line 1: sep='--', expected one character that separates fields"]),
    "odd sep": ('sep="\na,b\n', ["line 1: sep='\"', expected one character that separates fields"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CSV)
def test_malformed_csv_is_an_error_with_its_line(name: str, put: Put) -> None:
    """Catches fields that slip into another column, and rows that a quote swallows."""
    content, messages = BAD_CSV[name]
    found = errors(put("a.csv", content))
    assert len(found) == len(messages) and all(a in b for a, b in zip(messages, found, strict=True)), found


def rows_of(path: Path, dialect: Dialect = UTF8) -> tuple[list[Any], list[str]]:
    """Rows, and what is said of them."""
    said: list[str] = []
    return [row.value or str(row.error) for row in read_rows(path, dialect, said.append)], said


AB = {"a": "1", "b": "2"}
HABITS: dict[str, tuple[str, list[dict[str, str]], str]] = {
    "a header that ends in delimiters": ("a,b,,\n1,2,,\n3,4,,\n", [AB, {"a": "3", "b": "4"}], "no name"),
    "rows that end in a delimiter": ("a,b\n1,2,\n", [{"a": "1", "b": "2"}], "rows end in empty fields"),
    "joined files": ("\ufeffa,b\n1,2\n\ufeffa,b\n3,4\n", [AB, {"a": "3", "b": "4"}], "line 3: the header"),
    "blanks behind delimiters": ('a, b\n"1, 2", "3, 4"\n', [{"a": "1, 2", "b": "3, 4"}], ""),
    "blanks in the header": ("a ,b\n1 , 2\n", [{"a": "1 ", "b": " 2"}], ""),
    "an index": ("Unnamed: 0,a\n0,x\n1,y\n", [{"a": "x"}, {"a": "y"}], "numbers of rows that pandas writes"),
    "no index": (",a\nid7,x\n", [{"": "id7", "a": "x"}], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HABITS)
def test_habits_of_spreadsheets_are_read_and_said(name: str, put: Put) -> None:
    """Catches files of every day refused, and columns, rows and blanks that go without a word."""
    content, rows, remark = HABITS[name]
    found, said = rows_of(put("a.csv", content))
    assert found == rows
    assert len(set(said)) == bool(remark) and remark in "".join(said)


def test_text_in_a_column_without_a_name_is_not_lost(put: Put) -> None:
    """Catches a last column that is cut off although it holds something."""
    found, _ = rows_of(put("a.csv", "a,b,\n1,2,\n3,4,five\n"))
    assert found[0] == {"a": "1", "b": "2"}
    assert found[1].endswith("line 3: a field stands in a column without a name: 'five'; name the column")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_quotes_of_other_kinds_are_read_as_the_csv_module_reads_them(ending: str, put: Put) -> None:
    """Catches quotes that swallow lines or are lost, and a hint that does not name the flag that helps."""
    delimiter = {"csv": ",", "tsv": "\t"}[ending]
    plain = [["a", "b"], ['"Hello" in French', 'he said "hi"'], ['"', "5' 11\""]]
    path = put(f"plain.{ending}", "\n".join(delimiter.join(row) for row in plain) + "\n")
    assert rows_of(path, Dialect(quoting="none"))[0] == [{"a": a, "b": b} for a, b in plain[1:]]
    assert "line 2: a quote ends inside of a field" in read(path)[1] and "give --quoting none" in read(path)[1]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL, doublequote=False, escapechar="\\")
    rows = [["a", "b"], ['He said "hi", then left', "C:\\temp"], ["two\nlines", ""]]
    writer.writerows(rows)
    path = put(f"escaped.{ending}", out.getvalue())
    found, said = rows_of(path, Dialect(escape="\\"))
    assert found == [{"a": a, "b": b} for a, b in rows[1:]] and not any("is read as" in remark for remark in said)
    assert "give --escape '\\'" in read(path)[1]


def test_what_an_escape_takes_away_is_said(put: Put) -> None:
    """Catches a path that loses its backslashes in silence."""
    found, said = rows_of(put("a.csv", 'a,b\n"C:\\new","\\"x\\""\n'), Dialect(escape="\\"))
    assert found == [{"a": "C:new", "b": '"x"'}] and "line 2: '\\\\n' is read as 'n'" in said[0]


def test_lines_that_quotes_hold_together_are_said_of_tsv(put: Put) -> None:
    """Catches rows that become one, where quotes in TSV are text."""
    found, said = rows_of(put("a.tsv", 'a\tb\n"To be\tx\nor not"\ty\n'))
    assert found == [{"a": "To be\tx\nor not", "b": "y"}] and "as in lines 2 to 3" in said[0]


def test_the_index_that_pandas_writes_is_no_mistake(put: Put) -> None:
    """Catches refusing the commonest CSV there is: its first column has no name."""
    assert values(put("a.csv", ",a\n0,x\n")) == [{"a": "x"}]
    assert values(put("b.csv", "text\nx\n\ny\n")) == [{"text": "x"}, {"text": "y"}]
