"""Room for keys and values: windows, memory that goes back, and answers that go on where there is none left."""

import sys
from typing import Any

import pytest
import torch
from conftest import tiny_model
from engines import answers, engine, finish, prompts, requests, taken

from lit_llama.device import resident_memory
from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.sampling import Sampler
from lit_llama.model.kernels.paged import BLOCK
from lit_llama.model.operators.kernels import compiled

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C++ compiler")


def test_a_window_keeps_only_what_is_seen() -> None:
    model = tiny_model(sliding_window=40)
    it = engine(blocks=8, model=model)
    ids = prompts(1, longest=20)[0]
    expected = list(ids)
    for _ in range(150):
        expected.append(int(model(torch.tensor(expected))[-1, :380].argmax()))
    ticket = it.add(Request(ids, Sampling(max_new_tokens=150)))
    least = 8
    while it.busy:
        it.step()
        least = min(least, sum(block >= 0 for block in ticket.answers[0].sequence.blocks) if it.busy else 8)
        assert sum(block >= 0 for block in ticket.answers[0].sequence.blocks) <= 40 // BLOCK + 2
    assert taken(ticket) == expected[len(ids) :]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise of Linux")
@pytest.mark.parametrize("kind", ["packed", "torch"])
def test_memory_of_what_nobody_needs_goes_back_to_the_system(kind: str) -> None:
    """Catches memory that is kept, and keys that are lost of an answer that goes on."""
    it = engine(blocks=2000, kind=kind)
    cache: Any = it.runner._cache  # type: ignore[attr-defined]
    parts = [cache.blocks] if hasattr(cache, "blocks") else cache.parts
    whole = sum(part.nbytes for part in parts)
    known, going = requests()[0], requests()[1]
    expected = [answers(it, [request])[0] for request in (known, going)]
    ticket = it.add(going)
    it.step()
    it.step()
    for part in parts:  # all of it was used once
        part[:, 20:] = 1
    before = resident_memory()
    given = it.trim()
    assert 0.9 * whole < given < whole
    assert resident_memory() < before - 0.8 * whole
    finish(it)
    assert taken(ticket) == expected[1]
    reused = it.statistics().reused
    assert answers(it, [known]) == expected[:1] and it.statistics().reused == reused


def sliding(ids: list[int], sampling: Sampling, keep: int, limit: int) -> list[int]:
    """Tokens of the whole model, which reads the first ones and the later half where it has no room."""
    model, seen, made = tiny_model(), list(ids), list[int]()
    sampler = Sampler(1, 384, tokens=380)
    sampler.set(0, sampling, prompt=ids)
    while len(made) < sampling.max_new_tokens:
        if len(seen) >= limit:
            seen = seen[:keep] + seen[-((limit - keep) // 2) :]
        made.append(int(sampler.sample(model(torch.tensor(seen))[-1:], [0], [len(made)]).ids))
        sampler.accept([0], made[-1:])
        seen.append(made[-1])
    return made


SLIDING = [
    (Sampling(max_new_tokens=150), 0),
    (Sampling(max_new_tokens=150), 5),
    (Sampling(max_new_tokens=100, temperature=1.0, seed=3), 1),
    (Sampling(max_new_tokens=100, presence_penalty=2.0, repetition_penalty=1.5), 1),
]


@needs_compiler
@pytest.mark.parametrize(("sampling", "keep"), SLIDING)
def test_an_answer_goes_on_behind_the_later_half_where_there_is_no_room(sampling: Sampling, keep: int) -> None:
    """Catches keys at old places, and draws and penalties that forget what the model does not see any more."""
    ids, limit = prompts(1)[0][:40], 3 * BLOCK
    it = engine(blocks=3)
    ticket = it.add(Request(ids, sampling, overflow="drop_oldest", keep=keep))
    finish(it)
    assert taken(ticket) == sliding(ids, sampling, keep, limit)
    dropped = [step.dropped for step in ticket.steps if step.dropped]
    half = (limit - keep) - (limit - keep) // 2
    assert len(dropped) == -(-(40 + sampling.max_new_tokens - limit) // half) and min(dropped) == half
    with pytest.raises(UserError, match="that the memory of the cache holds"):
        it.add(Request(ids, sampling))
    with pytest.raises(UserError, match="overflow is 'drop'"):
        Request(ids, overflow="drop")  # type: ignore[arg-type]


@needs_compiler
def test_answers_that_slide_are_the_same_bytes_in_company() -> None:
    """Catches an answer that goes on from the keys of one that has lost its prompt."""
    wanted = [
        Request(ids[:40], Sampling(max_new_tokens=230, temperature=1.0, n=n), overflow="drop_oldest")
        for ids, n in zip(prompts(3, seed=5), (1, 3, 1), strict=True)
    ]
    it = engine(blocks=14, max_sequences=5)
    tickets = [it.add(request) for request in wanted]
    finish(it)
    assert sum(step.dropped for step in tickets[0].steps) > 0
    for ticket in tickets:
        other = (fresh := engine(speculate=False)).add(ticket.request)
        finish(fresh)
        for n in range(ticket.request.sampling.n):
            assert [t for s in ticket.steps if s.answer == n for t in s.ids] == [
                t for s in other.steps if s.answer == n for t in s.ids
            ]
