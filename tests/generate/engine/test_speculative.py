"""Guesses from the text so far and from other answers."""

from collections.abc import Sequence

from lit_llama.generate.engine import speculative
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.engine.speculative import MOST, Asked, PromptLookups, Rates


def guess(
    lookups: PromptLookups, ids: Sequence[int], *, key: str = "a", made: int = 1, room: int = 9, beside: int = 0
) -> list[int]:
    """What is guessed to follow ids, with so many other answers that have nothing to be looked up."""
    others = [Asked(f"beside {i}", [-1 - i], 1, 9, Sampling(), 0) for i in range(beside)]
    return lookups.guess([Asked(key, ids, made, room, Sampling(), 0), *others])[0]


def test_what_followed_the_last_ids_before_is_guessed() -> None:
    ids = [1, 2, 3, 4, 5, 9, 2, 3]
    assert guess(PromptLookups(), ids) == [4, 5, 9, 2, 3]
    assert guess(PromptLookups(), ids, room=2) == [4, 5]
    assert guess(PromptLookups(), [*ids, 7]) == []


def test_the_longest_and_then_the_latest_counts() -> None:
    found = guess(PromptLookups(), [1, 2, 3, 8, 2, 3, 7, 1, 2, 3])
    assert found[0] == 8, "1 2 3 was followed by 8; 2 3 last by 7"
    assert guess(PromptLookups(), [2, 3, 8, 2, 3, 7, 2, 3])[0] == 7


def test_ids_that_are_all_alike_are_guessed_on() -> None:
    assert guess(PromptLookups(), [5] * 9)[:1] == [5]


def test_a_guess_is_no_longer_than_it_promises_to_pay() -> None:
    """Catches: a guess of full length where one id was found, or where rows of many answers fill the processor."""
    text = [*range(100, 140)]
    lengths = {
        beside: [len(guess(PromptLookups(), [*text, *text[:found]], room=99, beside=beside)) for found in (1, 4)]
        for beside in (0, 7, 63)
    }
    assert lengths[0][0] < lengths[0][1] == MOST
    assert 0 < lengths[7][0] < lengths[7][1] < MOST
    assert lengths[63][0] == 0 < lengths[63][1] < lengths[7][1]


def test_what_is_seldom_right_is_guessed_no_more_until_some_time_later() -> None:
    lookups, ids = PromptLookups(), [1, 2] * 20
    for _ in range(60):
        if not (made := guess(lookups, ids, beside=7)):
            break
        lookups.learn("a", len(made), 0, len(ids))
    assert guess(lookups, ids, beside=7) == []
    assert any(guess(lookups, ids, beside=7) for _ in range(200))


def answered(*answers: Sequence[int]) -> PromptLookups:
    lookups = PromptLookups()
    for answer in answers:
        guess(lookups, [0, *answer], key=str(answer), made=len(answer))
        lookups.forget(str(answer))
    return lookups


ONE, OTHER = [1, 2, 3, 50, 9, 4, 5, 6], [1, 2, 7, 60, 9, 4, 8, 8]


def test_an_answer_is_guessed_from_the_latest_before_it() -> None:
    lookups = answered(ONE, OTHER)
    assert guess(lookups, [33, 1, 2], made=2)[0] == 7
    assert guess(lookups, [33, 1, 2, 3], key="b", made=3)[:2] == [50, 9]
    assert guess(lookups, [33, 9, 4], key="c", made=2)[0] == 8


def test_an_answer_follows_the_one_that_it_repeated() -> None:
    """Catches: the latest answer taken although an older one is repeated."""
    lookups, ids = answered(ONE, OTHER), [34, 1, 2, 3]
    made = guess(lookups, ids, made=3)
    lookups.learn("a", len(made), 1, len(ids) + 2)
    ids += [50, 71, 72, 9]
    assert guess(lookups, ids, made=7)[0] == 4, "one id is enough"
    lookups.learn("a", 1, 1, len(ids) + 1)
    assert guess(lookups, [*ids, 4], made=8)[0] == 5


def test_what_only_prompts_say_is_not_guessed_for_others() -> None:
    lookups = PromptLookups()
    guess(lookups, [1, 2, 3, 4], key="secret", made=1)
    assert guess(lookups, [9, 1, 2, 3], key="new", made=3) == []


def test_of_many_answers_the_latest_are_known(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(speculative, "ROOM", 100)
    lookups = PromptLookups()
    for start in range(1000, 10_000, 50):
        guess(lookups, [0, *range(start, start + 50)], key=str(start), made=50)
    assert guess(lookups, [9910, 9911], key="new", made=2)
    assert guess(lookups, [1010, 1011], key="newer", made=2) == []
    assert len(lookups._answers._new) + len(lookups._answers._old) <= 3 * 2 * 200
    lookups.trim()
    assert guess(lookups, [9910, 9911], key="newest", made=2) == []


def test_rates_go_from_what_is_taken_to_be_right_to_what_was() -> None:
    shared = Rates()
    assert shared("own", 1) < shared("own", 2) < shared("own", 4)
    for _ in range(300):
        shared.learn("own", 2, 3, 1)
    assert abs(shared("own", 2) - 0.75) < 0.02
    own = Rates(shared)
    assert own("own", 2) == shared("own", 2)
    own.learn("own", 2, 0, 1)
    assert own("own", 2) < shared("own", 2)
