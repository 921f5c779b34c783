"""Rows with judged answers: never taken for plain answers, and read as pairs in every form that people have them in."""

import json
from pathlib import Path
from typing import Any

import pytest
from raw_rows import Put

from lit_llama.errors import DataError, UserError
from lit_llama.text.config import PrepareConfig
from lit_llama.text.message import Conversation, Dropped, Preference
from lit_llama.text.read.reading import Reader, read_conversations

USER = {"role": "user", "content": "Why?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Good.", "Bad."))
SYSTEM = {"role": "system", "content": "Be brief."}


def share(message: Any) -> dict[str, str]:
    """A message in ShareGPT's words."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"from": names[message["role"]], "value": message["content"]}


def read(put: Put, *rows: Any, **options: Any) -> tuple[list[Any], Reader]:
    """What rows come to, and the reader."""
    path = put("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    reader = read_conversations([str(path)], **options)
    return list(reader), reader


def refused(put: Put, row: Any, **options: Any) -> str:
    """Why a row stops the reading."""
    with pytest.raises(DataError) as caught:
        read(put, row, **options)
    return str(caught.value).partition("rows.jsonl:line 1: ")[2]


PAIRS: dict[str, tuple[Any, list[Any]]] = {
    "TRL, texts": ({"prompt": "Why?", "chosen": "Good.", "rejected": "Bad."}, [USER]),
    "TRL, messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
    "TRL, system": ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, USER]),
    "TRL, prompt inside": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    "TRL, turns inside": (
        {"chosen": [SYSTEM, USER, BAD, USER, GOOD], "rejected": [SYSTEM, USER, BAD, USER, BAD]},
        [SYSTEM, USER, BAD, USER],
    ),
    "UltraFeedback binarized": (
        {
            **{"prompt": "Why?", "prompt_id": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            **{"messages": [USER, GOOD], "score_chosen": 8.0, "score_rejected": 2.0},
        },
        [USER],
    ),
    "LLaMA-Factory, ShareGPT": (
        {"conversations": [share(USER)], "chosen": share(GOOD), "rejected": share(BAD)},
        [USER],
    ),
    "LLaMA-Factory, ShareGPT with turns": (
        {"conversations": [share(m) for m in (USER, BAD, USER)], "chosen": share(GOOD), "rejected": share(BAD)},
        [USER, BAD, USER],
    ),
    "LLaMA-Factory, OpenAI": ({"messages": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD}, [SYSTEM, USER]),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "Why?", "input": "", "chosen": "Good.", "rejected": "Bad."},
        [USER],
    ),
    "Alpaca with an input and a system": (
        {"system": "Be brief.", "instruction": "Why?", "input": "It.", "chosen": "Good.", "rejected": "Bad."},
        [SYSTEM, {**USER, "input": "It."}],
    ),
    "HH-RLHF": (
        {side: f"\n\nHuman: Why?\n\nAssistant: {text}" for side, text in (("chosen", "Good."), ("rejected", "Bad."))},
        [USER],
    ),
    "UltraFeedback": (
        {
            "instruction": "Why?",
            "completions": [
                {"response": "Fair.", "overall_score": 10, "fine-grained_score": 3.5},
                {"response": "Good.", "overall_score": 7, "fine-grained_score": 4.5},
                {"response": "Unrated.", "overall_score": None},
                {"response": "Bad.", "overall_score": 9, "fine-grained_score": 1.0},
            ],
        },
        [USER],
    ),
    "OpenAI": (
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        [USER],
    ),
    "ratings beside": (
        {"prompt": "Why?", "completions": ["Fair.", "Bad.", "Good."], "ratings": [3, 1, "4.5"]},
        [USER],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_all_forms(name: str, put: Put) -> None:
    """Catches answers that change places, a prompt that loses a turn, and the rejected answer in training."""
    row, prompt = PAIRS[name]
    [pair], reader = read(put, row, data_kind="preference")
    assert isinstance(pair, Preference) and pair.wanted
    assert (list(pair.prompt), pair.messages[-1], pair.rejected) == (prompt, GOOD, BAD)
    assert not {"chosen", "rejected", "prompt", "messages"} & reader.log.unused.keys()
    [single], reader = read(put, row, data_kind="sft-chosen")
    assert type(single) is Conversation and list(single.messages) == [*prompt, GOOD]
    assert [(name.endswith("of which the wanted answers"), rows) for name, rows in reader.schemas.items()] == [
        (True, 1)
    ]
    message = refused(put, row)
    assert "the row holds preferences (" in message and "\n" not in message
    assert "--as sft-chosen" in message and "--as preference" in message
    [dropped], _ = read(put, row, on_error="skip")
    assert isinstance(dropped, Dropped) and not dropped.by_choice and "preferences" in dropped.reason


KTO: dict[str, Any] = {
    "TRL": {"prompt": "Why?", "completion": "Good."},
    "TRL, messages": {"prompt": [USER], "completion": [GOOD]},
    "OpenAI": {"messages": [USER, GOOD]},
    "ShareGPT": {"conversations": [share(USER), share(GOOD)]},
    "Alpaca": {"instruction": "Why?", "output": "Good."},
}


@pytest.mark.parametrize("field", ["label", "kto_tag"])
@pytest.mark.parametrize("name", KTO)
def test_an_answer_that_is_not_wanted_is_never_trained(name: str, field: str, put: Put) -> None:
    """Catches KTO's false rows among the answers, whether their label is a word of JSON or of CSV."""
    rows = [KTO[name] | {field: label} for label in (True, False, "True", " false ")]
    for row in rows:
        assert f"the row holds preferences ({field})" in refused(put, row) and "--as sft-chosen" in refused(put, row)
        assert f"--ignore_fields {field}" in refused(put, row)
    found, reader = read(put, *rows, data_kind="sft-chosen")
    assert [type(one) for one in found] == [Conversation, Dropped] * 2
    assert all(one.by_choice and "not wanted" in one.reason for one in found if isinstance(one, Dropped))
    assert not reader.log.unused
    judged, _ = read(put, *rows, data_kind="preference")
    assert [(one.wanted, one.rejected, one.messages) for one in judged] == [
        (wanted, None, (USER, GOOD)) for wanted in (True, False) * 2
    ]


def test_numbers_judge_where_the_name_says_so(put: Put) -> None:
    """Catches kto_tag 0 in training, as tables without truths have it."""
    rows = [KTO["TRL"] | {"kto_tag": number} for number in (1, 0)]
    assert "the row holds preferences (kto_tag)" in refused(put, rows[1])
    found, _ = read(put, *rows, data_kind="sft-chosen")
    assert [type(one) for one in found] == [Conversation, Dropped]


@pytest.mark.parametrize("kind", ["preference", "sft-chosen"])
def test_labels_of_numbers_judge_where_rows_are_judged(kind: str, put: Put) -> None:
    """Catches a table's 0 and 1 refused as no judgement, 0 among the wanted answers, and a class taken for one."""
    rows = [KTO["TRL"] | {"label": label} for label in (1, 0, 1.0, "0", " 1 ")]
    found, reader = read(put, *rows, data_kind=kind)
    wanted = [True, False, True, False, True]
    if kind == "preference":
        assert [one.wanted for one in found] == wanted
    else:
        assert [type(one) is Conversation for one in found] == wanted
    assert not reader.log.unused
    with pytest.raises(DataError, match="no answer of the row was judged"):
        read(put, KTO["TRL"] | {"label": 2}, data_kind="preference")


def test_what_only_looks_like_a_judgement_is_none(put: Put) -> None:
    """Catches classes of a text, numbers of classes and fields that are null taken for judgements."""
    rows = [
        {"text": "a cat", "label": True},
        {"prompt": "Why?", "completion": "Good.", "label": 1},
        {"prompt": "Why?", "completion": "Good.", "label": "positive"},
        {"prompt": "Why?", "completion": "Good.", "label": None},
        {"prompt": "Why?", "completion": "Good.", "chosen": None, "rejected": None},
    ]
    found, reader = read(put, *rows)
    assert [type(one) for one in found] == [Conversation] * len(rows)
    assert reader.log.unused["label"] == 3


UNUSABLE = {
    "the same": ({"prompt": "Why?", "chosen": "Good.", "rejected": " Good.\n"}, "chosen and rejected are the same"),
    "empty chosen": ({"prompt": "Why?", "chosen": " ", "rejected": "Bad."}, "empty chosen answer"),
    "empty rejected": ({"prompt": "Why?", "chosen": "Good.", "rejected": ""}, "empty rejected answer"),
    "no rejected": ({"prompt": "Why?", "chosen": "Good.", "rejected": None}, "no rejected answer"),
    "another prompt": (
        {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "How?"}, BAD]},
        "the prompts of chosen and rejected differ",
    ),
    "another turn before": (
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
        "the prompts of chosen and rejected differ",
    ),
    "empty prompt": ({"prompt": "", "completion": "Good.", "label": True}, "empty prompt"),
    "one rating": (
        {"prompt": "Why?", "completions": [{"text": "a", "rating": 1}, {"text": "b"}]},
        "fewer than two completions have a rating",
    ),
    "equal ratings": (
        {"prompt": "Why?", "completions": [{"text": "a", "rating": 1}, {"text": "b", "rating": "1.0"}]},
        "all completions have the same rating",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_pairs_that_say_nothing_are_dropped_by_name(name: str, put: Put) -> None:
    """Catches pairs without a difference, or of two questions, in training."""
    row, reason = UNUSABLE[name]
    for on_error in ("stop", "skip"):
        [dropped], _ = read(put, row, data_kind="preference", on_error=on_error)
        assert dropped == Dropped(0, dropped.where, reason)


WRONG = {
    "no prompt": ({"chosen": "Good.", "rejected": "Bad."}, "the answers have no prompt; expected one of messages,"),
    "question": (
        {"question": "Why?", "system": "s", "chosen": "Good.", "rejected": "Bad."},
        "try --fields instruction=question",
    ),
    "two prompts": (
        {"prompt": "Why?", "instruction": "How?", "chosen": "Good.", "rejected": "Bad."},
        "the fields prompt, instruction are for one place; leave one out with --ignore_fields instruction",
    ),
    "another prompt beside": (
        {"prompt": "How?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "field prompt and the conversation in chosen differ",
    ),
    "ends in a question": ({"chosen": [USER], "rejected": [USER, BAD]}, "chosen ends in a message of user"),
    "prompt with an answer": (
        {"messages": [USER, GOOD], "chosen": "Good.", "rejected": "Bad."},
        "field messages ends in an answer",
    ),
    "context beside": (
        {"messages": [USER], "context": "It.", "chosen": "Good.", "rejected": "Bad."},
        "field context has no place",
    ),
    "number": ({"prompt": "Why?", "chosen": 3, "rejected": "Bad."}, "field chosen is a number, expected text"),
    "no judgement": (
        {"prompt": "Why?", "completion": "Good."},
        "no answer of the row was judged; --as preference needs",
    ),
    "ratings of others": (
        {"prompt": "Why?", "completions": ["a", "b"], "ratings": [1]},
        "found 1 ratings for 2 completions",
    ),
    "no number": (
        {"prompt": "Why?", "completions": ["a", "b"], "ratings": [1, "high"]},
        "completions[1]: a rating is text, expected a number",
    ),
    "two labels": (
        {"prompt": "Why?", "completion": "a", "label": True, "kto_tag": False},
        "are for one place, and differ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_are_wrong_are_named_and_skipped_on_request(name: str, put: Put) -> None:
    """Catches a traceback, a guess, and a message without the way out."""
    row, words = WRONG[name]
    assert words in refused(put, row, data_kind="preference")
    [dropped], _ = read(put, row, data_kind="preference", on_error="skip")
    assert isinstance(dropped, Dropped) and not dropped.by_choice


def test_names_of_fields_are_mapped(put: Put) -> None:
    """Catches preferences under other names that no option reaches."""
    row = {"question": "Why?", "better": "Good.", "worse": "Bad."}
    fields = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    [pair], _ = read(put, row, data_kind="preference", fields=fields)
    assert (pair.messages, pair.rejected) == ((USER, GOOD), BAD)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"mask_inputs": False}, "--mask_inputs false with --as preference"),
        ({"overflow": "split"}, "--overflow split with --as preference: a preference is compared whole"),
        ({"rendered": True}, "--rendered true"),
    ],
)
def test_settings_without_a_meaning_for_pairs_are_refused(setting: dict[str, Any], words: str) -> None:
    """Catches a setting that is taken and does nothing."""
    with pytest.raises(UserError, match=words):
        PrepareConfig(destination_path=Path("d"), tokenizer_path=Path("t"), data_kind="preference", **setting)
