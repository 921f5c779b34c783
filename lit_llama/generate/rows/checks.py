"""Checks and scores of the recipes that ship; those of others are as simple.

A check is called with the values of a row, by the names of sources and columns: it gives True, or False, or why not. A
score is called with a candidate and those values: the more, the better, and 0 for a wrong one.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from lit_llama.text.read.raw import STRICTEST
from lit_llama.text.split import normalised

_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_NAME = re.compile(r"(?<![.!?:]\s)(?<!^)\b[A-ZÀ-Þ][\w'-]+")


def evidence_stands_in_documents(row: Mapping[str, Any]) -> bool | str:
    """Whether the evidence of an answer stands in the passage, word for word, and no question asks for itself."""
    made, passage = row["made"], normalised(row["documents"]["text"])
    if normalised(made["evidence"]).strip(" .\"'") not in passage:
        return "the evidence does not stand in the passage"
    if normalised(made["answer"]) in normalised(made["question"]):
        return "the question holds its answer"
    return True


def keeps_numbers_and_names(row: Mapping[str, Any]) -> bool | str:
    """Whether a new wording has the numbers and names of the old one, and no other numbers."""
    old, new = row["seeds"]["instruction"], row["wording"]
    if normalised(old) == normalised(new):
        return "nothing was reworded"
    if sorted(_NUMBER.findall(old)) != sorted(_NUMBER.findall(new)):
        return "the numbers are other ones"
    if missing := [name for name in _NAME.findall(old) if name.casefold() not in new.casefold()]:
        return f"{missing[0]} is missing"
    return True


def same_as_seed(answer: str, row: Mapping[str, Any]) -> float:
    """1 for an answer that is that of the seed: as JSON by value, by its last number, or as words."""
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
