"""Answers beside their references: how many stop, are equal, are the same JSON, or share words.

Means over rows come with what they would have been on other rows of the same kind.

Shapes: N rows, B resamples.
"""

import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, Never

import numpy as np
import numpy.typing as npt
import regex

from lit_llama.errors import UserError
from lit_llama.generate.engine.request import FinishReason
from lit_llama.text.message import Conversation
from lit_llama.wording import param


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
        """Reason why the answer ended, as OpenAI names it, or that it failed."""
        if self.error is not None:
            return "error"
        return "stop" if self.stopped else "length"


def measure(
    questions: Sequence[Conversation], answers: Sequence[Answer], control: Collection[str] = ()
) -> dict[str, Any]:
    """Return the shares of answers that stop by themselves, that equal the reference, and that are the same JSON as it.

    One that failed is none of them; how many did is added where there are any.

    The last two only over rows that have a reference; JSON only if every reference is JSON. Letters that Unicode spells
    in several ways are equal (NFC). JSON is compared by value: 5 is 5.0 and no true; an object that names a key twice,
    and NaN, are no JSON.

    Args:
        questions: With their references.
        answers: To each of them.
        control: Spellings of control tokens. The share of answers that spell one as text is added where there are any:
            such an answer did not end where it should, even if it equals a reference that spells it, too.
    """
    pairs = _pairs(questions, answers)
    measures: dict[str, Any] = {"rows": len(answers), "stopped": _mean([answer.stopped for answer in answers])}
    if failed := sum(answer.error is not None for answer in answers):
        measures["failed"] = failed
    if pairs:
        measures["exact_match"] = _mean([exact_match(wanted, text) for wanted, text in pairs])
    if pairs and all(is_json(reference) for reference, _ in pairs):
        measures["json_match"] = _mean([json_match(wanted, text) for wanted, text in pairs])
    spelled = [any(token in answer.text for token in control) for answer in answers]
    if any(spelled):
        measures["control_tokens_spelled"] = _mean(spelled)
    return measures


def exact_match(reference: str, text: str) -> bool:
    """Whether an answer equals the reference, blanks around it and Unicode's spelling of letters aside."""
    return _nfc(reference) == _nfc(text)


def is_json(text: str) -> bool:
    """Whether a text is JSON, as `measure` reads it."""
    return _json(text) is not None


def json_match(reference: str, text: str) -> bool:
    """Whether an answer is the same JSON value as the reference."""
    return _same(_json(reference), _json(text))


def json_keys(text: str) -> tuple[str, ...]:
    """Return the keys of a JSON object in their order; none of anything else."""
    value = _json(text)
    return tuple(value[0]) if value and isinstance(value[0], dict) else ()


def json_fields(reference: str, text: str) -> dict[str, bool]:
    """Compare each field of a reference, which is a JSON object, with that of the answer."""
    wanted, found = _json(reference), _json(text)
    assert wanted and isinstance(wanted[0], dict)
    given = found[0] if found and isinstance(found[0], dict) else {}
    return {key: key in given and _same(value, given[key]) for key, value in wanted[0].items()}


def contains(wanted: Sequence[str], text: str) -> bool:
    """Whether an answer holds every one of these texts, in capitals or not."""
    text = _nfc(text).casefold()
    return all(_nfc(part).casefold() in text for part in wanted)


def compiled(pattern: str) -> Any:
    """Compile a regular expression by the package regex: that reads what Python's re does, and can be given up.

    Raises:
        UserError: It is none.
    """
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"pattern {pattern!r} is no regular expression: {error}") from error


def regex_match(pattern: str, reference: str, text: str) -> bool:
    """Whether a pattern is found in an answer.

    Of a pattern with a group, the last find counts, and its group has to equal that of the last find in the reference,
    or the reference itself where nothing is found in it. Commas within numbers and blanks around do not count.

    Raises:
        UserError: The pattern is none, or there are more ways to match it than there is time for.
    """
    expression = compiled(pattern)
    try:
        if not expression.groups:
            return expression.search(_nfc(text), timeout=_SECONDS) is not None
        found = _last_group(expression, text)
        wanted = _last_group(expression, reference)
    except TimeoutError:
        raise UserError(
            f"pattern {pattern!r} is not matched within {_SECONDS:g} s to an answer of {len(text)} characters: repeat "
            "nothing in it that is repeated already, as in (a+)+"
        ) from None
    return found is not None and found == (_plain(reference) if wanted is None else wanted)


def _last_group(expression: Any, text: str) -> str | None:
    matches = expression.finditer(_nfc(text), timeout=_SECONDS)
    groups = [next((group for group in match.groups() if group is not None), "") for match in matches]
    return _plain(groups[-1]) if groups else None


def _plain(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", _nfc(text))


_SECONDS = 5.0
"""For a pattern in an answer: some can be matched in more ways than there is time for."""
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
"""Words of a text; each character of a script that puts no blanks between words is one."""


def rouge_l(reference: str, text: str) -> float:
    """Compute ROUGE-L (Lin 2004): the F-measure of the longest common subsequence of words, in capitals or not.

    Equal to rouge_score's rougeL without a stemmer on English, and defined on every other script, too.
    """
    wanted, found = (_WORDS.findall(unicodedata.normalize("NFC", side).casefold()) for side in (reference, text))
    if not wanted or not found:
        return 0.0
    common = _common(wanted, found)
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of its table at once as the bits of a number (Hyyrö 2004)."""
    places: defaultdict[str, int] = defaultdict(int)
    for index, word in enumerate(one):
        places[word] |= 1 << index
    whole = (1 << len(one)) - 1
    row = whole
    for word in other:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & whole
    return len(one) - row.bit_count()


def notes(questions: Sequence[Conversation], answers: Sequence[Answer], control: Collection[str] = ()) -> list[str]:
    """Note what the measures do not tell by themselves, for people."""
    said = []
    pairs = _pairs(questions, answers)
    by_form = sum(one.strip() != other.strip() and _nfc(one) == _nfc(other) for one, other in pairs)
    if by_form:
        said.append(
            f"{by_form} of the exact matches spell letters otherwise than the reference (é as one character or two): "
            "they are equal after Unicode's normalisation NFC"
        )
    texts, references = [answer.text for answer in answers], [question.response for question in questions]
    found = [token for token in control if any(token in text for text in texts)]
    if found:
        counts = [sum(any(token in text for token in found) for text in side) for side in (texts, references)]
        said.append(
            f"{counts[0]} of {len(texts)} answers and {counts[1]} of {len(references)} references spell "
            f"{', '.join(sorted(found))} as text, which is no end of an answer: the rows were trained with it typed; "
            f"take it out of the data, or end answers there with {param('stop')}"
        )
    return said


def _pairs(questions: Sequence[Conversation], answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """Each reference that there is, and the answer."""
    both = zip(questions, answers, strict=True)
    return [(question.response, answer.text) for question, answer in both if question.response]


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


RESAMPLES, SEED, LEVEL = 2000, 1234, 0.95
_AT_ONCE = 2_000_000  # drawn rows that are in memory
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over rows.

    Attributes:
        value: The mean.
        low: Where its interval begins; None where rows are too few for one.
        high: Where it ends.
        rows: How many it is of.
    """

    value: float
    low: float | None
    high: float | None
    rows: int


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Compute the sum of values / sum of weights, with its bootstrap interval over the rows.

    The weights are 1, or what the values are counts of, such as tokens: then rows count by their size. Where all values
    are 0, or all are 1, resamples cannot differ; the interval is Wilson's (1927) there.

    Args:
        values: Of each row.
        weights: Of each row; those with 0 do not count as rows.
    """
    top, bottom = _columns(values, weights)
    value = float(top.sum() / bottom.sum())
    rows = len(top)
    if rows < 2:
        return Estimate(value, None, None, rows)
    if weights is None and value in (0.0, 1.0) and set(top.tolist()) <= {0.0, 1.0}:
        low, high = _wilson(value, rows)
        return Estimate(value, low, high, rows)
    drawn = np.concatenate([top[index].sum(1) / bottom[index].sum(1) for index in _resamples(rows)])
    return Estimate(value, *_quantiles(drawn), rows)


def difference(
    values: tuple[Sequence[float], Sequence[float]], weights: tuple[Sequence[float], Sequence[float]] | None = None
) -> Estimate:
    """Return the mean of the second minus the mean of the first, on the same rows, with the interval of that
    difference.

    Both means of a resample are of the same drawn rows, so that what is hard for both does not widen the interval.

    Args:
        values: Of each row, of the first and of the second.
        weights: As for `mean`, of both.
    """
    one = _columns(values[0], None if weights is None else weights[0], drop=False)
    other = _columns(values[1], None if weights is None else weights[1], drop=False)
    there = (one[1] > 0) & (other[1] > 0)
    (top, bottom), (top_2, bottom_2) = (tuple(column[there] for column in side) for side in (one, other))
    rows = int(there.sum())
    value = float(top_2.sum() / bottom_2.sum() - top.sum() / bottom.sum())
    if rows < 2:
        return Estimate(value, None, None, rows)
    drawn = [
        top_2[index].sum(1) / bottom_2[index].sum(1) - top[index].sum(1) / bottom[index].sum(1)
        for index in _resamples(rows)
    ]
    return Estimate(value, *_quantiles(np.concatenate(drawn)), rows)


def _columns(values: Sequence[float], weights: Sequence[float] | None, *, drop: bool = True) -> tuple[Floats, Floats]:
    top = np.asarray(values, np.float64)
    bottom = np.ones(len(top)) if weights is None else np.asarray(weights, np.float64)
    there = bottom > 0 if drop else np.ones(len(top), bool)
    return top[there], bottom[there]


def _resamples(rows: int) -> Iterator[npt.NDArray[np.int64]]:
    """(B, N) drawn rows in pieces along B; the same ones for the same number of rows."""
    generator, size = np.random.default_rng(SEED), max(1, _AT_ONCE // rows)
    for start in range(0, RESAMPLES, size):
        yield generator.integers(0, rows, (min(size, RESAMPLES - start), rows))


def _quantiles(drawn: Floats) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _wilson(share: float, rows: int) -> tuple[float, float]:
    z = 1.959963984540054
    center, wide = share + z * z / (2 * rows), z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, (center - wide) / (1 + z * z / rows)), min(1.0, (center + wide) / (1 + z * z / rows))
