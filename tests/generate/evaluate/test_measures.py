"""Answers beside their references."""

import math
import unicodedata
from typing import Any

import pytest

from lit_llama.errors import UserError
from lit_llama.generate import metrics
from lit_llama.generate.metrics import Answer, measure, notes, regex_match
from lit_llama.text.message import instruct


def measured(reference: str, text: str) -> dict[str, Any]:
    return measure([instruct("x", "", reference)], [Answer(text, True, 3)])


@pytest.mark.parametrize(
    ("reference", "text", "exact", "same_json"),
    [
        ('{"a": 1, "b": [2]}', '{"a": 1, "b": [2]}', 1.0, 1.0),
        ('{"a": 1, "b": [2]}', ' {"a": 1, "b": [2]}\n', 1.0, 1.0),
        ('{"a": 1, "b": [2]}', '{"b":[2],\n"a":1}', 0.0, 1.0),
        ('{"a": {"x": 1, "y": 2}}', '{"a": {"y": 2, "x": 1}}', 0.0, 1.0),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', 0.0, 0.0),
        ('{"a": [1, 2]}', '{"a": [1, 2, 2]}', 0.0, 0.0),
        ('{"a": "é"}', '{"a": "\\u00e9"}', 0.0, 1.0),
        ('{"é": "é"}', '{"e\\u0301": "e\\u0301"}', 0.0, 1.0),
        ('{"a": 1}', '{"a": true}', 0.0, 0.0),
        ('{"a": 0}', '{"a": false}', 0.0, 0.0),
        ('{"a": null}', '{"a": false}', 0.0, 0.0),
        ('{"a": 1}', '{"a": "1"}', 0.0, 0.0),
        ('{"p": 5}', '{"p": 5.0}', 0.0, 1.0),
        ('{"p": [100, -0.0]}', '{"p": [1e2, 0]}', 0.0, 1.0),
        ('{"a": 1.5}', '{"a": 1.50}', 0.0, 1.0),
        ('{"a": 0.1}', '{"a": 0.10000000000000001}', 0.0, 0.0),  # one float, but two numbers
        ('{"a": 9007199254740993}', '{"a": 9007199254740992}', 0.0, 0.0),
        ('{"a": 1e400}', '{"a": 1e401}', 0.0, 0.0),
        ('{"a": 1}', '{"a": 1e99999999999999999999}', 0.0, 0.0),
        ('{"a": 1}', '{"a": ' + "1" * 5000 + "}", 0.0, 0.0),
        ('{"a": 1}', '{"a": 2, "a": 1}', 0.0, 0.0),
        ('{"a": 1}', '{"a": NaN}', 0.0, 0.0),
        ('{"a": 1}', '{"a": Infinity}', 0.0, 0.0),
        ('{"a": null}', "{}", 0.0, 0.0),
        ("null", "", 0.0, 0.0),
        ("null", "null", 1.0, 1.0),
        ('{"a": 1}', '{"a": 1', 0.0, 0.0),
        ('{"a": 1}', 'Here it is: {"a": 1}', 0.0, 0.0),
        ('{"a": 1}', "[" * 100_000, 0.0, 0.0),
    ],
)
def test_json_is_compared_by_value(reference: str, text: str, exact: float, same_json: float) -> None:
    """Comparing texts, Python's 1 == True, floats that round two numbers to one, the last of two keys, or a crash on
    what is no JSON."""
    assert measured(reference, text) == {"rows": 1, "stopped": 1.0, "exact_match": exact, "json_match": same_json}


@pytest.mark.parametrize("reference", ['{"a": NaN}', '{"a": 1, "a": 1}', '{"a": -Infinity}'])
def test_references_that_are_no_json_have_no_json_measure(reference: str) -> None:
    """NaN that equals NaN because both are written so, or not because it never does."""
    assert "json_match" not in measured(reference, reference)


def test_plain_text_references_have_no_json_measure() -> None:
    """A share of 0 % where there is nothing to compare."""
    assert measured("two lamps", "two lamps ") == {"rows": 1, "stopped": 1.0, "exact_match": 1.0}
    mixed = measure([instruct("x", "", "{}"), instruct("x", "", "no")], [Answer("{}", True, 1), Answer("no", True, 1)])
    assert "json_match" not in mixed and mixed["exact_match"] == 1.0


def test_rows_without_reference_count_only_as_answered() -> None:
    """Rows without reference counted as wrong, or a division by zero where no row has one."""
    answers = [Answer("a", True, 1), Answer("b", False, 1), Answer("", True, 1), Answer("d", False, 1)]
    examples = [instruct("x", "", "a"), instruct("x", "", "B"), instruct("x"), instruct("x")]
    assert measure(examples, answers) == {"rows": 4, "stopped": 0.5, "exact_match": 0.5}
    assert measure(examples[2:], answers[2:]) == {"rows": 2, "stopped": 0.5}


def test_letters_that_unicode_spells_in_two_ways_are_equal_and_that_is_said() -> None:
    """An answer that nobody could tell from its reference counted as wrong, or counted as right without a word."""
    words = ["Zoë's naïve café", "Zoë", "over"]
    examples = [instruct("x", "", unicodedata.normalize("NFD", word)) for word in words]
    answers = [Answer(words[0], True, 1), Answer("zoë", True, 1), Answer("over", True, 1)]
    assert measure(examples, answers)["exact_match"] == pytest.approx(2 / 3)
    [note] = notes(examples, answers)
    assert note.startswith("1 of the exact matches") and "NFC" in note
    assert notes(examples[2:], answers[2:]) == []


def test_control_tokens_that_answers_spell_are_measured() -> None:
    """A model trained on typed ends, which prints them to its users, and whose exact match of 100 % hides it."""
    control = ["<|im_start|>", "<|im_end|>"]
    examples = [instruct("x", "", "four<|im_end|>"), instruct("x", "", "five<|im_end|>"), instruct("x", "", "six")]
    answers = [Answer("four<|im_end|>", True, 4), Answer("5<|im_end|><|im_end|>", True, 4), Answer("six", True, 1)]
    found = measure(examples, answers, control)
    assert math.isclose(found["exact_match"], 2 / 3) and math.isclose(found["control_tokens_spelled"], 2 / 3)
    [note] = notes(examples, answers, control)
    assert note.startswith("2 of 3 answers and 2 of 3 references spell <|im_end|> as text")
    assert "control_tokens_spelled" not in measure(examples[2:], answers[2:], control)
    assert notes(examples[2:], answers[2:], control) == []


def test_how_an_answer_ended_is_named_as_elsewhere() -> None:
    """The two reasons exchanged."""
    assert (Answer("", True, 1).finish_reason, Answer("", False, 1).finish_reason) == ("stop", "length")


def test_a_pattern_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluation that hangs once all is answered: each letter more takes twice as long."""
    assert not regex_match("(a+)+$", "", "a" * 60 + "!")
    monkeypatch.setattr(metrics, "_SECONDS", 0.01)
    for pattern in (r"^(?:a|a)*(?:b|b)*$", r"^(a|a)*(b|b)*$"):
        with pytest.raises(UserError, match=r"not matched within 0.01 s to an answer of 61 characters"):
            regex_match(pattern, "", "a" * 60 + "c")
    assert regex_match(r"#### (-?[\d,.]+)", "#### 1000", "so\n#### 7\n#### 1,000")
