"""Answers that go to a file: whole or not at all, and kept where a run is stopped."""

import json
from typing import Any

import pytest
from test_answer import Rows, questions, run_file
from test_answer import llm as llm  # a fixture

from lit_llama.errors import UserError
from lit_llama.generate import answer as module
from lit_llama.generate.answer import Answer
from lit_llama.generate.llm import LLM
from lit_llama.generate.store import RowStore


def test_an_output_file_is_written_whole(llm: LLM, alpaca_rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows missing from the file, or repeated on stdout."""
    folder = alpaca_rows([{"instruction": "Say é"}, {"instruction": "b"}])
    output = folder / "new" / "answers.jsonl"
    run_file(llm, folder / "rows.json", output_file=output)
    assert capsys.readouterr().out == ""
    assert [json.loads(line)["instruction"] for line in output.read_text("utf-8").splitlines()] == ["Say é", "b"]
    assert [path.name for path in output.parent.iterdir()] == ["answers.jsonl"]


def test_a_failure_leaves_the_old_output_file(llm: LLM, alpaca_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old answers lost to a run that fails, or half a file in their place."""
    folder = alpaca_rows([{"instruction": "a"}, {"instruction": "b"}])
    output = folder / "answers.jsonl"
    output.write_text("old\n")

    class Unwritable:
        text, stopped, tokens, finish_reason, error = object(), True, 1, "stop", None

    answers = [Answer("fine", True, 1), Unwritable()]
    monkeypatch.setattr(module, "answer_all", lambda *_: answers)
    with pytest.raises(TypeError, match="not JSON serializable"):
        run_file(llm, folder / "rows.json", output_file=output)
    assert output.read_text() == "old\n"
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "rows.json"]


def test_answers_on_their_way_to_a_file_survive_a_stop(
    llm: LLM, alpaca_rows: Rows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers that are made again, that go to other rows, or that are kept although the settings are others."""
    folder = alpaca_rows([{"instruction": text} for text in ("Say é", "b", "a c", "d d d")])
    output, straight = folder / "answers.jsonl", folder / "straight.jsonl"
    add, left = RowStore.add, [2]

    def stopping(self: RowStore, row: dict[str, Any]) -> None:
        add(self, row)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(RowStore, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_file(llm, folder / "rows.json", output_file=output, identity={"weights": "x"})
    assert not output.exists()
    run_file(llm, folder / "rows.json", output_file=output, identity={"weights": "x"})
    assert left[0] == -2 and "2 of 4 rows were answered before" in capsys.readouterr().err
    run_file(llm, folder / "rows.json", output_file=straight)
    assert output.read_bytes() == straight.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "rows.json", "straight.jsonl"]
    left[0] = 1
    with pytest.raises(KeyboardInterrupt):
        run_file(llm, folder / "rows.json", output_file=output, identity={"weights": "y"})
    run_file(llm, folder / "rows.json", output_file=output, identity={"weights": "z"})
    assert "is begun anew" in capsys.readouterr().err and output.read_bytes() == straight.read_bytes()


def test_an_unusable_output_is_found_before_the_answers(
    llm: LLM, alpaca_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of answers that cannot be written."""
    folder = alpaca_rows([{"instruction": "a"}])
    monkeypatch.setattr(module, "answer_all", lambda *_: pytest.fail("answered first"))
    with pytest.raises(UserError, match="is a folder"):
        questions(input_file=folder / "rows.json", output_file=folder)
    with pytest.raises(UserError, match=r"rows\.json is a file, expected a folder"):
        run_file(llm, folder / "rows.json", output_file=folder / "rows.json" / "x.jsonl")
