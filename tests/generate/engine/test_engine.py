"""The engine on a tiny model: the same answers alone and in company, whatever joins, leaves, fails or is put off."""

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from engines import KINDS, alone, answers, engine, faulty, finish, prompts, requests, taken
from torch import Tensor

from lit_llama.errors import NumericalError, ResourceError, UserError
from lit_llama.generate.engine.engine import Engine, EngineConfig
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.config import LoRAConfig
from lit_llama.model.kernels.paged import BLOCK, PagedBatch
from lit_llama.model.kernels.trained import factors_of
from lit_llama.model.operators.kernels import compiled

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C++ compiler")


def test_a_greedy_answer_is_that_of_the_whole_model() -> None:
    model, ids = tiny_model(), prompts(1)[0]
    expected = list(ids)
    for _ in range(20):
        expected.append(int(model(torch.tensor(expected))[-1, :380].argmax()))
    for kind in ("packed", "torch"):
        assert answers(engine(kind=kind), [Request(ids, KINDS[0])]) == [expected[len(ids) :]]


@needs_compiler
def test_answers_are_the_same_bytes_in_company() -> None:
    it = engine()
    early = [it.add(request) for request in requests()[:5]]
    for _ in range(7):
        it.step()
    late = [it.add(request) for request in requests()[5:]]
    again = [it.add(request) for request in requests()]  # whose prompts are found
    finish(it)
    assert [taken(ticket) for ticket in (*early, *late, *again)] == alone() + alone()
    assert it.statistics().reused > 0


@needs_compiler
def test_answers_are_the_same_bytes_after_having_been_put_off() -> None:
    sampling = Sampling(max_new_tokens=70, temperature=1.0, repetition_penalty=1.1)
    wanted = [Request(ids, sampling) for ids in prompts(6, longest=30)]
    it = engine(blocks=8, max_batch_tokens=24, max_sequences=8)
    made = answers(it, wanted)
    assert it.statistics().preemptions > 0
    assert made == [answers(engine(), [request])[0] for request in wanted]


@needs_compiler
def test_answers_with_keys_and_values_in_8_bits_are_the_same_bytes_in_any_company() -> None:
    """Codes or scales that are left behind where a block is copied, given back, found again or computed in pieces."""
    asked = [*requests(), Request(prompts(1)[0] * 3, replace(KINDS[1], n=3))]
    asked += [Request(ids, Sampling(max_new_tokens=70, temperature=1.0)) for ids in prompts(6, longest=30, seed=1)]

    def answered(it: Engine, requests: list[Request]) -> list[dict[int, list[int]]]:
        tickets = [it.add(request) for request in requests]
        finish(it)
        return [
            {n: [i for step in ticket.steps if step.answer == n for i in step.ids] for n in range(len(ticket.answers))}
            for ticket in tickets
        ]

    wanted = [answered(engine(kv_cache="int8", speculate=False), [request])[0] for request in asked]
    small = engine(blocks=3, kv_cache="int8", max_batch_tokens=24, max_sequences=8)
    assert 2 * 3 < small.runner.blocks < 4 * 3, "a block of codes takes less than half of one of float32"
    for _ in range(2):
        assert answered(small, asked) == wanted
    counts = small.statistics()
    assert counts.preemptions > 0 and counts.reused > 0
    assert [answer[0] for answer in wanted[:8]] != alone(), "it is not the cache in float32"


@needs_compiler
def test_guesses_change_no_answer() -> None:
    ids = [7, 8, 9, 10, 11, 12] * 8
    wanted = [Request(ids, sampling) for sampling in KINDS]
    without, guessing = engine(speculate=False), engine()
    assert answers(guessing, wanted) == answers(without, wanted)
    assert guessing.statistics().guessed > 0


def test_an_answer_ends_at_a_stop_id_or_its_length_and_says_so() -> None:
    it, ids = engine(), prompts(1)[0]
    ticket = it.add(Request(ids, Sampling(max_new_tokens=9)))
    finish(it)
    whole = taken(ticket)
    assert ticket.steps[-1].finish_reason == "length" and len(whole) == 9
    ticket = it.add(Request(ids, Sampling(max_new_tokens=9, stop_ids=[whole[4]])))
    finish(it)
    end = whole.index(whole[4]) + 1
    assert taken(ticket) == whole[:end] and ticket.steps[-1].finish_reason == "stop"


def test_several_answers_to_one_prompt_compute_it_once() -> None:
    it, ids = engine(), prompts(1, seed=3)[0]
    ticket = it.add(Request(ids, Sampling(max_new_tokens=12, n=4, temperature=1.0)))
    finish(it)
    made = [[token for step in ticket.steps if step.answer == n for token in step.ids] for n in range(4)]
    assert [len(part) for part in made] == [12] * 4 and len({tuple(part) for part in made}) > 1
    assert it.statistics().computed < 2 * len(ids) + 4 * 13, "the prompt once, its last token for each"
    single = it.add(Request(ids, Sampling(max_new_tokens=12, temperature=1.0)))
    finish(it)
    assert taken(single) == made[0]


def test_prompts_that_begin_alike_are_computed_once_and_answered_as_alone() -> None:
    """Rows of a file with one instruction, which all of them compute."""
    begin = prompts(1, seed=3)[0][:1] * 70
    asked = [Request([*begin, number, number + 1], sampling) for number, sampling in enumerate(KINDS)]
    wanted = [answers(engine(speculate=False), [request])[0] for request in asked]
    it = engine(speculate=False)
    assert answers(it, asked) == wanted
    whole = sum(len(request.ids) + len(made) - 1 for request, made in zip(asked, wanted, strict=True))
    assert it.statistics().computed == whole - (len(asked) - 1) * 64, "of the 70 tokens in common two blocks are full"


@pytest.mark.parametrize("kind", ["packed", "torch"])
def test_a_prompt_is_scored_as_by_the_whole_model(kind: str) -> None:
    model, ids = tiny_model(), prompts(1, seed=2)[0] * 3
    expected = model(torch.tensor(ids))[:-1, :380].log_softmax(-1)
    it = engine(kind=kind)
    it.add(Request(ids, KINDS[0]))  # what is known of the prompt must not stand in for its logits
    ticket = it.add(Request(ids, Sampling(max_new_tokens=0), prompt_logprobs=3))
    finish(it)
    assert [step.finish_reason for step in ticket.steps] == ["length"]
    scores = ticket.steps[-1].prompt_logprobs
    assert len(scores) == len(ids) and scores[0] is None
    for row, token, score in zip(expected, ids[1:], scores[1:], strict=True):
        assert score is not None
        assert math.isclose(score.logprob, float(row[token]), abs_tol=1e-3)
        assert [token for token, _ in score.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("start", [1, 2, 17, 40, -1])
def test_the_rest_of_a_prompt_is_scored_as_in_the_whole(start: int) -> None:
    """Scores that belong to the token before or behind, or a known beginning that is computed again."""
    ids = prompts(1, seed=2)[0] * 3
    start %= len(ids)
    it = engine()
    whole = it.add(Request(ids, Sampling(max_new_tokens=0), prompt_logprobs=0))
    finish(it)
    before = it.statistics().computed
    part = it.add(Request(ids, Sampling(max_new_tokens=0), prompt_logprobs=0, scored_from=start))
    finish(it)
    scores = part.steps[-1].prompt_logprobs
    assert scores == (*[None] * start, *whole.steps[-1].prompt_logprobs[start:])
    assert it.statistics().computed - before <= len(ids) - (start - 1) // BLOCK * BLOCK


def test_logprobs_come_with_the_tokens() -> None:
    ticket = (it := engine()).add(Request(prompts(1)[0], Sampling(max_new_tokens=5, logprobs=2)))
    finish(it)
    steps = [step for step in ticket.steps if step.ids]
    assert all(len(step.logprobs) == len(step.ids) for step in steps)
    assert all(step.logprobs[0].top[0][0] == step.ids[0] for step in steps), "greedy"


def test_abort_in_every_state_harms_nobody() -> None:
    it, rest = engine(max_sequences=3, max_batch_tokens=16), prompts(6)
    tickets = [it.add(Request(ids, KINDS[0])) for ids in rest]
    it.abort(tickets[5])  # waiting
    it.step()
    it.abort(tickets[0])  # amid its prompt, perhaps
    for _ in range(12):
        it.step()
    it.abort(tickets[1])
    finish(it)
    it.abort(tickets[2])  # finished
    assert [tickets[n].steps[-1].finish_reason for n in (0, 1, 5)] == ["abort"] * 3
    for n in (2, 3, 4):
        assert taken(tickets[n]) == answers(engine(), [Request(rest[n], KINDS[0])])[0]


def test_abort_within_a_step_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that Python collects while its thread is in a step: catches an error for the others, and their
    answers taken from the rows of the one that is gone."""
    it, rest = engine(), prompts(3)
    tickets = [it.add(Request(ids, KINDS[0])) for ids in rest]
    logits = it.runner.logits

    def leave(batch: Any) -> Any:
        it.abort(tickets[1])
        return logits(batch)

    it.step()
    monkeypatch.setattr(it.runner, "logits", leave)
    finish(it)
    assert tickets[1].steps[-1].finish_reason == "abort"
    for n in (0, 2):
        assert taken(tickets[n]) == answers(engine(), [Request(rest[n], KINDS[0])])[0]
    it.check()


def test_leaving_a_stream_aborts_its_request() -> None:
    it = engine()
    stream = it.stream(Request(prompts(1)[0], KINDS[0]))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not it.busy
    it.check()


def test_threads_share_an_engine() -> None:
    it, made = engine(), {}

    def ask(number: int) -> None:
        request = requests()[number]
        made[number] = [token for step in it.stream(request) for token in step.ids]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made[number] for number in range(8)] == alone() or compiled() is None
    it.check()


def test_logits_that_are_not_finite_fail_their_request_alone() -> None:
    bad = prompts(1, seed=9)[0]

    def poison(batch: PagedBatch, logits: Tensor) -> Tensor:
        row = 0
        for table, count in zip(batch.tables, batch.logits, strict=True):
            logits[row : row + count] = math.nan if table[0] == broken else logits[row : row + count]
            row += count
        return logits

    it, runner = faulty(None, *[poison] * 20)
    good = it.add(Request(prompts(1)[0], KINDS[0]))
    ticket = it.add(Request(bad, KINDS[0]))
    it.step()
    broken = ticket.answers[0].sequence.blocks[0]
    finish(it)
    assert isinstance(ticket.error, NumericalError) and "not finite" in str(ticket.error)
    assert broken in runner.cleared
    assert taken(good) == answers(engine(), [Request(prompts(1)[0], KINDS[0])])[0]
    with pytest.raises(NumericalError):
        list(it.follow(ticket))


def test_no_memory_in_the_middle_fails_the_last_request() -> None:
    it, _ = faulty(None, None, MemoryError("no"))
    first, last = it.add(Request(prompts(1)[0], KINDS[0])), it.add(Request(prompts(2)[1], KINDS[0]))
    finish(it)
    assert isinstance(last.error, ResourceError)
    assert taken(first) == answers(engine(), [Request(prompts(1)[0], KINDS[0])])[0]


def test_an_interrupted_step_loses_nothing() -> None:
    it, _ = faulty(None, None, KeyboardInterrupt())
    ticket = it.add(Request(prompts(1)[0], Sampling(max_new_tokens=20, n=2, temperature=1.0)))
    with pytest.raises(KeyboardInterrupt):
        finish(it)
    it.check()
    finish(it)
    other = (fresh := engine()).add(ticket.request)
    finish(fresh)
    for n in (0, 1):
        assert [t for s in ticket.steps if s.answer == n for t in s.ids] == [
            t for s in other.steps if s.answer == n for t in s.ids
        ]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (lambda: Request([400]), "holds the id 400, but the model has 384"),
        (lambda: Request([1] * 250, Sampling(max_new_tokens=50)), "250 tokens.*more than the 256 the model reads"),
        (lambda: Request([1], adapter="x"), "no adapter 'x'"),
        (lambda: Request([1], Sampling(max_new_tokens=0)), "max_new_tokens is 0"),
        (lambda: Request([]), "prompt is empty"),
        (
            lambda: Request([1] * 100, Sampling(max_new_tokens=100)),
            "the 192 that the memory of the cache holds",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_before(request_: Any, said: str) -> None:
    it = engine(blocks=6)
    with pytest.raises(UserError, match=said):
        it.add(request_())
    assert not it.busy


def test_a_full_queue_refuses() -> None:
    it = engine(max_waiting=2)
    it.add(Request([1], KINDS[0]))
    with pytest.raises(ResourceError, match="are waiting"):
        it.add(Request([1], Sampling(n=2, max_new_tokens=5)))


@pytest.mark.parametrize(("streamed", "computed"), [(False, 231), (True, 98)])
def test_prompts_are_cut_only_where_somebody_waits_for_a_token(streamed: bool, computed: int) -> None:
    """A file of rows that is answered at the pace of a conversation, or a prompt that holds answers up."""
    it = engine(speculate=False)
    going = it.add(Request([1, 2, 3], Sampling(max_new_tokens=30)))
    it.step()
    it.add(Request([n % 380 for n in range(230)], Sampling(max_new_tokens=2)))
    before = it.statistics().computed
    it.step(streamed=streamed)
    assert it.statistics().computed - before == computed and len(taken(going)) == 2
    finish(it)


def test_ten_thousand_requests_at_once() -> None:
    it = engine(blocks=150, max_sequences=60, max_batch_tokens=512)
    tickets = [it.add(Request([n % 380], Sampling(max_new_tokens=1))) for n in range(10_000)]
    steps = 0
    while it.busy:
        it.step()
        steps += 1
    it.check()
    assert all(len(taken(ticket)) == 1 for ticket in tickets) and steps < 10_000 / 60 + 5


def test_a_closed_engine_ends_what_is_there() -> None:
    it = engine()
    ticket = it.add(Request([1], KINDS[0]))
    it.close()
    assert ticket.steps[-1].finish_reason == "abort" and not it.busy
    with pytest.raises(UserError, match="closed"):
        it.add(Request([1]))


def tuned(seed: int) -> Any:
    model = tiny_model()
    torch.manual_seed(seed)
    apply_lora(model, LoRAConfig(r=4))
    for _, module in adapters(model):
        for parameter in module.parts().values():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False).eval()


@needs_compiler
def test_adapters_are_chosen_by_request_and_come_and_go() -> None:
    first, second, ids = tuned(1), tuned(2), prompts(1)[0]
    expected = {}
    for name, model in (("first", first), ("second", second), (None, tiny_model())):
        greedy = list(ids)
        for _ in range(20):
            greedy.append(int(model(torch.tensor(greedy))[-1, :380].argmax()))
        expected[name] = greedy[len(ids) :]
    it = engine()
    it.add_adapter("first", factors_of(first))
    it.add_adapter("second", factors_of(second))
    names = ["first", None, "second", "first"]
    assert answers(it, [Request(ids, KINDS[0], adapter=name) for name in names]) == [expected[name] for name in names]
    running = it.add(Request(ids, KINDS[0], adapter="first"))
    it.step()
    it.remove_adapter("first")
    assert running.steps[-1].finish_reason == "abort" and it.adapters == ["second"]
    it.add_adapter("first", factors_of(second))
    assert answers(it, [Request(ids, KINDS[0], adapter="first")]) == [expected["second"]], "nothing old is found"
    with pytest.raises(UserError, match="loaded already"):
        it.add_adapter("first", factors_of(second))


def test_limits_that_leave_no_room_are_refused() -> None:
    with pytest.raises(UserError, match="expected more than"):
        EngineConfig(max_batch_tokens=64)
    with pytest.raises(UserError, match="max_sequences is 0"):
        EngineConfig(max_sequences=0)


def test_a_stream_refuses_before_it_is_read() -> None:
    """Catches a chat that keeps a message to which no answer can come."""
    with pytest.raises(UserError, match="holds the id 400"):
        engine().stream(Request([400]))


@needs_compiler
def test_answers_to_one_prompt_are_the_same_after_having_been_put_off() -> None:
    """Catches an answer that goes on from the keys of another answer to its prompt."""
    sampling = Sampling(max_new_tokens=70, temperature=1.0, n=3)
    wanted = [Request(ids, sampling) for ids in prompts(2, longest=30)]
    it = engine(blocks=8, max_batch_tokens=24, max_sequences=8)
    tickets = [it.add(request) for request in wanted]
    finish(it)
    assert it.statistics().preemptions > 0
    for ticket in tickets:
        (fresh := engine()).add(ticket.request)
        other = fresh.add(ticket.request)
        finish(fresh)
        for n in range(3):
            assert [t for s in ticket.steps if s.answer == n for t in s.ids] == [
                t for s in other.steps if s.answer == n for t in s.ids
            ]
