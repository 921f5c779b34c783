"""Findings against planted rows, brute force over sets, and Unicode's own names."""

import itertools
import random
import string
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from lit_llama.text.dataset.split import normalised
from lit_llama.text.inspect import duplicates
from lit_llama.text.inspect.characters import SCRIPTS, TROUBLE, count_characters
from lit_llama.text.inspect.duplicates import SIMILARITY, NearDuplicates, earliest, partners
from lit_llama.text.inspect.findings import PERCENTILES, REFUSALS, Findings, lengths, refused

Row = tuple[str, str, str]  # split, prompt, answer


def find(rows: Iterable[Row], *, near_duplicates: int = 200_000) -> dict[str, Any]:
    """Rows in, findings out; every listed pair carries its text."""
    given = list(rows)
    findings = Findings(near_duplicates=near_duplicates)
    for number, (split, prompt, answer) in enumerate(given):
        findings.add(number, f"rows.json:row {number}", split, prompt, answer, len(answer) + 5, len(answer))
    return findings.result(lambda row: given[row][1:])


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randrange(2, 9))) for _ in range(count))


def jaccard(first: str, second: str) -> float:
    """By definition: sets of five characters."""
    one, other = ({text[i : i + 5] for i in range(max(len(text) - 4, 1))} for text in (first, second))
    return len(one & other) / len(one | other)


def edit(draw: random.Random, text: str) -> str:
    """One word in forty replaced, as somebody does who reworks a row."""
    parts = text.split()
    for index in draw.sample(range(len(parts)), max(len(parts) // 40, 1)):
        parts[index] = words(draw, 1)
    return " ".join(parts)


def test_planted_duplicates_across_the_splits_are_all_found_and_none_in_random_text() -> None:
    """A kind of leakage that goes unseen, a row counted twice, or an alarm about rows that share nothing."""
    draw = random.Random(0)
    train = [("train", words(draw, 12), words(draw, draw.randrange(30, 120))) for _ in range(1200)]
    assert all(find(train)["duplicates"][kind]["rows"] == 0 for kind in ("exact", "normalised", "near"))
    exact = [("test", p, a) for _, p, a in train[:100]]
    spaced = [("test", f"  {p}\n", a.replace(" ", "\t ")) for _, p, a in train[100:200]]
    cased = [("test", p.upper(), a.title()) for _, p, a in train[200:300]]
    near = [("test", p, edit(draw, a)) for _, p, a in train[300:500]]
    fresh = [("test", words(draw, 12), words(draw, 60)) for _ in range(200)]
    planted = sum(
        jaccard(f"{p}\n{a}", f"{q}\n{b}") >= SIMILARITY
        for (_, p, a), (_, q, b) in zip(train[300:500], near, strict=True)
    )
    assert planted > 150
    rows = train + exact + spaced + cased + near + fresh
    found = find(rows)
    leakage = found["leakage"]
    assert (leakage["exact"]["rows"], leakage["normalised"]["rows"]) == (100, 200)
    assert 0.95 * planted <= leakage["near"]["rows"] <= 200
    assert leakage["rows"] == sum(leakage[kind]["rows"] for kind in ("exact", "normalised", "near"))
    assert leakage["share"] == leakage["rows"] / 700
    for kind in ("exact", "normalised", "near"):
        assert found["duplicates"][kind]["rows"] == leakage[kind]["rows"]
        assert len(leakage[kind]["pairs"]) == 20
        for pair in leakage[kind]["pairs"]:
            assert (pair["first"]["split"], pair["second"]["split"]) == ("train", "test")
            before, after = pair["first"]["row"], pair["second"]["row"]
            assert after - before == 1200 and pair["second"]["where"] == f"rows.json:row {after}"


def test_near_duplicates_are_those_of_brute_force() -> None:
    """Pairs missed or invented by hashing, banding, or the sketch of a long row."""
    draw = random.Random(1)
    texts = [words(draw, draw.choice((2, 5, 20, 60, 200))) for _ in range(150)]
    texts += [edit(draw, draw.choice(texts[:150])) for _ in range(100)] + ["a", "ab", "", "abcd"]
    near = NearDuplicates(1000)
    for start in range(0, len(texts), 37):
        near.add(texts[start : start + 37])
    first, second, similarity = near.pairs(np.ones(len(texts), bool))
    found = dict(zip(zip(first.tolist(), second.tolist(), strict=True), similarity.tolist(), strict=True))
    for i, j in itertools.combinations(range(len(texts)), 2):
        truth = jaccard(texts[i].ljust(5), texts[j].ljust(5))
        whole = max(len(texts[i]), len(texts[j])) <= 260
        if truth >= (SIMILARITY if whole else SIMILARITY + 0.1):
            assert (i, j) in found, (texts[i], texts[j], truth)
        if (i, j) in found:
            assert found[i, j] == pytest.approx(truth, abs=1e-9 if whole else 0.1)
    assert len(found) > 50


def test_many_rows_that_are_alike_are_found_without_comparing_all() -> None:
    """A templated data set whose one bucket costs the square of its rows, or hides the leak."""
    draw = random.Random(2)
    base = words(draw, 60)
    rows = [("train", base, f"{number:05}") for number in range(3000)] + [("test", base, "no number")]
    found = find(rows)
    assert found["duplicates"]["near"]["rows"] > 2990
    assert found["leakage"]["near"]["rows"] == 1


def test_a_near_duplicate_of_a_repeated_row_leaks() -> None:
    """Only the first of equal rows is compared: its twins in the other split must not be forgotten."""
    draw = random.Random(3)
    prompt, answer = words(draw, 5), words(draw, 60)
    changed = edit(draw, answer)
    found = find([("test", prompt, answer), ("train", prompt, changed), ("test", prompt, answer.upper())])
    assert found["leakage"]["near"]["rows"] == 2
    found = find([("test", prompt, answer), ("test", prompt, changed), ("train", prompt, changed)])
    assert (found["leakage"]["exact"]["rows"], found["leakage"]["near"]["rows"]) == (1, 1)


def test_above_the_limit_near_duplicates_are_not_looked_for_and_that_is_said() -> None:
    """A check that is silently skipped, or that fills the memory."""
    rows = [("train", f"say {number}", "x" * 50) for number in range(30)]
    assert find(rows, near_duplicates=30)["near_duplicates_checked"] is True
    found = find(rows, near_duplicates=29)
    assert found["near_duplicates_checked"] is False
    assert "near" not in found["duplicates"] and "near" not in found["leakage"]


def test_one_prompt_with_several_answers_is_a_conflict() -> None:
    """Equal answers taken for a conflict, a prompt in other case that escapes, or plain text without prompts."""
    rows = [
        *[("train", "Capital of France?", "Paris"), ("train", "Two?", "2"), ("train", "capital of  FRANCE?", "PARIS")],
        *[("test", "CAPITAL OF FRANCE?", "Lyon"), ("test", "Two?", "2 "), ("train", "Three?", "3")],
        *[("train", "", "some text"), ("train", "", "other text")],
    ]
    found = find(rows)["conflicting"]
    assert (found["prompts"], found["rows"], found["prompts_in_train_and_test"]) == (1, 3, 1)
    [pair] = found["pairs"]
    assert (pair["first"]["row"], pair["second"]["row"]) == (0, 3)
    assert (pair["first"]["answer"], pair["second"]["answer"]) == ("Paris", "Lyon")


def test_pairs_show_the_text_around_their_difference() -> None:
    """Two long texts listed by their equal beginnings."""
    start = " ".join(map(str, range(400)))
    found = find([("train", "p", f"{start} north {start}"), ("train", "p", f"{start} south {start}")])
    pair = found["duplicates"]["near"]["pairs"][0]
    assert "398 399 north" in pair["first"]["answer"] and "398 399 south" in pair["second"]["answer"]
    assert len(pair["first"]["answer"]) < 350 and pair["first"]["prompt"] == "p"


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but as an AI language model, I cannot do that.",
        "I’m sorry, but I can’t help with that.",
        "Es tut mir leid, aber ich kann das nicht.",
        "Je suis désolé, mais je ne peux pas répondre.",
        "Lo siento, pero no puedo ayudarte.",
        "Извините, но я не могу ответить.",
        "很抱歉，我无法回答。",
        "申し訳ありませんが、お答えできません。",
    ],
)
def test_refusals_are_recognised(answer: str) -> None:
    """A typographic apostrophe or a full-width comma that hides one."""
    assert refused(normalised(answer))


@pytest.mark.parametrize(
    "answer", ["I am sorry for your loss.", "AI is a field of study.", "Paris", "x" * 300 + "as an ai,"]
)
def test_answers_that_are_no_refusals(answer: str) -> None:
    """An apology in a letter that is counted as a refusal."""
    assert not refused(normalised(answer))


def test_every_refusal_has_its_sign() -> None:
    """A phrase that is never looked for, as no sign of it was listed."""
    assert all(refused(f"{phrase} that.") for phrase in REFUSALS)


def test_empty_short_and_untrained_answers_are_counted() -> None:
    """An answer of spaces that passes for one."""
    found = find([("train", "a", " \n"), ("train", "b", "7"), ("train", "c", "yes"), ("train", "d", "")])
    assert found["answers"]["empty"]["rows"] == 2 and found["answers"]["short"]["rows"] == 1
    assert found["untrained"]["listed"] == [{"row": 3, "where": "rows.json:row 3", "split": "train"}]


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("caf\ufffd", "replacement character"),
        ("nul \0 here", "NUL"),
        ("bell \x07", "control character"),
        ("in the\ufeff middle", "byte order mark"),
        ("zero\u200bwidth", "zero-width character"),
        ("half \ud83d of it", "lone surrogate"),
        ("icon \ue012", "private use"),
        *[
            (text.encode().decode("cp1252", "replace").replace("\ufffd", "\x9d"), "mojibake")
            for text in ("café", "don’t", "naïve — so", "привет", "😀", "Größe")
        ],
    ],
)
def test_damaged_text_is_recognised(text: str, trouble: str) -> None:
    """A wrong encoding that reaches the model."""
    assert [name for name, rows in find([("train", "p", text)])["encoding"].items() if rows["rows"]] == [trouble]


@pytest.mark.parametrize(
    "text",
    [
        "Zoë's naïve café: 5 °C, «voilà», £3 — “quoted” Spaß“",
        "tab\tline\r\n",
        "👨‍👩‍👧 می‌خواهم",
        "Ελλάδα Привет 北京 한국 ひらがな",
    ],
)
def test_sound_text_is_not_called_damaged(text: str) -> None:
    """French quotes, joined emoji or Persian taken for damage."""
    assert not any(entry["rows"] for entry in find([("train", "p", text)])["encoding"].values())


def test_scripts_are_those_of_unicode_names() -> None:
    """A block boundary off by one, or a script that is counted as another."""
    first_word = {"CJK": "Han", "HIRAGANA": "Hiragana", "KATAKANA": "Katakana"}
    first_word |= {name.upper(): name for name in SCRIPTS if name not in ("Han", "other")}
    letters = [chr(code) for code in range(0x30000) if chr(code).isalpha()]
    counts, _ = count_characters(letters)
    assert (counts.sum(axis=1) == 1).all(), "every letter is of one script"
    given = [SCRIPTS[index] for index in counts.argmax(axis=1)]
    wrong = [
        (hex(ord(letter)), script)
        for letter, script in zip(letters, given, strict=True)
        if first_word.get(unicodedata.name(letter, "").split(" ")[0], script) != script
        and not (script == "other" and ord(letter) > 0xFFFF)  # rare extensions of known scripts
    ]
    assert wrong == []


def test_scripts_of_rows_and_letters() -> None:
    """A Chinese row called Latin for its few names, or digits counted as letters."""
    rows = [("train", "hi", "there 12!"), ("train", "介绍", "北京是中国的首都 OK"), ("train", "1", "2")]
    found = find(rows)["scripts"]
    assert found["rows_without_letters"] == 1 and found["letters"] == 7 + 12
    assert found["by_script"]["Latin"]["rows"] == 1 and found["by_script"]["Han"]["letters"] == 10
    assert sum(entry["share_of_letters"] for entry in found["by_script"].values()) == pytest.approx(1)


@pytest.mark.parametrize("values", [[3], [0, 0, 1], list(range(1000)), [1, 5_000_000], [256] * 9 + [17]])
def test_histogram_and_percentiles(values: list[int]) -> None:
    """A last bin that is lost, more bins than can be drawn, or percentiles that no row has."""
    found = lengths(values)
    width, counts = found["histogram"]["width"], found["histogram"]["counts"]
    assert sum(counts) == len(values) and len(counts) <= 40 and found["sum"] == sum(values)
    assert counts == [sum(k * width <= v < (k + 1) * width for v in values) for k in range(len(counts))]
    ordered = sorted(values)
    names = list(found["percentiles"].values())
    for percent, value in zip(PERCENTILES, names, strict=True):
        assert value == ordered[max(-(-percent * len(values) // 100) - 1, 0)]


def test_places_come_back_as_they_were_given() -> None:
    """A row number that loses its zeros, or a file's name that loses its digits."""
    places = ["a.json:row 0", "a.json:row 17", "b2.json:007", "no number", "", "9" * 30, "data-2:0"]
    findings = Findings()
    for number, where in enumerate(places):
        findings.add(100 + number, where, "train", f"p{number}", f"answer {number}", 90 - number, 3)
    longest = findings.result()["longest"]
    assert [(row["row"], row["where"], row["tokens"]) for row in longest] == [
        (100 + number, where, 90 - number) for number, where in enumerate(places)
    ]
    assert findings.lengths_of("train").tolist() == [90 - number for number in range(len(places))]
    assert findings.lengths_of("test").tolist() == []


def test_no_rows_at_all() -> None:
    """A division by zero."""
    found = find([])
    assert found["rows"] == 0 and found["lengths"]["tokens"]["histogram"]["counts"] == []
    assert set(found["encoding"]) == set(TROUBLE)


def test_the_same_rows_give_the_same_findings_in_another_process() -> None:
    """Python's hash of strings, which differs from run to run."""
    program = (
        "import json, random; from lit_llama.text.inspect.findings import Findings\n"
        "f = Findings(); d = random.Random(4)\n"
        "for i in range(300): f.add(i, f'r:{i}', 'train', str(d.randrange(200)), str(d.randrange(9)) * 30, 9, 5)\n"
        "print(json.dumps(f.result()))"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1


def test_earliest_and_partners_against_loops() -> None:
    """An unstable sort that names a later twin."""
    draw = random.Random(5)
    keys = [draw.randrange(40) for _ in range(200)]
    sought = [draw.random() < 0.5 for _ in keys]
    assert earliest(np.array(keys, np.uint64)).tolist() == [keys.index(key) for key in keys]
    among = [row for row in range(200) if not sought[row]]
    wanted = [next((o for o in among if keys[o] == keys[row]), -1) if sought[row] else -1 for row in range(200)]
    mask = np.array(sought)
    assert partners(np.array(keys, np.uint64), mask, ~mask).tolist() == wanted
    assert partners(np.array(keys, np.uint64), mask, np.zeros(200, bool)).tolist() == [-1] * 200


def test_memory_stays_small() -> None:
    """Texts or Python objects kept of every row: two million rows must fit in a few hundred MB."""
    import tracemalloc

    findings = Findings(near_duplicates=0)
    tracemalloc.start()
    try:
        for number in range(40_000):
            findings.add(number, f"rows.json:row {number}", "train", f"prompt {number}", "an answer " * 20, 60, 40)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / 40_000 < 150  # bytes a row, of which a batch still waiting takes the most


def test_bins_without_a_hash_borrow_from_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortcut that borrows from another bin than the next, or from itself once around."""
    monkeypatch.setattr(duplicates, "_BLOCK", 3)
    draw = np.random.Generator(np.random.PCG64(8))
    rows = [np.unique(draw.integers(0, 2**32 - 1, count, np.uint32)) for count in (1, 2, 5, 40, 128, 256, 256, 3)]
    minima = duplicates._minima(np.concatenate(rows), np.cumsum([0, *map(len, rows)])[:-1], np.array([*map(len, rows)]))
    for hashes, found in zip(rows, minima, strict=True):
        bins = [min((int(h) for h in hashes if h % 128 == k), default=None) for k in range(128)]
        for k in range(128):
            way = next(way for way in range(128) if bins[(k + way) % 128] is not None)
            borrowed = bins[(k + way) % 128]
            assert borrowed is not None and found[k] == (borrowed + way * 0x9E3779B1) % 2**32


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that depend on which thread was first, or on how many there are."""
    draw = random.Random(9)
    base = [words(draw, 30) for _ in range(40)]
    texts = [edit(draw, draw.choice(base)) for _ in range(400)]
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(duplicates, "cores", lambda threads=threads: threads)
        near = NearDuplicates(1000)
        near.add(texts)
        found.append([column.tolist() for column in near.pairs(np.ones(len(texts), bool))])
    assert found[0] == found[1] and len(found[0][0]) > 1000
