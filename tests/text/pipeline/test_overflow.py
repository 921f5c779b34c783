"""Rows longer than the limit: everything that is lost is counted, and nothing else is lost."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_samples import WORDS, answer_ids, chat, encode, rows_of, text_rows
from test_samples import tokenizer as tokenizer  # a fixture

from lit_llama.errors import DataError, UserError
from lit_llama.text.message import IGNORE_INDEX, Conversation, Dropped
from lit_llama.text.pipeline.encoder import Encoder
from lit_llama.text.prompts.styles import Alpaca, ChatML, PromptStyle, Vicuna
from lit_llama.text.tokenizer.base import Tokenizer


def lengths(tokenizer: Tokenizer, rows: Sequence[Conversation], style: PromptStyle | None = None) -> list[int]:
    return [len(sample.input_ids) for sample in encode(tokenizer, rows, style)[0]]


@pytest.fixture
def mixed(tokenizer: Tokenizer) -> tuple[list[Conversation], int]:
    """Rows of which about half are longer than a limit, one of them by one token and one of them not."""
    rows = rows_of(*(chat(1 + seed % 5, seed) for seed in range(40)))
    return rows, sorted(lengths(tokenizer, rows))[20]


@pytest.mark.parametrize("overflow", ["drop", "truncate_prompt", "truncate_response", "split"])
def test_every_policy_keeps_what_fits_and_accounts_for_the_rest(
    overflow: Any, mixed: tuple[list[Conversation], int], tokenizer: Tokenizer
) -> None:
    """Catches rows that are lost, cut without being counted, counted twice, longer than the limit, or out of order."""
    rows, limit = mixed
    whole = encode(tokenizer, rows)[0]
    samples, encoded = encode(tokenizer, rows, max_seq_length=limit, overflow=overflow)
    long = {row for row, sample in enumerate(whole) if len(sample.input_ids) > limit}
    assert len(long) > 10 and any(len(sample.input_ids) == limit for sample in whole)
    touched = [*encoded.cut, *encoded.parts, *(entry.row for entry in encoded.dropped)]
    assert sorted(touched) == sorted(long)
    assert [s for s in samples if s.row not in long] == [s for s in whole if s.row not in long]
    kept = [sample.row for sample in samples]
    assert kept == sorted(kept) and set(kept) == set(range(40)) - {entry.row for entry in encoded.dropped}
    assert all(len(sample.input_ids) == len(sample.labels) <= limit for sample in samples)
    assert all(any(label != IGNORE_INDEX for label in sample.labels[1:]) for sample in samples)
    assert all(entry.where == f"a.jsonl:line {entry.row + 1}" for entry in encoded.dropped)
    if overflow == "drop":
        assert {entry.reason for entry in encoded.dropped} == {f"longer than {limit} tokens"}
        assert not encoded.cut and not encoded.parts
    else:
        assert bool(encoded.parts) == (overflow == "split") and bool(encoded.cut) == (overflow != "split")


def test_an_error_names_the_first_row_that_is_too_long(
    mixed: tuple[list[Conversation], int], tokenizer: Tokenizer
) -> None:
    """Catches a policy that stops at rows that fit, or does not say which one does not."""
    rows, limit = mixed
    first, size = next((i, n) for i, n in enumerate(lengths(tokenizer, rows)) if n > limit)
    with pytest.raises(DataError, match=rf"line {first + 1} has {size} tokens, more than --max_seq_length {limit}"):
        encode(tokenizer, rows, max_seq_length=limit, overflow="error")
    assert encode(tokenizer, rows, max_seq_length=max(lengths(tokenizer, rows)), overflow="error")[0]


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_oldest_turns_go_first_and_as_few_as_it_takes(system: str, tokenizer: Tokenizer) -> None:
    """Catches a turn too many, a lost system message, and an answer without its question."""
    style, messages = Vicuna(), chat(8, 3, system)
    head, turns = messages[: bool(system)], messages[bool(system) :]
    for dropped in range(1, 8):
        rest = [*head, *turns[2 * dropped :]]
        [wanted], _ = encode(tokenizer, rows_of(rest), style)
        for limit in (len(wanted.input_ids), len(wanted.input_ids) + 1):
            [found], encoded = encode(
                tokenizer, rows_of(messages), style, max_seq_length=limit, overflow="truncate_prompt"
            )
            assert found == wanted and encoded.cut == [0]
            assert list(encoded.conversations[0].messages) == rest


def test_a_hundred_thousand_turns_are_cut_in_no_time(tiny_folder: Path) -> None:
    """Catches encoding a chat anew for each of its turns."""
    tokenizer = Tokenizer.from_path(tiny_folder)
    messages = [{"role": role, "content": str(n)} for n in range(10_000) for role in ("user", "assistant")]
    [sample], _ = encode(tokenizer, rows_of(messages), ChatML(), max_seq_length=200, overflow="truncate_prompt")
    assert 150 < len(sample.input_ids) <= 200


def test_then_the_beginning_of_the_question_goes_of_its_input_first(tokenizer: Tokenizer) -> None:
    """Catches an instruction cut before its input, a lost end of the question, and a lost answer."""
    asked = {"role": "user", "content": "Count these words.", "input": " ".join(map(str, range(200)))}
    messages = [asked, {"role": "assistant", "content": "There are 200 of them."}]
    [size] = lengths(tokenizer, rows_of(messages))
    [bare] = lengths(tokenizer, rows_of([{**asked, "input": "9"}, messages[1]]))
    answer = answer_ids(tokenizer, Alpaca(), messages[1]["content"])
    for limit in range(bare + 9, size, 37):
        [sample], encoded = encode(tokenizer, rows_of(messages), max_seq_length=limit, overflow="truncate_prompt")
        question = encoded.conversations[0].messages[0]
        assert sample.labels[-len(answer) :] == answer and encoded.cut == [0] and len(sample.input_ids) <= limit
        assert asked["input"].endswith(question["input"]) and asked["content"].endswith(question["content"])
        assert question["content"] == asked["content"] or not question["input"]
        assert len(sample.input_ids) > 0.9 * limit - 30, "not much more goes than has to"
    reason = f"what cannot be cut fills {len(answer)} tokens"
    _, encoded = encode(tokenizer, rows_of(messages), max_seq_length=len(answer), overflow="truncate_prompt")
    assert encoded.dropped == [Dropped(0, "a.jsonl:line 1", reason, tokens=size)]


def test_a_chat_is_split_between_turns_each_part_with_the_system_message(tokenizer: Tokenizer) -> None:
    """Catches a lost or doubled turn, parts that could be one, and a part without its system message."""
    style, messages = Vicuna(), chat(9, 5, "Be brief.")
    alone = rows_of(*([messages[0], *messages[i : i + 2]] for i in range(1, 19, 2)))
    longest = max(lengths(tokenizer, alone, style))
    for limit in (longest + 40, longest + 90, 4 * longest):
        samples, encoded = encode(tokenizer, rows_of(messages), style, max_seq_length=limit, overflow="split")
        assert encoded.parts == [0] and len(samples) > 1 and not encoded.cut and not encoded.dropped
        parts = [list(conversation.messages) for conversation in encoded.conversations]
        assert all(part[0] == messages[0] for part in parts)
        assert [message for part in parts for message in part[1:]] == messages[1:]
        assert [s.input_ids for s in samples] == [s.input_ids for s in encode(tokenizer, rows_of(*parts), style)[0]]
        for part, following in itertools.pairwise(parts):
            [together] = encode(tokenizer, rows_of([*part, *following[1:3]]), style)[0]
            assert len(together.input_ids) > limit
    [first] = encode(tokenizer, rows_of(messages[:3]), style)[0]
    _, encoded = encode(tokenizer, rows_of(messages), style, max_seq_length=len(first.input_ids) - 1, overflow="split")
    assert [entry.reason[:14] for entry in encoded.dropped] == ["one turn alone"] and not encoded.parts


def test_parts_without_anything_to_learn_are_refused(tokenizer: Tokenizer) -> None:
    """Catches samples without a label, or answers trained that were not to be."""
    with pytest.raises(UserError, match=r"--overflow split with --train_on last.*truncate_prompt"):
        Encoder(tokenizer, Alpaca(), max_seq_length=9, train_on="last", overflow="split")


# Plain text


@pytest.mark.parametrize("limit", [3, 4, 17, 64])
@pytest.mark.parametrize("mask_inputs", [True, False])
def test_every_token_of_a_text_is_predicted_once(limit: int, mask_inputs: bool, tokenizer: Tokenizer) -> None:
    """Catches tokens lost between windows, a window of one token, and an end in the middle of a text."""
    texts = [" ".join(random.Random(seed).choices(WORDS, k=3 + 20 * seed)) for seed in range(6)]
    rows = text_rows(*texts)
    samples, encoded = encode(tokenizer, rows, max_seq_length=limit, overflow="split", mask_inputs=mask_inputs)
    assert set(encoded.parts) | {row.row for row in rows if len(tokenizer.encode(texts[row.row])) + 2 <= limit} == {
        *range(6)
    }
    for row, text in enumerate(texts):
        windows = [sample for sample in samples if sample.row == row]
        whole = [*tokenizer.encode(text), tokenizer.eos_id]
        if tokenizer.bos:
            assert all(window.input_ids[0] == tokenizer.control[tokenizer.bos] for window in windows)
        else:
            whole = whole[1:]  # nothing stands before it
        assert [i for window in windows for i in window.labels[1:]] == whole
        assert all(window.input_ids[1:] == window.labels[1:] for window in windows)
        assert all(1 < len(window.input_ids) <= limit for window in windows)
        assert all(len(window.input_ids) == limit for window in windows[:-1])


def test_windows_carry_the_words_they_are_made_of(tokenizer: Tokenizer) -> None:
    """Catches a whole book kept for each of its windows, which a report would take for duplicates."""
    text = " ".join(f"word{n}" for n in range(300))
    _, encoded = encode(tokenizer, text_rows(text), max_seq_length=50, overflow="split")
    words = [row.messages[0]["content"] for row in encoded.conversations]
    assert "".join(words).replace(" ", "") == text.replace(" ", "") and len(words) > 10
    assert max(map(len, words)) < len(text) / 5


@pytest.mark.parametrize("overflow", ["drop", "truncate_prompt", "truncate_response"])
def test_a_long_text_is_dropped_or_loses_its_end(overflow: Any, tokenizer: Tokenizer) -> None:
    """Catches a text that has no prompt and so ends in a traceback."""
    samples, encoded = encode(tokenizer, text_rows("many words " * 50), max_seq_length=20, overflow=overflow)
    if overflow == "truncate_response":
        assert encoded.cut == [0] and len(samples[0].input_ids) == 20 and samples[0].labels[-1] == tokenizer.eos_id
    else:
        assert not samples and len(encoded.dropped) == 1


def test_parts_without_anything_to_learn_stand_before_one_with(tokenizer: Tokenizer) -> None:
    """Catches a split at an answer that carries no loss: an error, a part that teaches nothing, or a lost turn."""
    messages = [m | {"train": False} if i % 4 == 1 else m for i, m in enumerate(chat(8, 5))]
    two = max(lengths(tokenizer, rows_of(*(messages[i : i + 4] for i in range(0, 16, 4)))))
    samples, encoded = encode(tokenizer, rows_of(messages), max_seq_length=two, overflow="split")
    assert encoded.parts == [0] and not encoded.dropped and len(samples) > 1
    assert [m for part in encoded.conversations for m in part.messages] == messages
    assert all(any(label != IGNORE_INDEX for label in sample.labels) for sample in samples)
    whole = encode(tokenizer, rows_of(messages))[0][0]
    learned = [[label for label in sample.labels if label != IGNORE_INDEX] for sample in (whole, *samples)]
    assert learned[0] == [label for part in learned[1:] for label in part]
    alone = max(lengths(tokenizer, rows_of(*(messages[i : i + 2] for i in range(2, 16, 4)))))
    samples, encoded = encode(tokenizer, rows_of(messages), max_seq_length=alone, overflow="split")
    assert all(len(sample.input_ids) <= alone for sample in samples) and encoded.parts == [0]
