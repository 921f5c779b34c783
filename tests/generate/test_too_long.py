"""Prompts and answers that are longer than the model reads: refused, or cut where that is asked for, and said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lit_llama.errors import DataError, UserError
from lit_llama.generate.answer import answer_one, answer_rows, continue_text, question_ids, raw_ids
from lit_llama.generate.chat.session import Answer, message
from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.llm import LLM, load
from lit_llama.generate.questions import fitted_messages, fitted_text, room
from lit_llama.text.message import Conversation, instruct
from lit_llama.text.prompts.encode import named_style, prompt_ids

LONG = "many more words " * 6


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    """Never stops by itself, and reads 256 tokens."""
    loaded = load(tiny_folder, precision="32-true")
    return replace(loaded, stop_ids=frozenset(), style=named_style("chatml"))


def turns(count: int, system: bool = True) -> tuple[dict[str, str], ...]:
    head = [{"role": "system", "content": "Be brief"}] if system else []
    middle = [
        message
        for number in range(count)
        for message in (
            {"role": "user", "content": f"{number} {LONG}"},
            {"role": "assistant", "content": f"answer {number}"},
        )
    ]
    return (*head, *middle, {"role": "user", "content": "and now?"})


@pytest.mark.parametrize("system", [True, False])
def test_the_oldest_turns_leave_and_the_system_message_stays(llm: LLM, system: bool) -> None:
    messages = turns(8, system)
    fitted = fitted_messages(llm, messages, 200, "drop_oldest")
    left = messages[: int(system)] + messages[int(system) + 2 * fitted.dropped :]
    assert tuple(fitted.messages) == left and fitted.dropped > 0
    assert fitted.ids == prompt_ids(llm.tokenizer, llm.require_style(), left)
    more = messages[: int(system)] + messages[int(system) + 2 * (fitted.dropped - 1) :]
    assert len(fitted.ids) <= 200 < len(prompt_ids(llm.tokenizer, llm.require_style(), more)), "no more than needed"
    kept = llm.tokenizer.decode(fitted.ids[: fitted.keep])
    assert kept.endswith("user\n") and ("Be brief" in kept) == system
    assert fitted_messages(llm, messages, 200, "error").ids == prompt_ids(llm.tokenizer, llm.require_style(), messages)


def test_a_turn_leaves_with_all_that_answers_it(llm: LLM) -> None:
    """Catches an answer of a tool that is left without its call."""
    called = [{"role": "assistant", "content": LONG}, {"role": "assistant", "content": "done"}]
    messages = [{"role": "user", "content": LONG}, *called, {"role": "user", "content": "and now?"}]
    fitted = fitted_messages(llm, messages, 60, "drop_oldest")
    assert list(fitted.messages) == messages[-1:] and fitted.dropped == 1


def test_a_text_loses_its_oldest_tokens_aloud(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    text, sampling = "0123456789 " * 60, Sampling(max_new_tokens=20)
    ids = raw_ids(llm, text, False)
    fitted = fitted_text(llm, ids, room(llm, sampling), "drop_oldest")
    assert len(fitted.ids) == 256 - 20 and fitted.dropped == len(ids) - len(fitted.ids)
    assert fitted.ids[fitted.keep :] == ids[-236 + fitted.keep :] and fitted.ids[: fitted.keep] == ids[: fitted.keep]
    with pytest.raises(UserError, match=r"more than the 256 the model reads"):
        continue_text(llm, text, sampling)
    assert capsys.readouterr().out == ""
    continue_text(llm, text, sampling, overflow="drop_oldest")
    captured = capsys.readouterr()
    assert f"its {fitted.dropped} oldest tokens are left out" in captured.err and captured.out


def test_an_answer_longer_than_the_context_is_refused_or_slides_aloud(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = Sampling(max_new_tokens=300)
    with pytest.raises(UserError, match=r"more than the 256 the model reads"):
        answer_one(llm, instruct("Say hi"), sampling)
    answer_one(llm, instruct("Say hi"), sampling, "Be brief", "drop_oldest")
    said = capsys.readouterr().err
    keep = fitted_messages(llm, turns(0), 256, "drop_oldest").keep
    prompt = len(question_ids(llm, instruct("Say hi"), "Be brief"))
    assert "300 tokens in" in said
    half = (256 - keep) - (256 - keep) // 2
    assert f"the oldest {half * -(-(prompt + 300 - 256) // half)} tokens were left out on the way" in said


def test_rows_that_are_too_long_are_counted(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Conversation(turns(8), 0), instruct("Say hi", "", "", 1), Conversation(turns(9), 2)]
    with pytest.raises(DataError, match="row 0: the prompt has"):
        answer_rows(llm, rows, Sampling(max_new_tokens=20))
    dropped = [fitted_messages(llm, row.prompt, 236, "drop_oldest").dropped for row in (rows[0], rows[2])]
    answer_rows(llm, rows, Sampling(max_new_tokens=20), output_file=tmp_path / "out.jsonl", overflow="drop_oldest")
    said = capsys.readouterr().err
    assert f"2 of 3 prompts are too long: {sum(dropped)} oldest turns are left out" in said
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(line["answer"] for line in lines) and len(lines[0]["messages"]) == len(rows[0].prompt)
    answer_rows(llm, rows[1:2], Sampling(max_new_tokens=300), overflow="drop_oldest")
    assert "1 answers became too long for the model and went on without" in capsys.readouterr().err


def test_a_chat_refuses_where_nothing_is_to_be_left_out(llm: LLM) -> None:
    store, said = Store(None), turns(8)[:-1]
    id = store.create("long", [message(n + 1, n, m["role"], m["content"], 0.0) for n, m in enumerate(said)])
    before = store.get(id)
    with pytest.raises(UserError, match=r"the conversation would have .* but only 236 fit"):
        Answer(store, id, llm, Sampling(max_new_tokens=20), text="and now?", parent=len(said), overflow="error")
    assert store.get(id) is before
