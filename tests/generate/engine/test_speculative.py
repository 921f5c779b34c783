"""Guesses from the text so far."""

from lit_llama.generate.engine.speculative import PromptLookup


def test_what_followed_the_last_ids_before_is_guessed() -> None:
    lookup = PromptLookup(most=3)
    assert lookup.guess([1, 2, 3, 4, 5, 9, 2, 3], room=9) == [4, 5, 9]
    assert lookup.guess([1, 2, 3, 4, 5, 9, 2, 3], room=2) == [4, 5]
    assert lookup.guess([1, 2, 3, 4, 5, 9, 2, 3, 7, 7], room=9) == []


def test_the_longest_and_then_the_latest_counts() -> None:
    lookup = PromptLookup(most=1)
    assert lookup.guess([1, 2, 3, 8, 2, 3, 7, 1, 2, 3], room=9) == [8], "1 2 3 was followed by 8; 2 3 last by 7"
    assert PromptLookup(most=1).guess([2, 3, 8, 2, 3, 7, 2, 3], room=9) == [7]


def test_ids_that_are_all_alike_are_guessed_on() -> None:
    assert PromptLookup(most=4).guess([5] * 9, room=9)[:1] == [5]


def test_guessing_pauses_where_it_does_not_pay() -> None:
    lookup = PromptLookup()
    ids = [1, 2] * 20
    for _ in range(PromptLookup.TRIALS):
        assert lookup.guess(ids, room=5)
        lookup.learn(5, 0, len(ids))
    assert lookup.guess(ids, room=5) == []
    later = ids + [1, 2] * (PromptLookup.PAUSE // 2)
    assert lookup.guess(later, room=5)
    for _ in range(PromptLookup.TRIALS):
        lookup.learn(5, 1, len(later))
    assert lookup.guess(later, room=5), "one right id for each guess is worth it"
