"""Each filter rejects what it names and nothing else, and sources give what stands in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_llama.errors import DataError
from lit_llama.generate.rows.attempt import Attempt
from lit_llama.generate.rows.checks import (
    evidence_answers_question,
    is_no_example,
    keeps_meaning,
    same_as_seed,
    sentence_at_place,
)
from lit_llama.generate.rows.filters import RowFilters
from lit_llama.generate.rows.recipe import Recipe, Source, read_recipe
from lit_llama.generate.rows.sources import Entry, Pool, cut, page_text
from lit_llama.text.inspect.duplicates import SIMILARITY, NearIndex

LONG = "Explain in some detail why the leaves of most trees turn red and yellow in the autumn of the year"


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    def make(**filters: Any) -> Recipe:
        text = {
            "columns": [{"name": "a", "template": "x"}],
            "output": {"alpaca": {"instruction": "{{ a }}", "output": "{{ a }}"}},
            "filters": filters,
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(text))
        return read_recipe(tmp_path / "r.yaml")

    return make


def attempt(prompt: str, answer: str, number: int = 0) -> Attempt:
    return Attempt(number=number, row={"instruction": prompt, "input": "", "output": answer})


@pytest.mark.parametrize(
    "prompt, answer, by",
    [
        ("Name a tree.", "Oak.", None),
        ("Name a tree.", "", "length"),
        ("Name a tree.", "I'm sorry, but I can't help with that.", "refusal"),
        ("What is in the attached image?", "A dog.", "media"),
        ("Sum up https://example.com/page", "It is short.", "media"),
        ("What is an image?", "A picture.", None),
        ("Name a tree.", "Caf\ufffd", "damaged"),
        ("Name a tree.", "Дуб растёт в лесу.", "script"),
        (" ", "Oak.", "empty"),
        ("name  a RIVER", "The  rhine", "duplicate"),
        ("Tell me the number of legs that a spider has", "8", "rouge"),
        (LONG, "Cold air stops the green.", "rouge"),
        ("Which river flows through Paris?", "The Seine.", "leakage"),
        ("which river flows THROUGH paris??", "The Seine.", "leakage"),
    ],
)
def test_the_filter_that_rejects(
    recipe: Callable[..., Recipe], tmp_path: Path, prompt: str, answer: str, by: str | None
) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"instruction": "Which river flows through Paris?", "output": "Seine"}))
    seeds = [
        Entry("seeds:1", {"instruction": "Tell me the number of legs a spider has", "input": "", "output": "Eight"})
    ]
    filters = RowFilters(recipe(scripts=["Latin"]), seeds, [test])
    filters.accept(attempt("Name a river", "The Rhine", 1))
    filters.accept(attempt(LONG.replace("red", "brown"), "Cold weather.", 2))
    found = filters.judge(attempt(prompt, answer, 3))
    assert (found and found[0]) == by
    if by == "duplicate":
        assert found is not None and "attempt 1" in found[1]
    if by == "leakage":
        assert found is not None and "test.jsonl: row 1" in found[1]


def test_filters_that_are_switched_off(recipe: Callable[..., Recipe]) -> None:
    filters = RowFilters(recipe(rouge=None, near_duplicates=False, refusals=False, media=False), [])
    filters.accept(attempt(LONG, "Cold weather.", 1))
    assert filters.judge(attempt(LONG, "I'm sorry, but I can't see this image", 2)) is None
    near = RowFilters(recipe(rouge=None), [])
    near.accept(attempt(LONG, "Cold weather.", 1))
    assert (near.judge(attempt(LONG, "Cold weather!", 2)) or [""])[0] == "near_duplicate"


@pytest.mark.parametrize("recent", [1, 7, 4096])
def test_near_rows_are_found_by_their_jaccard_similarity(recent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows came since the last merge."""
    monkeypatch.setattr("lit_llama.text.inspect.duplicates._RECENT", recent)

    def jaccard(one: str, other: str) -> float:
        left, right = ({text[at : at + 5] for at in range(len(text) - 4)} for text in (one, other))
        return len(left & right) / len(left | right)

    texts = [" ".join(f"word{(17 * row + 3 * at) % 101}" for at in range(30)) for row in range(40)]
    texts += [text.replace("word1", "other", 1 + number % 3) for number, text in enumerate(texts)]
    index, found = NearIndex(), 0
    for number, text in enumerate(texts):
        best = max((jaccard(text, other) for other in texts[:number]), default=0.0)
        nearest = index.nearest(text)
        assert (nearest is not None) == (best >= SIMILARITY)
        if nearest is not None:
            found += 1
            assert nearest[1] == pytest.approx(best) == pytest.approx(jaccard(text, texts[nearest[0]]))
        index.add(text)
    assert found > 20


def test_sources(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("town,people\n" + "".join(f"t{n},{n}\n" for n in range(7)))
    source = Source(name="seeds", rows=str(rows), draw=3, order="once")
    pool = Pool(source, 1)
    assert pool.attempts == 3
    drawn = [entry.value["town"] for number in range(3) for entry in pool.draw(number, [])]
    assert drawn == [f"t{n}" for n in range(7)]
    turns = Pool(Source(name="seeds", rows=str(rows), order="in_turn"), 1)
    assert [turns.draw(n, [])[0].value["town"] for n in (0, 6, 7)] == ["t0", "t6", "t0"]
    chance = Pool(Source(name="seeds", rows=str(rows), draw=4, accepted=2), 1)
    made = [Entry(f"attempt {n}", {"town": f"made {n}"}) for n in range(5)]
    for number in range(20):
        entries = chance.draw(number, made)
        assert entries == chance.draw(number, made)
        assert len({entry.where for entry in entries}) == 4
        assert sum(entry.where.startswith("attempt") for entry in entries) == 2
    assert len({tuple(e.where for e in chance.draw(n, [])) for n in range(20)}) > 10
    rows.write_text("")
    with pytest.raises(DataError):
        Pool(source, 1)


def test_documents_become_passages(tmp_path: Path) -> None:
    page = "<html><head><title>x</title><script>var a = '<p>no</p>';</script></head><body>"
    page += "<nav>menu</nav><h1>Big &amp; old</h1>"
    page += "<p>One <b>bold</b> word.</p><ul><li>first</li><li>second</li></ul></body></html>"
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.md").write_text("# Title\n\n" + "A sentence of words. " * 20 + "\n\nLast.")
    assert page_text(page) == "Big & old\n\nOne bold word.\n\nfirst\n\nsecond"
    pool = Pool(Source(name="documents", documents=(str(tmp_path),), length=100), 1)
    texts = [entry.value["text"] for entry in pool.entries if entry.value["file"] == "b.md"]
    assert all(len(text) <= 100 for text in texts) and texts[0].startswith("# Title") and texts[-1].endswith("Last.")
    assert " ".join(" ".join(texts).split()) == " ".join((tmp_path / "b.md").read_text().split())
    assert list(cut("x" * 250, 100)) == ["x" * 100, "x" * 100, "x" * 50]


@pytest.mark.parametrize(
    "question, answer, says",
    [
        ("Where does the river end?", "In the sea", True),
        ("Where does the river end?", "because it ends in the sea", True),  # 5 of 6 words, in their order
        ("Where does the river end?", "In the lake of Constance", "the words of the answer do not stand"),
        ("Where does the river end?", "sea the in", "the words of the answer do not stand"),
        ("The river ends in the sea.", "the sea", "it is no question"),
        ("Why is it so?", "the sea", "the question has no word of the passage"),
        ("Does the river end in the sea?", "in the sea", "the question holds its answer"),
        ("Where does the river end?", "?!", "the words of the answer do not stand"),
    ],
)
def test_a_question_is_answered_by_its_evidence(question: str, answer: str, says: bool | str) -> None:
    row = {"documents": {"text": "# The Rhine\n\nThe river is 1233 km long. It ends in the sea."}}
    found = evidence_answers_question(
        {**row, "evidence": "It ends in the sea.", "made": {"question": question, "answer": answer}}
    )
    assert found is True if says is True else isinstance(found, str) and found.startswith(str(says))


def test_sentences_of_a_passage_take_turns() -> None:
    text = "# A heading that is long enough\n\nThe first sentence is here. And here, at last,\n\n"
    text += "Is 3.5 more than the second one? 一二三四五六七八九十一二三四五六七八九十。"
    found = [sentence_at_place({"documents": {"text": text}, "place": place}) for place in range(4)]
    assert found[0] == found[3] == "The first sentence is here."
    assert found[1] == "Is 3.5 more than the second one?" and found[2].startswith("一二")
    assert sentence_at_place({"documents": {"text": "# Only a heading"}, "place": 3}) == ""


def test_checks() -> None:
    old = {"seeds": {"instruction": "How long is the Rhine, 1233 km?", "output": '{"a": 1, "b": 2.0}'}}
    assert keeps_meaning(old | {"wording": "The Rhine: is it 1233 km long?"}) is True
    assert keeps_meaning(old | {"wording": "how long is the rhine, 1233 km"}) == "nothing was reworded"
    assert keeps_meaning(old | {"wording": "Is the Rhine 1234 km long?"}) == "the numbers are other ones"
    assert keeps_meaning(old | {"wording": "Is it 1233 km long?"}) == "Rhine is missing"
    assert "only 2 of 7 words are kept" in str(
        keeps_meaning(old | {"wording": "Rhine boats weigh 1233 tons, you know"})
    )
    assert same_as_seed('{"b": 2, "a": 1}', old) == 1 and same_as_seed('{"b": 2}', old) == 0
    assert same_as_seed("so 1,200 it is", {"seeds": {"output": "#### 1200"}}) == 1
    examples = {"examples": [{"task": "Plan a trip to Rome.", "change": "add one"}]}
    assert is_no_example(examples | {"made": {"task": "Plan a trip to Oslo and back by train."}}) is True
    copied = is_no_example(examples | {"made": {"task": "Please, plan a trip to Rome, and pack."}})
    assert copied == "it is the example 'Plan a trip to Rome.'"


def test_columns_that_are_compared_instead_of_the_prompt(tmp_path: Path) -> None:
    """Catches rows that repeat a long passage and are all taken for near copies of the first."""
    text = {
        "columns": [{"name": "question", "template": "x"}],
        "output": {"alpaca": {"instruction": "{{ question }}", "output": "y"}},
        "filters": {"compare": ["question"]},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(text))
    filters = RowFilters(read_recipe(tmp_path / "r.yaml"), [])

    def asked(question: str, answer: str, number: int) -> Attempt:
        row = {"instruction": question, "input": LONG * 9, "output": answer}
        return Attempt(number=number, row=row, values={"question": question})

    filters.accept(asked("Which leaves turn red in the autumn of the year?", "most", 0))
    assert filters.judge(asked("Why do they turn at all?", "Cold air stops the green.", 1)) is None
    near = filters.judge(asked("Which leaves turn red in the autumn of a year?", "most", 2))
    assert near is not None and near[0] == "rouge"
