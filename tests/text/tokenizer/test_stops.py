"""Stop texts in a stream, against a search in the whole text."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.text_model import AnswerText
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.stream import StopFinder


def expected(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop that is whole first, the longest of those; by trying every end."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


WORDS = st.text("ab\n", min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.text("ab\n", max_size=30), st.lists(WORDS, max_size=4), st.randoms())
def test_a_stop_text_is_found_however_the_text_is_cut(text: str, stops: list[str], chance: random.Random) -> None:
    """Text given out that belongs to a stop text, text held back that cannot, an overlap that is missed (aab in aaab),
    and a result that depends on the pieces."""
    finder, given_out, seen = StopFinder(stops), "", ""
    wanted, stopped = expected(text, stops)
    rest = text
    while rest:
        size = chance.randint(1, 4)
        piece, rest = rest[:size], rest[size:]
        seen += piece
        given_out += finder.push(piece)
        assert wanted.startswith(given_out)
        if not finder.found:
            open_ = [seen[len(given_out) :]] if len(given_out) < len(seen) else []
            assert all(any(stop.startswith(part) for stop in stops) for part in open_), "held back for nothing"
    assert (given_out + finder.flush(), finder.found) == (wanted, stopped)
    assert finder.found is False or finder.push("more") == ""


def test_a_thousand_stop_texts_cost_what_one_does() -> None:
    """A search for each of them at each piece: counted by the steps in the tree."""
    stops = [f"stop {number:03} here" for number in range(1000)]
    finder = StopFinder(stops)
    assert finder.push("a text with no end. " * 500) == "a text with no end. " * 500
    assert len(finder._tree) == 1 and finder.push("stop 512 her") == ""
    assert finder.push("e") == "" and finder.found


@dataclass
class Case:
    """A text, its ids, and what ends it."""

    tokenizer: Tokenizer
    ids: list[int]
    end: int


@pytest.fixture
def case(tiny_folder: Path) -> Case:
    tokenizer = Tokenizer.from_path(tiny_folder)
    return Case(tokenizer, tokenizer.encode("Zoë: 北京 😀! and 😀 again"), 2)


def run(case: Case, ids: Sequence[int], **sampling: Any) -> tuple[str, AnswerText]:
    text, shown = AnswerText(case.tokenizer, Sampling(**sampling), {case.end}), ""
    for token in ids:
        assert text.finish_reason is None, "went on after its end"
        shown += text.push(token)
        if text.finish_reason:
            break
    return shown, text


def test_a_stop_text_may_be_spread_over_tokens_and_bytes(case: Case) -> None:
    """A character of several bytes, each a token of its own, that is never seen whole."""
    cut = [case.tokenizer.decode(case.ids[:n]).endswith("\ufffd") for n in range(len(case.ids))]
    assert sum(cut) == 3, "characters were to be cut"
    for stop, wanted in (
        ("😀", "Zoë: 北京 "),
        ("京 😀!", "Zoë: 北"),
        ("ë", "Zo"),
        ("Z", ""),
        (" again", "Zoë: 北京 😀! and 😀"),
    ):
        shown, text = run(case, case.ids, stop=[stop])
        assert (shown, text.finish_reason) == (wanted, "stop")
    shown, text = run(case, case.ids, stop=["none of it", "again!"])
    assert (shown + text.abort(), text.finish_reason) == ("Zoë: 北京 😀! and 😀 again", "abort")


def test_how_an_answer_ended_is_known(case: Case) -> None:
    """A limit taken for an end, an end at the very limit for a limit, and what was held back lost."""
    shown, text = run(case, [*case.ids, case.end], max_new_tokens=len(case.ids) + 1, stop=["again!"])
    assert (shown, text.finish_reason, text.tokens) == ("Zoë: 北京 😀! and 😀 again", "stop", len(case.ids) + 1)
    shown, text = run(case, case.ids, max_new_tokens=len(case.ids), stop=["again!"])
    assert (shown, text.finish_reason) == ("Zoë: 北京 😀! and 😀 again", "length")
    shown, text = run(case, case.ids, max_new_tokens=len(case.ids), stop=["again"])
    assert (shown, text.finish_reason) == ("Zoë: 北京 😀! and 😀 ", "stop")
    cut = next(n for n in range(len(case.ids)) if case.tokenizer.decode(case.ids[:n]).endswith("\ufffd"))
    shown, text = run(case, case.ids, max_new_tokens=cut)
    assert (shown, text.finish_reason) == (case.tokenizer.decode(case.ids[:cut]), "length")


def test_no_stop_text_ends_an_answer_before_its_least_tokens(case: Case) -> None:
    """A stop text at the beginning, where more was wanted."""
    ids = case.tokenizer.encode("a b a b a b")
    shown, text = run(case, ids, stop=["b"], min_new_tokens=len(case.tokenizer.encode("a b a")))
    assert (shown, text.finish_reason) == ("a b a ", "stop")
