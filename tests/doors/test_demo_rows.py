"""Tests of the demo's generated instruction rows."""

import importlib.util
import json
import os
import re
import string
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROWS_PATH = Path(__file__).parents[2] / "demo" / "rows.py"
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
Row = dict[str, str]


def load_demo_rows() -> ModuleType:
    """Imports the script, whose folder is no package."""
    spec = importlib.util.spec_from_file_location("demo_rows", ROWS_PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


demo_rows = load_demo_rows()


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    generated: list[Row] = demo_rows.generate_rows(6000, seed=42)
    return generated


def named_fields(row: Row) -> list[str]:
    match = re.fullmatch(r"Extract the .+ as JSON: (.+)\.", row["instruction"])
    assert match is not None, row["instruction"]
    return match[1].split(", ")


def written_numbers(sentence: str) -> set[float]:
    words = re.findall(r"(?<![\w.])\d+(?:\.\d\d)?(?!\w)|[a-z]+", sentence)
    return {float(NUMBERS.get(word, word)) for word in words if word in NUMBERS or word[0].isdigit()}


def stands_in(value: str, sentence: str) -> bool:
    """Whether the sentence holds the value as whole words."""
    before, found, after = f" {sentence} ".partition(value)
    return bool(found) and not before[-1].isalnum() and not after[0].isalnum()


def test_a_seed_gives_the_same_rows() -> None:
    assert demo_rows.generate_rows(300, seed=7) == demo_rows.generate_rows(300, seed=7)


def test_fewer_rows_are_the_beginning_of_more_rows() -> None:
    assert demo_rows.generate_rows(50, seed=7) == demo_rows.generate_rows(300, seed=7)[:50]


def test_another_seed_gives_other_rows() -> None:
    assert demo_rows.generate_rows(300, seed=7) != demo_rows.generate_rows(300, seed=8)


def test_rows_do_not_depend_on_the_order_of_hashes() -> None:
    code = "import runpy, sys; print(ascii(runpy.run_path(sys.argv[1])['generate_rows'](50, 7)))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code, str(ROWS_PATH)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(printed) == 1


def test_sentences_are_distinct(rows: list[Row]) -> None:
    assert len(rows) == 6000
    assert len({row["input"] for row in rows}) == 6000


def test_rows_have_the_alpaca_fields(rows: list[Row]) -> None:
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)


def test_families_are_mixed(rows: list[Row]) -> None:
    families = {row["instruction"] for row in rows}
    assert len(families) >= 10
    assert {row["instruction"] for row in rows[:200]} == families


@pytest.mark.parametrize("family", demo_rows.FAMILIES, ids=lambda family: family.name)
def test_every_wording_names_every_field_once(family: Any) -> None:
    assert len(set(family.wordings)) == len(family.wordings) >= 6
    assert 3 <= len(family.fields) <= 4
    for wording in family.wordings:
        used = [field for _, field, _, _ in string.Formatter().parse(wording) if field is not None]
        assert sorted(used) == sorted(family.fields), wording


@pytest.mark.parametrize("family", demo_rows.FAMILIES, ids=lambda family: family.name)
def test_values_of_a_field_are_distinct(family: Any) -> None:
    for field, pool in family.fields.items():
        assert len({value.written for value in pool}) == len(pool), field


def test_answers_hold_the_named_fields_in_order(rows: list[Row]) -> None:
    for row in rows:
        assert list(json.loads(row["output"])) == named_fields(row)


def test_text_values_stand_in_the_sentence(rows: list[Row]) -> None:
    for row in rows:
        for value in json.loads(row["output"]).values():
            if isinstance(value, str):
                assert stands_in(value, row["input"]), row


def test_numbers_can_be_read_off_the_sentence(rows: list[Row]) -> None:
    for row in rows:
        for value in json.loads(row["output"]).values():
            if not isinstance(value, str):
                assert value in written_numbers(row["input"]), row


def test_number_words_and_both_ways_of_writing_money_occur(rows: list[Row]) -> None:
    sentences = " ".join(row["input"] for row in rows)
    assert all(f" {word} " in sentences for word in NUMBERS)
    assert re.search(r"\$\d+\.\d\d", sentences)
    assert re.search(r"\$\d+[^\d.]", sentences)
    assert re.search(r"\d dollars", sentences)


def test_cents_are_quarters(rows: list[Row]) -> None:
    cents = {match[1] for row in rows for match in re.finditer(r"\$\d+\.(\d*)\b", row["input"]) if match[1]}
    assert cents == {"25", "50", "75"}


def test_sentences_start_like_sentences(rows: list[Row]) -> None:
    assert all(re.match(r"[^\W\d_]|\d", row["input"]) and not row["input"][0].islower() for row in rows)


def test_answers_keep_accents(rows: list[Row]) -> None:
    assert any("Müller" in row["output"] for row in rows)
    assert not any("\\u" in row["output"] for row in rows)


def test_rows_are_short(rows: list[Row]) -> None:
    sizes = [sum(map(len, row.values())) for row in rows]
    assert sum(sizes) / len(sizes) <= 270
    assert max(sizes) <= 360
    assert all(len(row["instruction"].split()) <= 16 for row in rows)
    assert all(len(row["input"].split()) <= 28 for row in rows)
    assert not any(re.search(r"\d{5}", row["input"]) for row in rows)


def test_held_out_rows_show_unseen_values(rows: list[Row]) -> None:
    train, held_out = rows[:700], rows[700:900]
    seen = {value for row in train for value in json.loads(row["output"]).values()}
    novel = [row for row in held_out if any(value not in seen for value in json.loads(row["output"]).values())]
    assert len(novel) >= 0.9 * len(held_out)
    assert not {row["output"] for row in train} & {row["output"] for row in held_out}


@pytest.mark.parametrize("count", [-1, 10**15])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=str(count)):
        demo_rows.generate_rows(count, seed=42)


def test_a_family_gives_all_its_sentences_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = demo_rows.Family("day", {"number": demo_rows.digits(range(3))}, ("Day {number}.", "{number} days."))
    monkeypatch.setattr(demo_rows, "FAMILIES", (tiny,))
    assert len(demo_rows.generate_rows(6, seed=42)) == 6
    with pytest.raises(ValueError, match="7"):
        demo_rows.generate_rows(7, seed=42)


def test_main_writes_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination_path = tmp_path / "new" / "demo.json"
    demo_rows.main(destination_path, count=20, seed=3)
    text = destination_path.read_text(encoding="utf-8")
    assert json.loads(text) == demo_rows.generate_rows(20, seed=3)
    assert list(destination_path.parent.iterdir()) == [destination_path]
    output = capsys.readouterr()
    assert output.out == ""
    assert str(destination_path) in output.err
