"""Plans of the scheduler, step by step."""

import pytest

from lit_llama.generate.engine.cache import BlockPool
from lit_llama.generate.engine.scheduler import Plan, QueueFull, Scheduler, Sequence, TooLong


def scheduler(blocks: int = 64, size: int = 4, **options: int) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), **{"max_batch_tokens": 16, "max_sequences": 4} | options)


def run(it: Scheduler, plan: Plan, token: int = 7) -> None:
    for part in plan.parts:
        end = part.start + len(part.ids)
        if end == len(part.sequence.ids):
            part.sequence.ids.append(token)
        it.advance(part.sequence, end)


def test_a_sequence_joins_while_another_is_continued() -> None:
    it = scheduler()
    first, second = Sequence(ids=[1, 2, 3]), Sequence(ids=list(range(30)))
    it.add([first], 10)
    run(it, it.plan())
    it.add([second], 40)
    plan = it.plan()
    assert [(part.sequence, len(part.ids)) for part in plan.parts] == [(first, 1), (second, 15)]
    assert [part.logits for part in plan.parts] == [1, 0]
    run(it, plan)
    assert [(part.start, len(part.ids), part.logits) for part in it.plan().parts] == [(3 + 1, 1, 1), (15, 15, 1)]


def test_a_known_beginning_is_not_computed_again_but_its_last_token_is() -> None:
    it = scheduler()
    first = Sequence(ids=[5, 6, 7, 8, 1, 2, 3, 4])
    it.add([first], 20)
    run(it, it.plan())
    it.finish(first)
    again, other, foreign = (
        Sequence(ids=[5, 6, 7, 8, 1, 2, 3, 4]),
        Sequence(ids=[5, 6, 7, 9, 1]),
        Sequence(ids=[5, 6, 7, 8, 9], adapter="x"),
    )
    for sequence in (again, other, foreign):
        it.add([sequence], 20)
    assert [(part.sequence, part.start) for part in it.plan().parts] == [(again, 4), (other, 0), (foreign, 0)]


def test_answers_to_one_prompt_share_its_blocks_until_they_differ() -> None:
    it = scheduler()
    first = Sequence(ids=[1, 2, 3, 4, 5, 6])
    others = [Sequence(ids=[1, 2, 3, 4, 5, 6], source=first) for _ in range(2)]
    it.add([first, *others], 20)
    plan = it.plan()
    assert [part.sequence for part in plan.parts] == [first]
    run(it, plan, 7)
    plan = it.plan()
    assert {part.sequence: part.ids for part in plan.parts} == {first: [7], others[0]: [6], others[1]: [6]}
    assert len(plan.copies) == 2, "the half-filled block is written by all three: one keeps it"
    assert len({sequence.blocks[0] for sequence in (first, *others)}) == 1
    assert len({sequence.blocks[1] for sequence in (first, *others)}) == 3


def parts(plan: Plan) -> list[tuple[Sequence, int, int]]:
    return [(part.sequence, part.start, len(part.ids)) for part in plan.parts]


PREFIX = list(range(20, 36))


def alike(count: int) -> list[Sequence]:
    """Prompts of 18 tokens, of which 16 are the same."""
    return [Sequence(ids=[*PREFIX, number, number]) for number in range(count)]


def test_prompts_that_begin_alike_and_come_together_compute_it_once() -> None:
    """Each row of a file that computes the instruction which all of them begin with."""
    it = scheduler(max_batch_tokens=60, max_sequences=6)
    first, second, third = alike(3)
    other, foreign = Sequence(ids=[9, *PREFIX]), Sequence(ids=[*PREFIX, 1], adapter="x")
    for sequence in (first, second, third, other, foreign):
        it.add([sequence], 30)
    plan = it.plan()
    assert parts(plan) == [(first, 0, 18), (other, 0, 17), (foreign, 0, 17)], "another place or adapter is not alike"
    run(it, plan)
    assert parts(it.plan())[-2:] == [(second, 16, 2), (third, 16, 2)]


def test_a_prompt_waits_for_all_blocks_that_it_has_in_common_with_one_in_pieces() -> None:
    it = scheduler(max_batch_tokens=7, max_sequences=3)
    first, second = alike(2)
    it.add([first], 30)
    it.add([second], 30)
    made = []
    while second.state == "waiting":
        plan = it.plan()
        made += parts(plan)
        run(it, plan)
    assert made == [(first, 0, 7), (first, 7, 7), (first, 14, 4), (first, 18, 1), (second, 16, 2)]


@pytest.mark.parametrize("end", ["abort", "damage", "restart"])
def test_who_waits_for_a_block_goes_on_without_the_one_that_computes_it(end: str) -> None:
    """Requests that stand still because the one that they wait for is gone."""
    it = scheduler(max_batch_tokens=10)
    first, second, third = alike(3)
    for sequence in (first, second, third):
        it.add([sequence], 30)
    run(it, it.plan())
    if end == "restart":
        it.restart(first)
        assert parts(it.plan()) == [(first, 8, 10)], "what is known of it counts, and its turn comes first"
        return
    it.finish(first, damaged=end == "damage")
    assert parts(it.plan()) == [(second, 0 if end == "damage" else 8, 10)], "and the third waits for the second"


def test_who_is_held_back_keeps_its_place_before_later_ones() -> None:
    """Strangers that take every place which becomes free while a request waits for a block."""
    it = scheduler(max_batch_tokens=10, max_sequences=2)
    first, second = alike(2)
    stranger = Sequence(ids=[1, 2, 3])
    for sequence in (first, second, stranger):
        it.add([sequence], 40)
    run(it, it.plan())
    run(it, it.plan())
    plan = it.plan()
    assert parts(plan) == [(first, 18, 1), (second, 16, 2)] and stranger.state == "waiting"


def test_where_blocks_run_out_the_last_one_waits() -> None:
    it = scheduler(blocks=4)
    first, last = Sequence(ids=[1] * 3), Sequence(ids=[2] * 3)
    it.add([first], 16)
    it.add([last], 16)
    for _ in range(8):
        run(it, it.plan())
    assert first.state == "running" and last.state == "waiting" and not last.blocks and it.preemptions == 1
    it.finish(first)
    assert it.plan().parts[0].ids == last.ids[last.computed :], "its answer so far is kept, and computed again"


def test_a_higher_priority_goes_first_but_not_for_ever() -> None:
    it = scheduler(max_sequences=1)
    low = Sequence(ids=[1])
    it.add([Sequence(ids=[9])], 2)
    it.plan()
    it.add([low], 2)
    steps = 0
    while low.state != "running":
        steps += 1
        high = Sequence(ids=[2], priority=3)
        it.add([high], 2)
        it.finish(it.running[0])
        it.plan()
        assert steps < 10 * Scheduler.AGEING
    assert Scheduler.AGEING < steps < 4 * Scheduler.AGEING


def test_what_cannot_be_held_or_queued_is_refused_whole() -> None:
    it = scheduler(blocks=4, max_waiting=2)
    with pytest.raises(TooLong):
        it.add([Sequence(ids=[1])], 17)
    it.add([Sequence(ids=[1])], 16)
    with pytest.raises(QueueFull):
        it.add([Sequence(ids=[1]), Sequence(ids=[1])], 16)
    assert len(it.waiting) == 1


def test_damaged_blocks_are_not_found_again() -> None:
    it = scheduler()
    first = Sequence(ids=list(range(9)))
    it.add([first], 20)
    run(it, it.plan())
    held = list(first.blocks)
    assert sorted(it.finish(first, damaged=True)) == sorted(held)
    again = Sequence(ids=list(range(9)))
    it.add([again], 20)
    assert it.plan().parts[0].start == 0


def test_blocks_before_the_window_are_given_back() -> None:
    it = scheduler(window=6)
    sequence = Sequence(ids=list(range(14)))
    it.add([sequence], 40)
    run(it, it.plan())
    assert sequence.blocks[:2] == [-1, -1] and sequence.blocks[2] >= 0, "9 of 14 tokens are seen by nobody"
    assert it.pool.available == 64 - 2


def test_a_long_prompt_goes_in_pieces_only_where_it_would_hold_somebody_up() -> None:
    it = scheduler(max_batch_tokens=160)
    first, long = Sequence(ids=[1, 2, 3]), Sequence(ids=list(range(100)))
    it.add([first], 40)
    run(it, it.plan())
    it.add([long], 110)
    pieces = []
    while long.pending > 1:
        plan = it.plan(10)
        counts = {part.sequence: len(part.ids) for part in plan.parts}
        assert counts[first] == 1
        pieces.append(counts[long])
        run(it, plan)
    assert pieces[:3] == [12, 11, 11], "an eighth of what is left, or 10 and one for the answer"
    it.finish(first)
    alone = Sequence(ids=list(range(100, 200)))
    it.finish(long)
    it.add([alone], 110)
    assert [len(part.ids) for part in it.plan(10).parts] == [100]


def test_a_prompt_takes_the_whole_step_where_nobody_waits_for_a_token() -> None:
    it = scheduler(blocks=100, max_batch_tokens=160)
    first, long = Sequence(ids=[1, 2, 3]), Sequence(ids=list(range(300)))
    it.add([first], 40)
    run(it, it.plan())
    it.add([long], 310)
    plan = it.plan()
    assert {part.sequence: len(part.ids) for part in plan.parts} == {first: 1, long: 159}
