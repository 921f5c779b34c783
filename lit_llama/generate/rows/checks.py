"""Checks and scores of the recipes that ship; those of others are as simple.

A check is called with the values of a row, by the names of sources and columns: it gives True, or False, or why not. A
score is called with a candidate and those values: the more, the better, and 0 for a wrong one.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lit_llama.generate.rows.filters import common, words_of
from lit_llama.text.dataset.split import normalised
from lit_llama.text.read.raw import STRICTEST

_FROM_EVIDENCE = 0.8  # of the words of an answer, in their order; the others are such as "because"
_COPIED = 0.9  # of the words of an example, in their order
_KEPT = 0.4  # F-measure of words, as ROUGE-1
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_NAME = re.compile(r"(?<![.!?:]\s)(?<!^)\b[A-ZÀ-Þ][\w'-]+")


def sentence_at_place(row: Mapping[str, Any]) -> str:
    """Return the sentence of a passage at the column `place`, counted round and round; "" where there is none.

    Headings, and what ends without a full stop, are no sentences.
    """
    parts = (part.strip() for part in _END_OF_SENTENCE.split(row["documents"]["text"]))
    found = [part for part in parts if len(part) >= 20 and part[-1] in ".!?。！？"]
    return found[row["place"] % len(found)] if found else ""


def evidence_answers_question(row: Mapping[str, Any]) -> bool | str:
    """Whether a question is one, about the passage, and the words of its answer are those of the column `evidence`."""
    question, answer = row["made"]["question"], words_of(row["made"]["answer"])
    asked, passage = words_of(question), set(words_of(row["documents"]["text"]))
    if not question.rstrip().endswith(("?", "？")):
        return "it is no question"
    if not {word for word in asked if len(word) > 3} & passage:
        return "the question has no word of the passage"
    if not answer or common(answer, words_of(row["evidence"])) < _FROM_EVIDENCE * len(answer):
        return "the words of the answer do not stand in the evidence"
    if " ".join(answer) in " ".join(asked):
        return "the question holds its answer"
    return True


def keeps_meaning(row: Mapping[str, Any]) -> bool | str:
    """Whether a new wording has the numbers and names of the old one, no other numbers, and much of its words."""
    old, new = row["seeds"]["instruction"], row["wording"]
    before, after = words_of(old), words_of(new)
    if before == after:
        return "nothing was reworded"
    if sorted(_NUMBER.findall(old)) != sorted(_NUMBER.findall(new)):
        return "the numbers are other ones"
    if missing := [name for name in _NAME.findall(old) if name.casefold() not in new.casefold()]:
        return f"{missing[0]} is missing"
    shared = (Counter(before) & Counter(after)).total()
    if 2 * shared < _KEPT * (len(before) + len(after)):
        return f"only {shared} of {len(before)} words are kept among {len(after)}: the meaning may be another one"
    return True


def is_no_example(row: Mapping[str, Any]) -> bool | str:
    """Whether nothing of the column `made` is a text of the column `examples`, or a longer text with one in it.

    Small models like to give back the examples of their prompt.
    """
    made = [words_of(text) for text in row["made"].values() if isinstance(text, str)]
    for text in (text for example in row["examples"] for text in example.values()):
        words = words_of(text)
        if any(len(words) > 2 and common(words, own) >= _COPIED * len(words) for own in made):
            return f"it is the example {text!r}"
    return True


def same_as_seed(answer: str, row: Mapping[str, Any]) -> float:
    """Return 1 for an answer that is that of the seed: as JSON by value, by its last number, or as words."""
    expected = row["seeds"].get("output")
    if not isinstance(expected, str) or not expected.strip():
        return 0.0
    try:
        return float(STRICTEST.decode(expected.strip()) == STRICTEST.decode(answer.strip()))
    except (ValueError, RecursionError):
        pass
    numbers, others = _NUMBER.findall(expected), _NUMBER.findall(answer)
    if numbers and others and numbers[-1].replace(",", "") == others[-1].replace(",", ""):
        return 1.0
    return float(normalised(expected) == normalised(answer))


def values_stand_in_sentence(row: Mapping[str, Any]) -> bool | str:
    """Whether every value of the column `order` stands in the column `sentence`, as it is written there."""
    record, sentence = row["order"], normalised(row["sentence"])
    for name, value in record.items():
        written = normalised(value if isinstance(value, str) else json.dumps(value))
        if not re.search(rf"(?<!\w){re.escape(written)}(?!\w)", sentence):
            return f"the sentence does not hold the {name} {written!r}"
    return True
