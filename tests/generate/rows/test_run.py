"""Runs: the same bytes however they are interrupted, budgets, and an end where everything is rejected."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted_teacher import ScriptedTeacher, said

from lit_llama.errors import DataError, IntegrityError, LockedError, UserError
from lit_llama.generate.rows.journal import open_journal
from lit_llama.generate.rows.make import make_rows
from lit_llama.generate.rows.recipe import Recipe, read_recipe
from lit_llama.generate.rows.run import Limits
from lit_llama.generate.rows.teacher import Ask, Key, Reply
from lit_llama.text.read.reading import read_conversations

Make = Callable[..., Recipe]
SEEDS = [{"instruction": f"seed number {n} of all", "output": f"answer {n}"} for n in range(9)]


WINDOW = 8


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr("lit_llama.generate.rows.run.WINDOW", WINDOW)

    def make(**changes: Any) -> Recipe:
        seeds = tmp_path / "seeds.jsonl"
        seeds.write_text("".join(json.dumps(row) + "\n" for row in SEEDS))
        text: dict[str, Any] = {
            "sources": {"seeds": {"rows": str(seeds), "draw": 3, "accepted": 1}},
            "columns": [
                {"name": "kind", "sample": ["red", "blue"]},
                {"name": "task", "prompt": "{% for s in seeds %}{{ s.instruction }};{% endfor %}{{ kind }}"},
                {"name": "answer", "prompt": "{{ task }}"},
            ],
            "output": {"alpaca": {"instruction": "{{ task }}", "output": "{{ answer }}"}},
        }
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(text | changes, sort_keys=False))
        return read_recipe(tmp_path / "mine.yaml")

    return make


def echo(key: Key, ask: Ask) -> Reply | str:
    """Every third task is one of five, so that filters have something to do; all else tells its prompt."""
    number, column = key
    words = ask.messages[-1]["content"]
    if column == "answer":
        return said("cut", reason="length") if number % 10 == 7 else f"reply {number % 2 * number} to {words}"
    return f"do this {number % 5}" if number % 3 == 0 else f"w{number} x{number * 7} y{hash_of(words)} z{number}"


def hash_of(text: str) -> int:
    return sum(ord(letter) * place for place, letter in enumerate(text))


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "state.json"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_carry_their_lineage_and_rejections_their_reason(recipe: Make, tmp_path: Path) -> None:
    tally = make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=30))
    rows, rejected = lines(tmp_path / "out/rows.jsonl"), lines(tmp_path / "out/rejected.jsonl")
    assert len(rows) == tally.accepted == 30 and len(rejected) == tally.rejected.total()
    numbers = [row["metadata"]["attempt"] for row in rows] + [line["attempt"] for line in rejected]
    assert sorted(numbers) == list(range(len(numbers)))
    meta = rows[0]["metadata"]
    assert meta["model_fingerprint"] == "scripted 1" and meta["recipe_sha256"] == recipe().digest
    assert len(meta["sources"]["seeds"]) == 3 and "seeds.jsonl:line" in meta["sources"]["seeds"][0]
    assert meta["sampling"]["task"]["temperature"] == 0.7 and meta["columns"]["task"] == rows[0]["instruction"]
    filters = {line["filter"] for line in rejected}
    assert filters == {"cut", "duplicate", "rouge"} and all(
        line["reason"] and line["prompts"]["task"] for line in rejected
    )
    used = [place for row in rows for place in row["metadata"]["sources"]["seeds"] if place.startswith("attempt")]
    assert used and all(  # only what every order of answers has by then
        int(place.split()[1]) <= row["metadata"]["attempt"] - WINDOW
        for row in rows
        for place in row["metadata"]["sources"]["seeds"]
        if place.startswith("attempt")
    )


def test_prepare_reads_the_rows_as_they_are(recipe: Make, tmp_path: Path) -> None:
    make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=10))
    reader = read_conversations([str(tmp_path / "out/rows.jsonl")])
    assert len(list(reader)) == 10 and not reader.log.unused


def test_interrupted_anywhere_the_bytes_are_the_same(recipe: Make, tmp_path: Path) -> None:
    limits = Limits(rows=25)
    make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "whole", limits=limits)
    out = tmp_path / "cut"
    for order in range(1000):
        teacher = ScriptedTeacher(echo, order, dies=5 + 13 * order % 17)
        try:
            make_rows(recipe(), teacher, out, limits=limits)
        except KeyboardInterrupt:
            if order % 3 == 0:  # as a process that dies within a line
                with (out / ("rows.jsonl" if order % 2 else ".answers.jsonl")).open("ab") as file:
                    file.write(b'{"instruction": "ha')
            continue
        break
    assert order > 3
    assert made(out) == made(tmp_path / "whole")


def test_answers_of_an_interrupted_run_are_not_asked_for_again(recipe: Make, tmp_path: Path) -> None:
    first, second = ScriptedTeacher(echo, dies=30), ScriptedTeacher(echo, 1)
    with pytest.raises(KeyboardInterrupt):
        make_rows(recipe(), first, tmp_path / "out", limits=Limits(rows=30))
    make_rows(recipe(), second, tmp_path / "out", limits=Limits(rows=30))
    whole = ScriptedTeacher(echo)
    make_rows(recipe(), whole, tmp_path / "whole", limits=Limits(rows=30))
    assert len(second.asked) < len(whole.asked)
    assert len({*first.asked, *second.asked}) == len(first.asked) + len(second.asked) - len(
        {*first.asked} & {*second.asked}
    )
    assert len({*first.asked} & {*second.asked}) <= WINDOW  # those that were open


def test_lines_that_a_power_cut_took_are_made_again(recipe: Make, tmp_path: Path) -> None:
    for name in ("out", "whole"):
        make_rows(recipe(), ScriptedTeacher(echo), tmp_path / name, limits=Limits(rows=15))
    path = tmp_path / "out/rejected.jsonl"
    os.truncate(path, path.stat().st_size // 2)
    make_rows(recipe(), ScriptedTeacher(echo, 3), tmp_path / "out", limits=Limits(rows=15))
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_budgets(recipe: Make, tmp_path: Path) -> None:
    tally = make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=500, tokens=60))
    assert 60 <= tally.tokens < 110
    again = make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=500, tokens=60))
    assert again == tally  # those of before count
    make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=500, seconds=1e-9))
    longer = make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=tally.accepted + 5))
    assert longer.accepted == tally.accepted + 5


def test_where_everything_is_rejected_the_run_ends_with_the_reasons(recipe: Make, tmp_path: Path) -> None:
    answer = lambda key, ask: "do the same thing" if key[0] % 2 else said("x", reason="length")  # noqa: E731
    for _ in range(2):  # and again at once, without a prompt
        with pytest.raises(DataError) as error:
            make_rows(recipe(give_up_after=20), ScriptedTeacher(answer), tmp_path / "out", limits=Limits(rows=9))
        assert "the last 20 attempts were all rejected" in str(error.value)
        assert "cut 11, duplicate 10" in str(error.value)
    assert (tmp_path / "out/report.html").exists()


def test_a_folder_of_something_else(recipe: Make, tmp_path: Path) -> None:
    out, limits = tmp_path / "out", Limits(rows=5)
    make_rows(recipe(), ScriptedTeacher(echo), out, limits=limits)
    with pytest.raises(UserError, match="holds rows of another seed"):
        make_rows(recipe(), ScriptedTeacher(echo), out, limits=limits, seed=2)
    with pytest.raises(UserError, match="holds rows of another recipe sha256"):
        make_rows(recipe(filters={"rouge": 0.5}), ScriptedTeacher(echo), out, limits=limits)
    with open_journal(out, {}), pytest.raises(LockedError, match="another run is at work"):
        make_rows(recipe(), ScriptedTeacher(echo), out, limits=limits)
    (out / "rows.jsonl").write_bytes(b"{broken\n")
    with pytest.raises(IntegrityError, match=r"rows.jsonl: line 1 is damaged"):
        make_rows(recipe(), ScriptedTeacher(echo), out, limits=limits)


def test_words_of_seeds_are_no_templates(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = "{{ 7 * 7 }}{% for i in range(10**9) %}x{% endfor %}{{ ''.__class__ }}"
    monkeypatch.setattr("test_run.SEEDS", [{"instruction": attack, "output": "y"}])
    seen: list[str] = []

    def answer(key: Key, ask: Ask) -> str:
        seen.append(ask.messages[-1]["content"])
        return echo(key, ask)  # type: ignore[return-value]

    make_rows(recipe(), ScriptedTeacher(answer), tmp_path / "out", limits=Limits(rows=2))
    assert attack in seen[0] and "49" not in seen[0]


def test_a_callable_that_fails_says_where_and_loses_nothing(recipe: Make, tmp_path: Path) -> None:
    check = tmp_path / "mine.py"
    check.write_text("def f(row): return 1 / (row['task'].startswith('w'))\n")
    columns = [
        {"name": "task", "prompt": "{{ seeds[0].instruction }}"},
        {"name": "right", "check": f"{check}:f"},
    ]
    changes: dict[str, Any] = {"columns": columns, "output": {"alpaca": {"instruction": "{{ task }}", "output": "y"}}}
    with pytest.raises(UserError, match=r"column right: .*mine.py:f failed at attempt \d+: ZeroDivisionError"):
        make_rows(recipe(**changes), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=20))
    check.write_text("def f(row): return 'too short' if row['task'].startswith('d') else True\n")
    make_rows(recipe(**changes), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=20))
    rejected = lines(tmp_path / "out/rejected.jsonl")
    assert {(line["filter"], line["reason"]) for line in rejected} == {("right", "too short")}


def test_sources_that_are_used_up_end_the_run(recipe: Make, tmp_path: Path) -> None:
    changes = {"sources": {"seeds": {"rows": str(tmp_path / "seeds.jsonl"), "order": "once", "draw": 2}}}
    tally = make_rows(
        recipe(**changes), ScriptedTeacher(lambda key, ask: f"a{key[0]} b"), tmp_path / "o", limits=Limits(rows=99)
    )
    assert tally.decided == 5 and not (tmp_path / "o/.answers.jsonl").exists()
