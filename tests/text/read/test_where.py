"""Conditions on fields: which rows they keep, and what they refuse to be."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from raw_rows import Put

from lit_llama.errors import DataError, UserError
from lit_llama.text.config import PrepareConfig
from lit_llama.text.message import Conversation, Dropped
from lit_llama.text.pipeline.records import prepare_records
from lit_llama.text.read.raw import parse
from lit_llama.text.read.reading import read_conversations

SCORES = [5, 4, 3.5, "4.5", None, -1, "", 4.0]
LANGS = ["en", "de"]
ROWS = [
    {"instruction": f"q{n}", "output": "a", "score": score, "lang": LANGS[n % 2], "ok": n % 3 == 0, "meta": {"n": n}}
    for n, score in enumerate(SCORES)
]


def number(value: Any) -> float:
    """A score as a number; missing ones are less and more than nothing."""
    return float("nan") if value in (None, "") else float(value)


KEPT: dict[str, Any] = {
    "score >= 4": lambda row: number(row["score"]) >= 4,
    "4 <= score": lambda row: number(row["score"]) >= 4,
    "score < 4.5": lambda row: number(row["score"]) < 4.5,
    "-1 == score": lambda row: number(row["score"]) == -1,
    "score != 4": lambda row: number(row["score"]) == number(row["score"]) != 4,
    "lang == 'en'": lambda row: row["lang"] == "en",
    'lang > "dz"': lambda row: row["lang"] == "en",
    "ok == true": lambda row: row["ok"],
    "ok != True": lambda row: not row["ok"],
    "false == ok": lambda row: not row["ok"],
    "meta.n >= 3 and meta.n < 6": lambda row: 3 <= row["meta"]["n"] < 6,
    'row["score"] > 4': lambda row: number(row["score"]) > 4,
    "score > 3 and lang == 'en' and ok == true": lambda row: (
        number(row["score"]) > 3 and row["lang"] == "en" and row["ok"]
    ),
}


@pytest.mark.parametrize("where", KEPT)
def test_rows_are_kept_by_the_condition_and_the_others_counted_as_a_choice(where: str, put: Put) -> None:
    """Catches a comparison that is turned round, a text compared with a number, and a null that is kept."""
    path = put("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    found = list(read_conversations([str(path)], where=where))
    kept = [one.row for one in found if isinstance(one, Conversation)]
    assert kept == [n for n, row in enumerate(ROWS) if KEPT[where](row)] and 0 < len(kept) < len(ROWS)
    others = [one for one in found if isinstance(one, Dropped)]
    assert len(kept) + len(others) == len(ROWS)
    assert all(one.by_choice and one.reason == f"not asked for by --where {shlex.quote(where)}" for one in others)


def test_texts_of_csv_are_compared_as_what_they_spell(put: Put) -> None:
    """Catches "10" that is less than "9", and true that is no word of CSV."""
    rows = "instruction,output,Score,ok\nq,a,10,true\nq,a,9,TRUE\nq,a,,true\nq,a,11,false\n"
    path = put("rows.csv", rows)
    found = read_conversations([str(path)], where="Score > 9.5 and ok == true")
    assert [type(one) for one in found] == [Conversation, Dropped, Dropped, Dropped]


def test_fields_have_their_names_in_the_data(put: Put) -> None:
    """Catches a condition on a field that --fields or --ignore_fields take away before."""
    path = put("rows.jsonl", "".join(json.dumps({"q": f"{n}", "a": "x", "context": n}) + "\n" for n in range(4)))
    found = read_conversations(
        [str(path)],
        fields={"instruction": "q", "output": "a"},
        ignore_fields=["context"],
        where="context > 1 and q != '3'",
    )
    assert [one.row for one in found if isinstance(one, Conversation)] == [2]


def test_a_field_that_no_row_has_is_an_error(put: Put) -> None:
    """Catches a misspelled field that drops every row in silence."""
    path = put("rows.jsonl", json.dumps(ROWS[0]))
    with pytest.raises(
        DataError, match=r"--where 'scroe > 1': no row has a field scroe, but instruction, output, score"
    ):
        list(read_conversations([str(path)], where="scroe > 1"))


def test_a_nested_field_that_no_row_has_is_an_error(put: Put) -> None:
    """Catches score.x, where score is a number or holds y, that drops every row as not asked for."""
    path = put("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    for where, said in (
        ("score.x > 1", "no row has a field score.x, but instruction, output, score"),
        ("meta.m > 1", "no row has a field meta.m, but .*meta, meta.n$"),
        ("meta.n.deep > 1", "no row has a field meta.n.deep, but .*meta, meta.n$"),
        ("lang == 'en' and row['meta']['m'] == 1", "no row has a field meta.m"),
        ("lang == 'fr' and row['meta']['m'] == 1", "no row has a field meta.m"),
    ):
        with pytest.raises(DataError, match=said):
            list(read_conversations([str(path)], where=where))
    sparse = [{"instruction": "q", "output": "a", "meta": None}, {"instruction": "q", "output": "a", "meta": {"n": 2}}]
    path = put("sparse.jsonl", "".join(json.dumps(row) + "\n" for row in sparse))
    found = read_conversations([str(path)], where="meta.n > 1")
    assert [type(one) for one in found] == [Dropped, Conversation]


def test_what_cannot_be_compared_stops_or_is_counted(put: Put) -> None:
    """Catches an order between a word and a number."""
    path = put("rows.jsonl", "".join(json.dumps(row) + "\n" for row in [ROWS[0] | {"score": "high"}, ROWS[1]]))
    with pytest.raises(DataError, match=r"line 1: field score is text; --where compares it with the number 4"):
        list(read_conversations([str(path)], where="score >= 4"))
    dropped, kept = read_conversations([str(path)], where="score >= 4", on_error="skip")
    assert isinstance(dropped, Dropped) and not dropped.by_choice and isinstance(kept, Conversation)


def test_the_rows_for_testing_may_be_without_the_field(put: Put, tmp_path: Path, tiny_folder: Path) -> None:
    """Catches a file of rows for testing that is refused since it has only what a row asks."""
    rows = [{"instruction": f"q{n}", "output": "a", "score": n} for n in range(9)]
    source = put("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    held = put("held.jsonl", json.dumps({"instruction": "q7", "output": "a"}))
    config = PrepareConfig(
        source=str(source),
        destination_path=tmp_path / "data",
        tokenizer_path=tiny_folder,
        prompt_style="chatml",
        where="score > 4",
        split_from=held,
    )
    meta = prepare_records(config)
    assert {name: counts["rows"] for name, counts in meta["splits"].items()} == {"train": 3, "test": 1}
    assert meta["dropped_by_choice"] == 5 and meta["made_of"]["--where"] == "score > 4"


WRONG = {
    "": "it cannot be read",
    "score": "'score' is no comparison",
    "score = 4": "it cannot be read; write == for equal",
    "score > 4 && ok == true": "write and in place of it",
    "score > 4 or ok == true": "is no comparison",
    "not ok == true": "is no comparison",
    "1 < score < 4": "has several comparisons in one",
    "lang in 'en'": "has none of the signs",
    "score > other": "does not compare a field with a value",
    "4 > 3": "does not compare a field with a value",
    "len(lang) > 3": "does not compare a field with a value",
    "__import__('os').system('x') == 1": "does not compare a field with a value",
    "ok > true": "asks which of true and false is larger",
    "score > 4 +": "it cannot be read",
    "score > 1" + " and score > 1" * 500: "characters, expected at most 2000",
    "(" * 900 + "score" + ")" * 900 + " > 1": "it cannot be read",
    "lang == 'a\0'": "it cannot be read",
}


@pytest.mark.parametrize("where", WRONG)
def test_what_is_no_condition_is_refused_by_name(where: str) -> None:
    """Catches a traceback of the parser, and anything that would be run."""
    with pytest.raises(UserError) as caught:
        parse(where)
    assert WRONG[where] in str(caught.value) and "score >= 4 and lang == 'en'" in str(caught.value)
