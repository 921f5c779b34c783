"""Guesses of a draft model: no answer changes by them, and where they are right they save steps."""

import math
from typing import Any

import pytest
from conftest import tiny_model
from engines import KINDS, Faulty, alone, answers, engine, finish, prompts, requests, taken
from torch import Tensor

from lit_llama.generate.engine.draft import DraftModel
from lit_llama.generate.engine.engine import Engine
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.speculative import PromptLookups
from lit_llama.model.kernels.paged import PagedBatch
from lit_llama.model.operators.kernels import compiled

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C++ compiler")


def draft(seed: int = 1, blocks: int = 60, cost: float = 0.1, **options: Any) -> DraftModel:
    runner = engine(blocks, model=tiny_model(seed)).runner
    return DraftModel(runner, tokens=380, max_sequences=64, cost=cost, **options)


def drafting(guesser: DraftModel, **options: Any) -> Engine:
    it = engine(**{"speculate": False} | options)
    it.add_guesser(guesser)
    return it


@needs_compiler
@pytest.mark.parametrize(
    "sampling", [KINDS[0], KINDS[1], Sampling(max_new_tokens=40, temperature=1.5, n=3, logprobs=1)]
)
def test_a_draft_of_the_same_weights_guesses_everything_right(sampling: Sampling) -> None:
    """Catches guesses from keys of other ids or places, and draws with other random numbers than the answer's."""
    guesser = draft(0)
    it, without = drafting(guesser), engine(speculate=False)
    ids = prompts(1, seed=3)[0]
    made, expected = it.add(Request(ids, sampling)), without.add(Request(ids, sampling))
    finish(it)
    finish(without)
    for answer in range(sampling.n):
        assert [t for s in made.steps if s.answer == answer for t in s.ids] == [
            t for s in expected.steps if s.answer == answer for t in s.ids
        ]
    found = it.statistics()
    assert found.guessed_right == found.guessed > 0.6 * found.made
    assert found.steps < without.statistics().steps / 3
    guesser.check()


@needs_compiler
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_are_the_same_bytes_in_company_and_after_having_been_put_off(seed: int) -> None:
    guesser = draft(seed, blocks=12)
    it = drafting(guesser, blocks=12, max_batch_tokens=40, max_sequences=6, speculate=True)
    early = [it.add(request) for request in requests()[:5]]
    for _ in range(7):
        it.step()
        guesser.check()
    late = [it.add(request) for request in requests()[5:]]
    finish(it)
    assert [taken(ticket) for ticket in (*early, *late)] == alone()
    assert it.statistics().guessed > 0
    assert not guesser._drafts
    guesser.check()


def test_a_draft_that_guesses_wrong_is_asked_rarely() -> None:
    asked = 0

    class Counting(DraftModel):
        def learn(self, key: Any, guessed: int, right: int, length: int) -> None:
            nonlocal asked
            asked += 1
            assert guessed <= 4, "nothing was right, so that ever fewer are guessed"
            super().learn(key, guessed, right, length)

    guesser = Counting(draft()._runner, tokens=380, max_sequences=64, cost=0.1)
    answers(drafting(guesser), [Request([1], Sampling(max_new_tokens=250, temperature=1.0))])
    assert 0 < asked <= 8 * (250 // (8 + DraftModel.PAUSE) + 1)


def test_a_draft_that_costs_as_much_as_it_saves_is_not_asked() -> None:
    """A wider step of many answers costs what it saves, too."""
    it = drafting(draft(0, cost=0.5), blocks=200)
    answers(it, [Request([n], KINDS[0]) for n in range(40)])
    assert it.statistics().guessed < 0.05 * it.statistics().made
    it = drafting(draft(0, cost=1.0))
    answers(it, [Request([1], KINDS[0])])
    assert it.statistics().guessed == 0


def test_a_known_prompt_is_not_read_again_by_the_draft() -> None:
    guesser, read = draft(0), []
    logits = guesser._runner.logits

    def counted(batch: PagedBatch) -> Tensor:
        read.append(sum(map(len, batch.ids)))
        return logits(batch)

    guesser._runner.logits = counted  # type: ignore[method-assign]
    it, ids = drafting(guesser), [n % 380 for n in range(100)]
    answers(it, [Request(ids, Sampling(max_new_tokens=3))])
    assert max(read) >= 100
    read.clear()
    answers(it, [Request([*ids, 7], Sampling(max_new_tokens=3))])
    assert max(read) <= 101 - 96 + 1


@pytest.mark.parametrize("fault", ["memory", "nan"])
def test_a_draft_that_fails_harms_no_answer(fault: str) -> None:
    def broken(batch: PagedBatch, logits: Tensor) -> Tensor:
        return logits * math.nan

    faults = [None, MemoryError()] * 4 if fault == "memory" else [None, broken] * 4
    guesser = draft(0)
    guesser._runner = Faulty(guesser._runner, iter(faults))  # type: ignore[assignment]
    it = drafting(guesser)
    wanted = requests()[0]
    assert answers(it, [wanted]) == answers(engine(speculate=False), [wanted])
    assert not guesser._drafts
    guesser.check()


def test_a_cache_too_small_for_a_prompt_leaves_it_without_guesses() -> None:
    guesser = draft(0, blocks=3)
    it = drafting(guesser)
    wanted = [Request(ids, KINDS[0]) for ids in prompts(4, longest=150, seed=1)]
    assert answers(it, wanted) == answers(engine(speculate=False), wanted)
    guesser.check()


def test_what_was_written_before_is_asked_first() -> None:
    guesser = draft(0)
    asked = []
    guess = guesser.guess
    guesser.guess = lambda wanted: (asked.append(len(wanted)), guess(wanted))[1]  # type: ignore[method-assign]
    it = drafting(guesser, speculate=True)
    assert isinstance(it._answers.guessers[0], PromptLookups)
    answers(it, [Request([7, 8, 9, 10] * 10, Sampling(max_new_tokens=4))])
    assert len(asked) < it.statistics().steps


def test_the_draft_reads_no_more_than_its_context() -> None:
    guesser = DraftModel(
        engine(blocks=8, model=tiny_model(0, max_position_embeddings=40)).runner, tokens=380, max_sequences=4, cost=0.1
    )
    it = drafting(guesser)
    wanted = Request(list(range(30)), Sampling(max_new_tokens=60))
    assert answers(it, [wanted]) == answers(engine(speculate=False), [wanted])
    assert 0 < it.statistics().guessed <= 12
