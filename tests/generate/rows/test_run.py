"""Runs: the same bytes however they are interrupted, budgets, and an end where everything is rejected."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from scripted_teacher import WINDOW, Make, ScriptedTeacher, echo, made, said
from scripted_teacher import recipe as recipe  # a fixture

from lit_llama.errors import DataError, IntegrityError, LockedError, UserError
from lit_llama.generate.rows.journal import open_journal
from lit_llama.generate.rows.make import make_rows
from lit_llama.generate.rows.run import Limits
from lit_llama.generate.rows.teacher import Ask, Key, Reply
from lit_llama.text.read.reading import read_conversations


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


def test_few_rows_begin_few_attempts(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for three rows that pays for a whole window, or one whose rows are others where fewer go side by side."""
    asked, mine = [], recipe()
    for least in (WINDOW, 1):
        monkeypatch.setattr("lit_llama.generate.rows.run.LEAST", least)
        teacher = ScriptedTeacher(echo, least)
        make_rows(mine, teacher, tmp_path / str(least), limits=Limits(rows=3))
        asked.append(len({number for number, _ in teacher.asked}))
    assert made(tmp_path / "1") == made(tmp_path / str(WINDOW))
    assert 3 <= asked[1] < WINDOW <= asked[0]


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


def test_a_limit_of_tokens_is_never_exceeded(recipe: Make, tmp_path: Path) -> None:
    """Whatever the limit, no more comes from the teacher, the rows are the first of a longer run, and that goes on."""
    columns = [
        {"name": "task", "prompt": "{{ seeds[0].instruction }}", "sampling": {"max_new_tokens": 20}},
        {"name": "answer", "prompt": "{{ task }}", "sampling": {"max_new_tokens": 4, "n": 2}},
        {"name": "first", "expression": "answer[0]"},
    ]
    output = {"alpaca": {"instruction": "{{ task }}", "output": "{{ first }}"}}
    mine, came = recipe(columns=columns, output=output, filters={"rouge": None, "near_duplicates": False}), [0]

    def answer(key: Key, ask: Ask) -> Reply:
        number, column = key
        found = (
            said(f"r{number} a", f"r{number} b c") if column == "answer" else said(f"w{number} " * (number % 20 + 1))
        )
        assert found.tokens <= ask.sampling.max_new_tokens * ask.sampling.n
        came[0] += found.tokens
        return found

    make_rows(mine, ScriptedTeacher(answer), tmp_path / "whole", limits=Limits(rows=30))
    for limit in (1, 19, 20, 33, 150, 151, 160, 400):
        came[0], out = 0, tmp_path / str(limit)
        for order in range(2):  # the second one finds that nothing more can be asked
            tally = make_rows(mine, ScriptedTeacher(answer, order), out, limits=Limits(rows=30, tokens=limit))
            assert tally.tokens <= came[0] <= limit and came[0] + 20 + 20 > min(limit, 400)
        assert (tmp_path / "whole/rows.jsonl").read_bytes().startswith((out / "rows.jsonl").read_bytes())
        make_rows(mine, ScriptedTeacher(answer, 5), out, limits=Limits(rows=30))
        assert made(out) == made(tmp_path / "whole")


def test_budgets(recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=500, tokens=600))
    assert 50 <= tally.tokens <= 600
    said = capsys.readouterr().err
    assert "stopped at the limit of tokens: " in said and " are left, the next answer may take 512; " in said
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
    (out / "state.json").write_bytes(b"{broken\n")
    with pytest.raises(IntegrityError, match=r"state.json is not JSON.*name another folder"):
        make_rows(recipe(), ScriptedTeacher(echo), out, limits=limits)


@pytest.mark.parametrize("file", ["rows.jsonl", "rejected.jsonl"])
@pytest.mark.parametrize(
    "damage", [b"{broken", b"[1]", b"{}", b'{"attempt": "x"}', b'{"metadata": {"attempt": -1}}', b"\xff", b"again"]
)
def test_damaged_rows_are_set_aside_and_made_again(recipe: Make, tmp_path: Path, file: str, damage: bytes) -> None:
    """Catches a command that fails for ever over a line, rows that are lost in silence, and rows that come twice."""
    out, limits = tmp_path / "out", Limits(rows=4)
    make_rows(recipe(), ScriptedTeacher(echo), out, limits=limits)
    whole, path = (out / "rows.jsonl").read_bytes(), out / file
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1:2] = lines[:1] if damage == b"again" and lines else [damage + b"\n"]
    path.write_bytes(b"".join(lines))
    make_rows(recipe(), ScriptedTeacher(echo), out, limits=limits)
    assert (out / f"{file}.damaged").read_bytes() == b"".join(lines)
    assert (out / "rows.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "damage", [b"{broken", b"\xff", b"3", b'{"attempt": 9}', b'{"attempt": 9, "column": "x", "reply": {"y": 1}}']
)
def test_damaged_answers_are_set_aside(recipe: Make, tmp_path: Path, damage: bytes) -> None:
    """Catches a traceback each time that the command is run, because of answers that can be asked for again."""
    out = tmp_path / "out"
    make_rows(recipe(), ScriptedTeacher(echo), out, limits=Limits(rows=2))
    rows = (out / "rows.jsonl").read_bytes()
    (out / ".answers.jsonl").write_bytes(damage + b"\n")
    make_rows(recipe(), ScriptedTeacher(echo), out, limits=Limits(rows=3))
    assert (out / ".answers.jsonl.damaged").read_bytes() == damage + b"\n"
    assert (out / "rows.jsonl").read_bytes().startswith(rows) and not (out / ".answers.jsonl").exists()


def test_words_of_seeds_are_no_templates(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = "{{ 7 * 7 }}{% for i in range(10**9) %}x{% endfor %}{{ ''.__class__ }}"
    monkeypatch.setattr("scripted_teacher.SEEDS", [{"instruction": attack, "output": "y"}])
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
    changes["columns"] = [{"name": "task", "template": "{{ seeds[0].title }}"}, {"name": "answer", "template": "x"}]
    with pytest.raises(DataError, match=r"0 of 5 were accepted; rejected by: template 5"):
        make_rows(recipe(**changes), ScriptedTeacher(echo), tmp_path / "none", limits=Limits(rows=99))
    assert "title" in lines(tmp_path / "none/rejected.jsonl")[0]["reason"]


def test_a_judge_scores_rows_and_rejects_those_below(recipe: Make, tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(key: Key, ask: Ask) -> str:
        if key[1] != "judge":
            return echo(key, ask)  # type: ignore[return-value]
        seen.append(ask.messages[-1]["content"])
        return json.dumps({"reason": "so", "score": 8 if key[0] % 2 else 7})

    make_rows(recipe(judge={"at_least": 8}), ScriptedTeacher(answer), tmp_path / "out", limits=Limits(rows=10))
    rows, rejected = lines(tmp_path / "out/rows.jsonl"), lines(tmp_path / "out/rejected.jsonl")
    assert len(rows) == 10 and all(row["metadata"]["attempt"] % 2 for row in rows)
    judged = [line for line in rejected if line["filter"] == "judged"]
    assert judged and all(line["attempt"] % 2 == 0 for line in judged)
    assert judged[0]["reason"] == "judge.score >= 8 is false" and judged[0]["columns"]["judge"]["reason"] == "so"
    told = f"Task:\n{rows[0]['instruction']}\n\nAnswer:\n{rows[0]['output']}\n\nHow correct, complete and to the point"
    assert any(words.startswith(told) for words in seen)


def test_a_judge_of_pairs_has_to_prefer_the_chosen_answer_in_both_orders(recipe: Make, tmp_path: Path) -> None:
    """Catches a judge that always says A, and one that prefers the rejected answer."""
    texts = {"prompt": "{{ seeds[0].instruction }}", "chosen": "good {{ task }}", "rejected": "bad {{ task }}"}
    changes: dict[str, Any] = {"columns": [{"name": "task", "prompt": "x"}], "output": {"preference": texts}}
    changes |= {"judge": {"criterion": "polite"}, "filters": {"rouge": None, "near_duplicates": False}}

    def answer(key: Key, ask: Ask) -> str:
        if key[1] == "task":
            return f"n{key[0]}"
        first = ask.messages[-1]["content"].split("Answer A:\n")[1].startswith("good")
        assert "Which answer is more polite?" in ask.messages[-1]["content"]
        better = {0: first, 1: True, 2: not first}[key[0] % 3]
        return json.dumps({"better": "A" if better else "B"})

    make_rows(recipe(**changes), ScriptedTeacher(answer), tmp_path / "out", limits=Limits(rows=5))
    assert [row["metadata"]["attempt"] for row in lines(tmp_path / "out/rows.jsonl")] == [0, 3, 6, 9, 12]
    assert {line["filter"] for line in lines(tmp_path / "out/rejected.jsonl")} == {"judged"}
