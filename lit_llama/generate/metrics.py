"""Answers beside their references: how many stop, are equal, or are the same JSON."""

import json
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, Never

from lit_llama.errors import UserError
from lit_llama.generate.engine.request import FinishReason
from lit_llama.text.formats import Example


@dataclass(frozen=True)
class Answer:
    """The words of a model.

    Attributes:
        text: Without what ends it.
        stopped: Whether it ended by itself, and not at the limit.
        tokens: Made for it.
        error: Why it failed, with the text that it had until then.
        dropped: Oldest tokens of prompt and answer that the model did not see any more at its end.
    """

    text: str
    stopped: bool
    tokens: int
    error: UserError | None = None
    dropped: int = 0

    @property
    def finish_reason(self) -> FinishReason | Literal["error"]:
        """How it ended, as OpenAI names it, or that it failed."""
        if self.error is not None:
            return "error"
        return "stop" if self.stopped else "length"


def measure(examples: Sequence[Example], answers: Sequence[Answer], control: Collection[str] = ()) -> dict[str, Any]:
    """Shares of answers that stop by themselves, that equal the reference, and that are the same JSON as it.

    One that failed is none of them; how many did is added where there are any.

    The last two only over rows that have a reference; JSON only if every reference is JSON. Letters that Unicode spells
    in several ways are equal (NFC). JSON is compared by value: 5 is 5.0 and no true; an object that names a key twice,
    and NaN, are no JSON.

    Args:
        examples: With their references.
        answers: To each of them.
        control: Spellings of control tokens. The share of answers that spell one as text is added where there are any:
            such an answer did not end where it should, even if it equals a reference that spells it, too.
    """
    pairs = _pairs(examples, answers)
    measures: dict[str, Any] = {"rows": len(answers), "stopped": _mean([answer.stopped for answer in answers])}
    if failed := sum(answer.error is not None for answer in answers):
        measures["failed"] = failed
    if pairs:
        measures["exact_match"] = _mean([_nfc(wanted) == _nfc(text) for wanted, text in pairs])
    wanted = [_json(reference) for reference, _ in pairs]
    if pairs and all(value is not None for value in wanted):
        found = [_json(text) for _, text in pairs]
        measures["json_match"] = _mean([_same(one, other) for one, other in zip(wanted, found, strict=True)])
    spelled = [any(token in answer.text for token in control) for answer in answers]
    if any(spelled):
        measures["control_tokens_spelled"] = _mean(spelled)
    return measures


def notes(examples: Sequence[Example], answers: Sequence[Answer], control: Collection[str] = ()) -> list[str]:
    """What the measures do not tell by themselves, for people."""
    said = []
    pairs = _pairs(examples, answers)
    by_form = sum(one.strip() != other.strip() and _nfc(one) == _nfc(other) for one, other in pairs)
    if by_form:
        said.append(
            f"{by_form} of the exact matches spell letters otherwise than the reference (é as one character or two): "
            "they are equal after Unicode's normalisation NFC"
        )
    texts, references = [answer.text for answer in answers], [example.response for example in examples]
    found = [token for token in control if any(token in text for text in texts)]
    if found:
        counts = [sum(any(token in text for token in found) for text in side) for side in (texts, references)]
        said.append(
            f"{counts[0]} of {len(texts)} answers and {counts[1]} of {len(references)} references spell "
            f"{', '.join(sorted(found))} as text, which is no end of an answer: the rows were trained with it typed; "
            "take it out of the data, or end answers there with --stop"
        )
    return said


def _pairs(examples: Sequence[Example], answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """Each reference that there is, and the answer."""
    both = zip(examples, answers, strict=True)
    return [(example.response, answer.text) for example, answer in both if example.response]


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _json(text: str) -> tuple[Any] | None:
    """The parsed value, wrapped to tell it from a failure; numbers as they are written, whatever their size."""
    try:
        value = json.loads(
            text, parse_int=Decimal, parse_float=Decimal, parse_constant=_no_json, object_pairs_hook=_object
        )
        return (value,)
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _no_json(name: str) -> Never:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = {unicodedata.normalize("NFC", key): value for key, value in pairs}
    if len(made) < len(pairs):
        raise ValueError("a key stands twice")
    return made


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values, and of what `_json` makes of them. JSON tells 1 from true, Python does not."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, str):
        return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
    return bool(one == other)


def _mean(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
