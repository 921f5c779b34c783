"""Preferences: rows with answers that people or models judged -> conversations that end in a judged answer.

A row holds a chosen and a rejected answer (TRL, LLaMA-Factory, HH-RLHF), one answer with a label that is true or false,
1 or 0 (KTO), or several completions with ratings (UltraFeedback), of which the best and the worst are taken.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lit_llama.text.message import Message
from lit_llama.text.read.raw import RowError, kind, listed, missing
from lit_llama.text.read.schemas.fields import FieldLog, Row
from lit_llama.text.read.schemas.messages import Turns, Words, as_list, in_a_field, read_messages
from lit_llama.text.read.schemas.recognition import (
    BESIDE_CHATS,
    Schema,
    beside,
    complete,
    joined,
    recognise,
    suggest_prompt,
)
from lit_llama.wording import param

_CHOSEN, _REJECTED = "chosen", "rejected"
_SIDES = (_CHOSEN, _REJECTED)
_PREFERRED = ("preferred_output", "non_preferred_output")
LABELS = ("label", "kto_tag")
COMPLETIONS = "completions"
_ASKED = ("messages", "conversations", "prompt", "instruction")
_LISTS = ("ratings", "scores")
_RATINGS = ("rating", "score", "fine-grained_score", "overall_score", "overall_rating")
"""Of a completion; where UltraFeedback has two, the mean over its aspects comes before the one that is known for
tens in place of ones."""
_TEXTS = ("response", "completion", "content", "text", "output", "answer")
_TRUTH = {"true": True, "false": False}
_NUMBERS = {"1": True, "0": False}
_SPOKEN = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
_HEARD = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Judged:
    """Answers to one prompt.

    Args:
        prompt: The turns before the answer.
        tools: The functions that the assistant may call.
        chosen: The better answer, or the one that is wanted; None if only an unwanted one is known.
        rejected: The worse answer, or the one that is not wanted; None if only a wanted one is known.
        cut: Last turns without an answer that were left off.
    """

    prompt: tuple[Message, ...]
    tools: tuple[Any, ...]
    chosen: Message | None
    rejected: Message | None
    cut: int = 0


def judgement(row: Row, *, wanted: bool) -> str:
    """Name the kind of preferences that a row is of; "" if it is of none.

    Args:
        row: The row.
        wanted: Somebody has said that rows are judged: then a label that is 0 or 1 judges, and is no class of a text.
    """
    names = row.keys()
    if names >= {"input", *_PREFERRED} and isinstance(row["input"], dict):
        return "preferred and other output (OpenAI)"
    if _CHOSEN in names and _REJECTED in names and not (missing(row[_CHOSEN]) and missing(row[_REJECTED])):
        return "chosen and rejected"
    if names.isdisjoint(_ASKED):
        return ""
    if any(_verdict(row, name, wanted) is not None for name in LABELS if name in names):
        return "answers with a label (KTO)"
    return "rated completions" if COMPLETIONS in names and _is_rated(row) else ""


def refuse(found: str, row: Row) -> RowError:
    """Build the error for a row of preferences where nobody has said what to make of it."""
    fields = _fields_of(found, row)
    ignored = f", or leave {fields} out with {param('ignore_fields', [fields])}" if fields in LABELS else ""
    return RowError(
        f"the row holds preferences ({fields})",
        hint=f"{param('data_kind', 'sft-chosen')} trains on the chosen answers alone, "
        f"{param('data_kind', 'preference')} makes a folder of preferences" + ignored,
    )


def _fields_of(found: str, row: Row) -> str:
    if found.startswith((_CHOSEN, "preferred")):
        return ", ".join(_SIDES if found.startswith(_CHOSEN) else _PREFERRED)
    return COMPLETIONS if found.startswith("rated") else next(name for name in LABELS if name in row)


def truth(value: Any) -> bool | None:
    """Read true or false, also as the text that CSV has for it; None for anything else."""
    if isinstance(value, bool):
        return value
    return _TRUTH.get(value.strip().lower()) if isinstance(value, str) else None


def _verdict(row: Row, name: str, numbers: bool) -> bool | None:
    """Whether an answer is wanted, None where a field says nothing of it; numbers may be classes, but in kto_tag."""
    value = row[name]
    if numbers or name == "kto_tag":
        value = _NUMBERS.get(value.strip(), value) if isinstance(value, str) else value  # as CSV has them
        return bool(value) if value in (0, 1) else truth(value)
    return truth(value)


def _openai(row: Row) -> dict[str, Any]:
    """A row of OpenAI's preferences in the names of all others."""
    rest = {name: value for name, value in row.items() if name not in ("input", *_PREFERRED)}
    asked = {
        name: value for name, value in row["input"].items() if name in ("messages", "tools", "parallel_tool_calls")
    }
    return rest | asked | {side: row[name] for side, name in zip(_SIDES, _PREFERRED, strict=True)}


def read_judged(row: Row, found: str, log: FieldLog, *, pairs: bool) -> Iterator[Judged]:
    """Read the answers of a row, once or, of a tree of messages, for each of its branches.

    Args:
        row: The row.
        found: Its kind, as `judgement` names it.
        log: Reads the fields.
        pairs: The rejected answer is wanted, too; else nothing is said of what is wrong with it.

    Raises:
        RowError: A field is not what it has to be; or, as `unusable`, there is nothing to learn from the row.
    """
    if found.endswith("(KTO)"):
        yield from _labelled(row, log)
        return
    row = _openai(row) if found.endswith("(OpenAI)") else row
    better, worse = (_rated if found.startswith("rated") else _pair)(row, log)
    prompt, chosen, cut = _ended(better, _CHOSEN)
    if not pairs:
        yield Judged(prompt, tuple(better.tools), chosen, None, cut)
        return
    other, rejected, _ = _ended(worse, _REJECTED)
    if prompt != other:
        raise RowError("the prompts of chosen and rejected differ", unusable=True)
    if _same(chosen, rejected):
        raise RowError("chosen and rejected are the same", unusable=True)
    yield Judged(prompt, tuple(better.tools), chosen, rejected, cut)


def _same(first: Message, second: Message) -> bool:
    """Whether two answers say the same, but for the blanks around it."""
    return {**first, "content": first["content"].strip()} == {**second, "content": second["content"].strip()}


def _ended(turns: Turns, name: str) -> tuple[tuple[Message, ...], Message, int]:
    """Prompt and last answer of a conversation, and how many turns behind that were left off."""
    messages = turns.messages
    if not messages:
        raise RowError(f"no {name} answer", unusable=True)
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(f"{name} ends in a message of {last['role']}, expected an answer of the assistant")
    if not last["content"].strip() and "tool_calls" not in last:
        raise RowError(f"empty {name} answer", unusable=True)
    whole, cut = complete([*messages[:-1], _learned(last)], _WHOLE)
    if len(whole) < 2:
        raise RowError(f"field {name} is an answer without a prompt", hint=_NO_PROMPT)
    return whole[:-1], whole[-1], cut


def _learned(answer: Words) -> Words:
    """An answer whatever flags it has: that it was judged says that it is learned from."""
    return {key: value for key, value in answer.items() if key != "train"}


def _labelled(row: Row, log: FieldLog) -> Iterator[Judged]:
    """Answers that are wanted or not, of a row of any kind."""
    there = {name: verdict for name in LABELS if name in row and (verdict := _verdict(row, name, True)) is not None}
    if len(set(there.values())) > 1:
        raise RowError(f"the fields {listed(list(there))} are for one place, and differ")
    wanted = next(iter(there.values()))
    rest = {name: value for name, value in row.items() if name not in there}
    schema = recognise(rest)
    for turns in schema.turns(rest, log):
        messages, cut = complete([*turns.messages[:-1], *map(_learned, turns.messages[-1:])], schema)
        prompt, answer = messages[:-1], messages[-1]
        if not prompt:
            raise RowError("an answer with a label has no prompt", hint=_NO_PROMPT)
        chosen, rejected = (answer, None) if wanted else (None, answer)
        yield Judged(prompt, tuple(turns.tools), chosen, rejected, cut)


_NO_PROMPT = f"expected one of {', '.join(_ASKED)}, or conversations in chosen and rejected"


def _pair(row: Row, log: FieldLog) -> list[Turns]:
    """The conversation that ends in the chosen answer, and the one that ends in the rejected one."""
    sides = [_side(row, name, log) for name in _SIDES]
    if any(message["role"] == "user" for turns in sides for message in turns.messages):
        return _WHOLE.turns(row, log)
    return _behind({name: value for name, value in row.items() if name not in _SIDES}, sides, log)


def _whole(row: Row, log: FieldLog) -> Iterator[Turns]:
    """Two conversations that begin alike; a prompt beside them is a copy of what stands in the chosen one."""
    chosen = _side(row, _CHOSEN, log)
    for name in _given(row, _ASKED):
        _check_copy(row, name, chosen, log)
    for turns in (chosen, _side(row, _REJECTED, log)):
        yield joined(beside(row, log), turns)


def _given(row: Row, names: Sequence[str]) -> list[str]:
    return [name for name in names if not missing(row.get(name)) and row[name] not in ("", [])]


def _side(row: Row, name: str, log: FieldLog) -> Turns:
    """What stands in chosen or rejected: an answer, several messages, or a whole conversation."""
    value = row[name]
    if missing(value):
        return Turns()
    if isinstance(value, dict | list) or in_a_field(value):
        return read_messages(row, name, log)
    text = log.text(row, name)
    spoken = _SPOKEN.split(text)
    if len(spoken) > 2 and not spoken[0].strip() and spoken[1] == "Human":  # HH-RLHF
        turns = zip(spoken[1::2], spoken[2::2], strict=True)
        return Turns([{"role": _HEARD[who], "content": said.strip()} for who, said in turns])
    return Turns([{"role": "assistant", "content": text}])


def _check_copy(row: Row, name: str, turns: Turns, log: FieldLog) -> None:
    """Raise RowError if a field says something else than the whole conversation in chosen."""
    chosen = turns.messages
    if (messages := as_list(row[name])) is not None:
        messages = read_messages(row, name, log).messages
        same = messages == chosen[: len(messages)]
    else:
        text = log.text(row, name).strip()
        contents = [message["content"].strip() for message in chosen[:-1]]
        same = text in contents or all(content in text for content in contents)
    if not same:
        hint = f"leave it out with {param('ignore_fields', [name])}"
        raise RowError(f"field {name} and the conversation in chosen differ", hint=hint)


def _behind(row: Row, sides: Sequence[Turns], log: FieldLog) -> list[Turns]:
    """The prompt of a row with each of some answers behind it.

    Args:
        row: Without the fields of the answers.
        sides: The answers; what has no message stays so.
        log: Reads the fields.
    """
    prompt = _prompt(row, log)
    return [Turns([*prompt.messages, *turns.messages] if turns.messages else [], prompt.tools) for turns in sides]


def _prompt(row: Row, log: FieldLog) -> Turns:
    """The turns before the answer, out of whichever field holds them, and every other field accounted for."""
    asked = _given(row, _ASKED)
    if not asked:
        raise RowError("the answers have no prompt", hint=_NO_PROMPT + suggest_prompt(row))
    if len(asked) > 1:
        hint = f"leave one out with {param('ignore_fields', [asked[-1]])}"
        raise RowError(f"the fields {listed(asked)} are for one place", hint=hint)
    behind = {"prompt": "completion", "instruction": "output"}.get(asked[0])
    rest = {name: value for name, value in row.items() if name not in _ASKED or name in asked}
    if behind in rest:
        raise RowError(
            f"field {behind} is an answer beside those that were judged", hint=f"see {param('ignore_fields', [behind])}"
        )
    found = (rest | {behind: "."}) if behind else rest
    every = recognise(found).turns(found, log)
    turns = every[0]
    if len(every) > 1 or not turns.messages:
        raise RowError(f"field {asked[0]} is {kind(row[asked[0]])}, expected a text or messages")
    if behind:
        turns.messages.pop()
    if turns.messages[-1:] and turns.messages[-1]["role"] == "assistant":
        raise RowError(f"field {asked[0]} ends in an answer, expected the prompt of those that were judged")
    return turns


def _is_rated(row: Row) -> bool:
    entries = row[COMPLETIONS]
    if not isinstance(entries, list):
        return False
    if any(isinstance(row.get(name), list) for name in _LISTS):
        return True
    return any(isinstance(entry, dict) and not entry.keys().isdisjoint(_RATINGS) for entry in entries)


def _rated(row: Row, log: FieldLog) -> list[Turns]:
    """The conversations with the best and with the worst of several completions, the first of those that are equal."""
    entries, apart = row[COMPLETIONS], next((name for name in _LISTS if isinstance(row.get(name), list)), None)
    ratings = row[apart] if apart else [_rating(entry) for entry in entries]
    if len(ratings) != len(entries):
        raise RowError(f"found {len(ratings)} {apart} for {len(entries)} completions, expected one for each")
    numbers = [_number(rating, index) for index, rating in enumerate(ratings)]
    known = [(number, index) for index, number in enumerate(numbers) if number is not None]
    if len(known) < 2:
        raise RowError("fewer than two completions have a rating", unusable=True)
    best, worst = max(known, key=lambda each: each[0]), min(known, key=lambda each: each[0])
    if best[0] == worst[0]:
        raise RowError("all completions have the same rating", unusable=True)
    sides = [_completion(entries[index], index, log) for _, index in (best, worst)]
    return _behind({name: value for name, value in row.items() if name not in (COMPLETIONS, *_LISTS)}, sides, log)


def _rating(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return None
    return next((entry[name] for name in _RATINGS if not missing(entry.get(name))), None)


def _number(rating: Any, index: int) -> float | None:
    """A rating as a number, None where there is none."""
    if missing(rating) or rating in ("", "N/A"):
        return None
    try:
        if isinstance(rating, bool):
            raise ValueError
        number = float(rating)
    except (TypeError, ValueError):
        raise RowError(f"a rating is {kind(rating)}, expected a number", f"{COMPLETIONS}[{index}]") from None
    return None if number != number else number


def _completion(entry: Any, index: int, log: FieldLog) -> Turns:
    at = f"{COMPLETIONS}[{index}]"
    if as_list(entry) is not None:
        return read_messages({COMPLETIONS: entry}, COMPLETIONS, log)
    if isinstance(entry, dict):
        name = next((name for name in _TEXTS if name in entry), None)
        if name is None:
            raise RowError("a completion has no text", at, f"found {listed(list(entry))}; expected {listed(_TEXTS)}")
        return Turns([{"role": "assistant", "content": log.text(entry, name, at)}])
    return Turns([{"role": "assistant", "content": log.text({COMPLETIONS: entry}, COMPLETIONS, at)}])


_WHOLE = Schema("chosen and rejected", _SIDES, _whole, (*BESIDE_CHATS, *_ASKED))
