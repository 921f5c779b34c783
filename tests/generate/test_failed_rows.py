"""Rows of a file of which one cannot be answered."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lit_llama.errors import NumericalError
from lit_llama.generate.answer import answer_all, answer_rows, question_ids
from lit_llama.generate.engine.engine import Engine
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.llm import LLM, load
from lit_llama.model.kernels.paged import PagedBatch
from lit_llama.text.message import Conversation, instruct

ROWS = [instruct(text, "", "reference", row) for row, text in enumerate(["Say hi", "a", "Zoë's naïve café"])]
SAMPLING = Sampling(max_new_tokens=10, temperature=1.0, n=2)


class Poisoned:
    """A runner whose logits after one prompt are not finite."""

    def __init__(self, inner: Any, prompt: list[int]) -> None:
        self._inner, self._prompt = inner, prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def logits(self, batch: PagedBatch) -> Tensor:
        logits: Tensor = self._inner.logits(batch)
        end = 0
        for ids, count in zip(batch.ids, batch.logits, strict=True):
            end += count
            if list(ids) == self._prompt[-len(ids) :] and len(ids) > 1:
                logits[end - count : end] = math.nan
        return logits


def poisoned(llm: LLM, row: Conversation) -> LLM:
    runner: Any = Poisoned(llm.engine.runner, question_ids(llm, row))
    return replace(llm, engine=Engine(runner, tokens=llm.tokenizer.size, config=llm.engine.config))


def test_one_row_fails_by_name_and_all_others_are_written(tmp_path: Path, tiny_folder: Path) -> None:
    llm = load(tiny_folder, precision="32-true")
    whole, path = answer_all(llm, ROWS, SAMPLING), tmp_path / "answers.jsonl"
    with pytest.raises(NumericalError, match=r"2 of 6 answers failed.* row 1: the logits at token") as raised:
        answer_rows(poisoned(llm, ROWS[1]), ROWS, SAMPLING, output_file=path)
    assert raised.value.exit_status == 70
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["finish_reason"] for line in lines[2:4]] == ["error"] * 2
    assert "not finite" in lines[2]["error"] and lines[2]["answer"] == "" and lines[2]["instruction"] == "a"
    others = [*lines[:2], *lines[4:]]
    assert [line["answer"] for line in others] == [answer.text for answer in whole[:2] + whole[4:]]
    assert not any("error" in line for line in others)


def test_failed_answers_are_measured_as_such(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = load(tiny_folder, precision="32-true")
    with pytest.raises(NumericalError):
        answer_rows(poisoned(llm, ROWS[1]), ROWS, replace(SAMPLING, n=1))
    captured = capsys.readouterr()
    assert "failed 1" in captured.err and len(captured.out.splitlines()) == 3
