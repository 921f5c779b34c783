"""ROUGE-L and its index, against the table of the textbook and all pairs."""

import random

from lit_llama.generate.rows.filters import RougeIndex, common, rouge_l, words_of


def table(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, cell by cell."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row[:]
        for j, found in enumerate(other):
            row[j + 1] = before[j] + 1 if found == word else max(before[j + 1], row[j])
    return row[-1]


def texts(count: int, seed: int, vocabulary: int = 30) -> list[list[str]]:
    """Random texts, many of them changed from an earlier one, so that every degree of likeness occurs."""
    chance = random.Random(seed)
    found: list[list[str]] = []
    for _ in range(count):
        if found and chance.random() < 0.7:
            words = [w for w in chance.choice(found) if chance.random() < 0.9]
            for _ in range(chance.randrange(4)):
                words.insert(chance.randrange(len(words) + 1), f"w{chance.randrange(vocabulary)}")
        else:
            words = [f"w{int(vocabulary * chance.random() ** 2)}" for _ in range(chance.randrange(1, 30))]
        found.append(words)
    return found


def test_the_common_subsequence_is_that_of_the_table() -> None:
    found = texts(40, 1, 5)
    for one, other in zip(found, reversed(found), strict=True):
        assert common(one, other) == table(one, other)


def test_the_index_finds_what_comparing_all_pairs_finds() -> None:
    for threshold in (0.3, 0.7, 1.0):
        index, found = RougeIndex(threshold), texts(80, 2)
        for number, words in enumerate(found):
            expected = max(
                ((2 * table(words, o) / max(1, len(words) + len(o)), -i) for i, o in enumerate(found[:number])),
                default=(0, 0),
            )
            nearest = index.nearest(words)
            if expected[0] >= threshold:
                assert nearest is not None and nearest[1] == expected[0] and nearest[0] == -expected[1]
            else:
                assert nearest is None
            index.add(words)


def test_few_pairs_are_compared() -> None:
    index, found = RougeIndex(0.7), texts(600, 3, 2000)
    for words in found:
        index.nearest(words)
        index.add(words)
    assert index.compared < 20 * len(found)  # all pairs are 300 a text


def test_words_are_those_of_rouge_score() -> None:
    assert words_of("Don't  PAY $5,000_now — Zoë!") == ["don", "t", "pay", "5", "000", "now", "zoë"]
    assert words_of("北京 is big") == ["北", "京", "is", "big"]
    assert rouge_l(words_of("the cat sat"), words_of("The cat, it sat")) == 6 / 7
    assert rouge_l([], ["a"]) == 0 and RougeIndex(0.7).nearest([]) is None
