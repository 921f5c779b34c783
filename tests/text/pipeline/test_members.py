"""Test rows of other data are found again, whatever style, tokenizer, limit or order prepared them."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_prepare import LONG, ROWS, Prepare
from test_prepare import prepare as prepare  # a fixture
from test_prepare import rows as rows  # a fixture

from lit_llama.errors import DataError, UserError
from lit_llama.text.dataset.folder import read_meta


def questions(folder: Path) -> list[str]:
    """The number of the first question of every test row, in the order of the rows."""
    lines = [json.loads(line) for line in (folder / "test.jsonl").open()]
    asked = [line["messages"][0]["content"] if "messages" in line else line["instruction"] for line in lines]
    return sorted(text.lower().split()[1] for text in asked)


def write(path: Path, data: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


@pytest.mark.parametrize("split", ["hash", "shuffle"])
def test_the_same_rows_are_tested_in_another_style_limit_and_order(
    split: str, prepare: Prepare, rows: Path, llama_tokenizer: Path, tmp_path: Path
) -> None:
    """Catches another draw, a folder whose rows move with the limit, and a test row that is trained by the other."""
    first = prepare(rows, folder=tmp_path / "first", split=split)
    other = write(tmp_path / "other.jsonl", [ROWS[n] for n in sorted(range(120), key=lambda n: n * 77 % 120)])
    for name, options in (
        ("style", {"prompt_style": "vicuna", "seed": 9}),
        ("tokenizer", {"tokenizer_path": llama_tokenizer, "prompt_style": "alpaca", "max_seq_length": 600}),
    ):
        made = prepare(other, folder=tmp_path / name, split_from=tmp_path / "first", **options)
        assert questions(tmp_path / name) == questions(tmp_path / "first")
        wanted = {"path": str(tmp_path / "first"), "questions": len(questions(tmp_path / "first"))}
        assert wanted.items() <= made["split_from"].items() and made["split"] == "from"
        assert made["split_from"]["rows"] == made["split_from"]["questions"] == first["splits"]["test"]["rows"]
        assert sum(counts["rows"] for counts in made["splits"].values()) == made["kept"]
    again = prepare(rows, folder=tmp_path / "again", split_from=tmp_path / "style")
    assert again["splits"]["test"]["rows"] == first["splits"]["test"]["rows"], "from one to the next"


@pytest.mark.parametrize("overflow", ["split", "truncate_prompt"])
def test_rows_that_were_cut_are_known_by_what_they_opened_with(overflow: str, prepare: Prepare, tmp_path: Path) -> None:
    """Catches the beginning of a part taken for that of its chat, which would be trained in the other folder."""
    chats = []
    for n in range(40):
        turns = [("user", f"Chat {n}, turn {i}? {LONG[:40]}") if i % 2 == 0 else ("assistant", "yes") for i in range(8)]
        chats.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path = write(tmp_path / "chats.jsonl", chats)
    short = prepare(path, folder=tmp_path / "short", overflow=overflow, max_seq_length=130, split="shuffle")
    assert short["in_parts"] or short["cut"]["rows"]
    long = prepare(path, folder=tmp_path / "long", max_seq_length=2000, split_from=tmp_path / "short")
    assert long["splits"]["test"]["rows"] == 8 == len(questions(tmp_path / "long"))
    back = prepare(path, folder=tmp_path / "back", overflow=overflow, max_seq_length=130, split_from=tmp_path / "long")
    assert back["splits"] == short["splits"] or {**back["splits"], "train": 0} == {**short["splits"], "train": 0}


def test_files_say_it_too_and_twins_go_with_their_question(
    prepare: Prepare, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a file that is only believed if it is ours, a twin on the other side, and rows dropped in silence."""
    held = write(tmp_path / "held.jsonl", [{"prompt": f"question   {n}", "completion": "?"} for n in (0, 6, 7)])
    twins = write(tmp_path / "twins.jsonl", [*ROWS, {"instruction": "QUESTION 7", "output": "twin"}])
    meta = prepare(twins, split_from=held)
    assert questions(tmp_path / "data") == ["0", "7", "7"]
    assert meta["split_from"] == {"path": str(held), "questions": 3, "rows": 4, "dropped": 1}
    assert f"split as in {held}: 4 rows ask its 3 test questions, 1 of them dropped" in capsys.readouterr().err


def test_what_matches_no_row_is_an_error(prepare: Prepare, rows: Path, tmp_path: Path) -> None:
    """Catches a comparison on other rows than were asked for, and an option that is overruled in silence."""
    prepare(rows, folder=tmp_path / "first")
    fewer = write(tmp_path / "fewer.jsonl", ROWS[:60])
    with pytest.raises(DataError, match=r"--split_from .*first: \d+ of its \d+ test questions are in no row of the so"):
        prepare(fewer, split_from=tmp_path / "first")
    assert not (tmp_path / "data").exists()
    held = write(tmp_path / "held.jsonl", [{"instruction": "Who?", "output": "I."}, ROWS[0]])
    with pytest.raises(DataError, match=r"1 of its 2 test questions are in no row .*\(.*held.jsonl:line 1\)"):
        prepare(rows, split_from=held)
    with pytest.raises(UserError, match=r"--split_from says which rows are for testing: leave out --split shuffle"):
        prepare(rows, split_from=held, split="shuffle")
    with pytest.raises(DataError, match=r"none.jsonl does not exist"):
        prepare(rows, split_from=tmp_path / "none.jsonl")
    keys = tmp_path / "first" / "test_keys.txt"
    keys.rename(tmp_path / "keys")
    (keys.parent / "SHA256SUMS").unlink()
    with pytest.raises(DataError, match=r"lacks test_keys.txt: prepare it again, or name its test.jsonl"):
        prepare(rows, split_from=tmp_path / "first")
    (tmp_path / "keys").rename(keys)
    (tmp_path / "first" / "meta.json").unlink()
    with pytest.raises(DataError, match=r"is no finished data folder"):
        prepare(rows, split_from=tmp_path / "first")


def test_another_test_set_makes_the_folder_anew(prepare: Prepare, rows: Path, tmp_path: Path) -> None:
    """Catches a folder that keeps yesterday's test rows."""
    held = write(tmp_path / "held.jsonl", [{"prompt": "Question 0", "completion": "?"}])
    prepare(rows, split_from=held)
    key = read_meta(tmp_path / "data")["key"]
    assert prepare(rows, split_from=held)["key"] == key
    write(held, [{"prompt": "Question 1", "completion": "?"}])
    assert prepare(rows, split_from=held)["key"] != key and questions(tmp_path / "data") == ["1"]
