"""Previews and plans show what a run would do, and write nothing."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_here
from rich.console import Console
from scripted_teacher import Make, ScriptedTeacher, echo, said
from scripted_teacher import recipe as recipe  # a fixture

from lit_llama.errors import UserError
from lit_llama.generate.rows.make import make_rows, plan, preview
from lit_llama.generate.rows.run import Limits


def test_a_preview_shows_prompts_answers_rows_and_reasons(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a preview whose rows are not those that the run then makes."""
    preview(recipe(), ScriptedTeacher(echo, 3), 9, seed=1)
    out, err = capsys.readouterr()
    shown = out.split("--- attempt ")[1:]
    assert [text.split(":")[0] for text in shown] == [str(number) for number in range(9)]
    make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=6), seed=1)
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    for row in rows:
        number = row.pop("metadata")["attempt"]
        text = shown[number]
        assert text.startswith(f"{number}: accepted\nseeds: ") and text.rstrip().endswith(json.dumps(row))
        assert "[task] user: seed number" in text and f"[answer] user: {row['instruction']}\n" in text
        assert f"[answer] answer: {row['output']}" in text
    assert "7: rejected by cut: answer did not end within max_new_tokens 512" in shown[7]
    accepted = sum(": accepted" in text for text in shown)
    assert f"{accepted} of 9 accepted, {9 - accepted} rejected: " in err and "nothing is kept" in err
    with pytest.raises(UserError, match="--preview is 0, expected 1 or more"):
        preview(recipe(), ScriptedTeacher(echo), 0, seed=1)


def test_words_of_an_answer_do_not_act_on_the_terminal(
    recipe: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    preview(recipe(), ScriptedTeacher(lambda key, ask: f"a\x1b[2J{key[0]}"), 1, seed=1)
    out = capsys.readouterr().out
    assert "[2J0" in out and "\x1b" not in out


def test_a_plan_is_what_the_run_then_takes(recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every second attempt is accepted, every prompt has as many tokens: the plan is exact."""

    def answer(key: tuple[int, str], ask: Any) -> Any:
        words = f"n{key[0]} a{key[0] ** 2} b{key[0] ** 3} c"
        return said(words, reason="length" if key[0] % 2 and key[1] == "answer" else "stop")

    found = plan(recipe(), ScriptedTeacher(answer), 40, seed=1, count=20)
    out = capsys.readouterr().out
    assert "20 attempts: 10 accepted, 10 rejected (cut 10)" in out and "40 rows: about 80 attempts, 640 tokens" in out
    tally = make_rows(recipe(), ScriptedTeacher(answer), tmp_path / "out", limits=Limits(rows=40))
    assert found["tokens"] == 640 and found["attempts"] == 80
    assert tally.decided in (79, 80) and tally.tokens == 8 * tally.decided


def test_a_plan_knows_when_sources_are_used_up(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = recipe(sources={"seeds": {"rows": str(tmp_path / "seeds.jsonl"), "order": "once", "draw": 2}})
    teacher = ScriptedTeacher(lambda key, ask: f"{key[0]} b")
    found = plan(once, teacher, 1_000_000, seed=1, count=4)
    assert (found["rows"], found["attempts"]) == (5, 5)
    assert "5 rows: about 5 attempts, with which the sources are used up" in capsys.readouterr().out
    found = plan(recipe(), ScriptedTeacher(lambda key, ask: "the same"), 10, seed=1, count=1)
    assert found["rows"] == 10
    found = plan(recipe(), ScriptedTeacher(lambda key, ask: said("", reason="length")), 10, seed=1, count=3)
    assert set(found.values()) == {None} and "look at some with --preview" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_of_one_line(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, rejections by their filter, speed; no line is longer than the terminal is wide."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=90, markup=False, highlight=False)
    monkeypatch.setattr("lit_llama.generate.rows.make.stderr", lambda: console)
    make_rows(recipe(), ScriptedTeacher(echo), tmp_path / "out", limits=Limits(rows=20))
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in lines if "100%" in line][-1]
    assert re.match(r"20 of 20 rows, \d+ rejected \(", last) and "\u2501" in last and len(last) <= 90
    assert any(re.search(r"tokens, \d+ tokens/s; all rows are there", line) for line in lines)


def test_the_door_previews_and_plans_without_a_trace(tiny_folder: Path, tmp_path: Path) -> None:
    sampling = {"temperature": 1, "min_new_tokens": 4, "max_new_tokens": 5}
    text = {
        "columns": [{"name": "n", "sample": [1, 2]}, {"name": "q", "prompt": "ask {{ n }}", "sampling": sampling}],
        "output": {"alpaca": {"instruction": "{{ n }}", "output": "{{ q }}"}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    before = sorted(tmp_path.rglob("*"))
    flags = ["--recipe", "mine.yaml", "--checkpoint_dir", tiny_folder, "--precision", "32-true"]
    done = run_here("generate/rows.py", *flags, "--preview", 3, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("--- attempt") == 3 and "[q] user: ask" in done.stdout
    done = run_here("generate/rows.py", *flags, "--plan", "true", "--preview", 3, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("3 attempts: ") and "--- attempt" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
