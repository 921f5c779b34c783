"""An engine in a thread of its own: many consumers, some of which leave, sleep, fail or never read."""

import asyncio
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from engines import KINDS, Faulty, alone, engine, prompts, requests
from torch import Tensor

from lit_llama.errors import NumericalError, ResourceError, UserError
from lit_llama.generate.engine.engine import Engine, EngineConfig
from lit_llama.generate.engine.request import Request, Sampling, Step
from lit_llama.generate.engine.worker import EngineFailed, EngineThread, Handle
from lit_llama.model.kernels.paged import PagedBatch
from lit_llama.model.operators.kernels import compiled

pytestmark = pytest.mark.timeout(60)
needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C++ compiler")


def ids(steps: Any) -> list[int]:
    return [token for step in steps for token in step.ids]


class Gate:
    """A runner that computes when it is let, and says when it is asked."""

    def __init__(self) -> None:
        self.asked, self._let = threading.Event(), threading.Semaphore(0)
        self.sizes: list[int] = []
        self.inner = engine().runner
        self.config, self.blocks, self.device = self.inner.config, self.inner.blocks, self.inner.device
        self.copy, self.clear, self.exact = self.inner.copy, self.inner.clear, self.inner.exact

    def let(self, steps: int = 1) -> None:
        self._let.release(steps)

    def logits(self, batch: PagedBatch) -> Tensor:
        self.sizes.append(sum(map(len, batch.ids)))
        self.asked.set()
        self._let.acquire()
        return self.inner.logits(batch)


@pytest.fixture
def gated() -> Iterator[tuple[EngineThread, Gate]]:
    gate = Gate()
    worker = EngineThread(Engine(gate, tokens=380, config=EngineConfig(speculate=False)))  # type: ignore[arg-type]
    yield worker, gate
    gate.let(10_000)
    worker.close()


def test_a_prompt_holds_no_stream_up(gated: tuple[EngineThread, Gate]) -> None:
    worker, gate = gated
    first = worker.submit(Request([1, 2, 3], Sampling(max_new_tokens=20)))
    gate.let()
    stream = iter(first)
    next(stream)
    second = worker.submit(Request([n % 380 for n in range(230)], Sampling(max_new_tokens=2)))
    gate.let(10_000)
    assert len(ids(second)) == 2
    assert sum(gate.sizes) > 230 and max(gate.sizes) <= 98


@needs_compiler
def test_threads_and_coroutines_get_the_answers_that_they_would_get_alone() -> None:
    made: dict[int, list[int]] = {}
    with EngineThread(engine()) as worker:

        def read(number: int) -> None:
            made[number] = ids(worker.submit(requests()[number]))

        async def both() -> list[list[int]]:
            async def ask(request: Request) -> list[int]:
                return [token async for step in worker.submit(request) for token in step.ids]

            return await asyncio.gather(*map(ask, requests()))

        threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        assert asyncio.run(both()) == alone()
        for thread in threads:
            thread.join()
        assert [made[number] for number in range(8)] == alone()
        worker.engine.check()


@needs_compiler
@pytest.mark.parametrize("seed", range(3))
def test_consumers_that_come_and_go_at_random_harm_nobody(seed: int) -> None:
    """Catches a step that goes to another consumer, is lost or comes twice, and a request that never ends."""
    wrong: list[str] = []
    faults = random.Random(seed)

    class Unlucky(Faulty):
        def logits(self, batch: PagedBatch) -> Tensor:
            if faults.random() < 0.01:
                raise RuntimeError("the device fell off")
            return super().logits(batch)

    runner = Unlucky(engine(blocks=30).runner, iter(()))
    it = Engine(runner, tokens=380, config=EngineConfig(max_sequences=5, max_batch_tokens=40))  # type: ignore[arg-type]
    with EngineThread(it) as worker:

        def consume(number: int) -> None:
            luck = random.Random(f"{seed} {number}")
            for _ in range(6):
                row = luck.randrange(8)
                steps: list[Step] = []
                handle = worker.submit(requests()[row])
                leaves = luck.choice([None, None, 0, 1, 5])
                try:
                    for step in handle:
                        steps.append(step)
                        if leaves is not None and len(steps) > leaves:
                            break
                        if luck.random() < 0.05:
                            handle.abort()
                except EngineFailed as error:
                    if "device fell off" not in str(error):
                        wrong.append(str(error))
                whole = steps and steps[-1].finish_reason in ("stop", "length")
                expected = alone()[row]
                if ids(steps) != (expected if whole else expected[: len(ids(steps))]):
                    wrong.append(f"row {row}: {ids(steps)}")

        threads = [threading.Thread(target=consume, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        worker.call(lambda engine: engine.check()).result()
    assert not wrong
    assert not it.busy


def test_nothing_waits_for_a_step(gated: tuple[EngineThread, Gate]) -> None:
    worker, gate = gated
    first = worker.submit(Request([1], KINDS[0]))
    gate.asked.wait()  # now the engine computes, and will not end before it is let
    second = worker.submit(Request([2], KINDS[0]))
    assert first.take() == second.take() == [] and not first.done
    second.abort()
    assert worker.engine.statistics().running == 1
    gate.let(100)
    assert [step.finish_reason for step in second] == ["abort"]
    assert len(ids(first)) == 20 and first.done


def test_an_idle_thread_sleeps() -> None:
    """Catches polling: each look for work comes of a submission or of an end."""
    looks = 0

    class Counting(EngineThread):
        def _has_work(self) -> bool:
            nonlocal looks
            looks += 1
            return super()._has_work()

    with Counting(engine()) as worker:
        steps = list(worker.submit(Request([1], KINDS[0])))
        asleep = threading.Event()
        asleep.wait(0.05)
        assert looks <= len(steps) + 10


def test_who_does_not_read_is_ended_by_name_alone(gated: tuple[EngineThread, Gate]) -> None:
    worker, gate = gated
    worker.max_unread = 10
    asleep = worker.submit(Request([1], Sampling(max_new_tokens=100)))
    read: list[Step] = []
    awake = worker.submit(Request([2], Sampling(max_new_tokens=100)))
    ended = threading.Event()
    awake.listen(lambda: (read.extend(awake.take()), awake.done and ended.set()))
    gate.let(10_000)
    ended.wait()
    assert len(ids(read)) == 100
    assert 10 < len(ids(asleep.take())) <= 12
    with pytest.raises(ResourceError, match="11 steps of the answer were not read, of at most 10"):
        asleep.take()
    assert not worker.engine.busy


class Broken:
    """A constraint whose matcher cannot be made."""

    def matcher(self) -> None:
        raise KeyError("no such grammar")


def test_errors_of_a_request_reach_it_alone(gated: tuple[EngineThread, Gate]) -> None:
    worker, gate = gated
    good = worker.submit(Request([1], KINDS[0]))
    bad = worker.submit(Request([1], KINDS[0], constraint=Broken()))
    with pytest.raises(UserError, match="holds the id 400"):
        worker.submit(Request([400]))
    gate.let(100)
    with pytest.raises(KeyError, match="no such grammar"):
        list(bad)
    assert len(ids(good)) == 20


def thread(*faults: Any) -> EngineThread:
    runner = Faulty(engine().runner, iter(faults))
    return EngineThread(Engine(runner, tokens=380, config=EngineConfig()))  # type: ignore[arg-type]


def test_logits_that_are_not_finite_end_their_request_by_name() -> None:
    with thread(lambda batch, logits: logits * float("nan")) as worker, pytest.raises(NumericalError, match="not fini"):
        list(worker.submit(Request([1], KINDS[0])))


def test_a_failure_of_the_engine_is_told_to_all_and_it_goes_on() -> None:
    with thread(None, RuntimeError("no device")) as worker:
        handles = [worker.submit(Request(prompt, KINDS[0])) for prompt in prompts(3)]
        failed = 0
        for handle in handles:
            try:
                list(handle)
            except EngineFailed as error:
                failed += 1
                assert str(error) == "the engine failed: RuntimeError: no device"
                assert isinstance(error.__cause__, RuntimeError)
        assert failed >= 1
        assert len(ids(worker.submit(Request([1], KINDS[0])))) == 20


def test_an_engine_that_is_out_of_order_takes_nothing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = thread(RuntimeError("no device"))

    def check() -> None:
        raise AssertionError

    monkeypatch.setattr(worker.engine, "check", check)
    with pytest.raises(EngineFailed, match="no device"):
        list(worker.submit(Request([1], KINDS[0])))
    worker._thread.join()
    with pytest.raises(EngineFailed, match="no device"):
        worker.submit(Request([1], KINDS[0]))
    with pytest.raises(EngineFailed):
        worker.call(lambda engine: None)
    worker.close(drain=True)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_answers_or_aborts_what_is_there(gated: tuple[EngineThread, Gate], drain: bool) -> None:
    worker, gate = gated
    handle, later = worker.submit(Request([1], Sampling(max_new_tokens=8))), worker.submit(Request([2], KINDS[0]))
    gate.asked.wait()
    closing = threading.Thread(target=worker.close, kwargs={"drain": drain})
    closing.start()
    while not worker._closing:
        pass
    with pytest.raises(ResourceError, match="being closed"):
        worker.submit(Request([1], KINDS[0]))
    gate.let(1000)
    closing.join()
    assert not worker._thread.is_alive()
    assert [step.finish_reason for step in handle][-1] == ("length" if drain else "abort")
    assert handle.done and (drain or later.take()[-1].finish_reason == "abort")


def test_draining_ends_after_its_time(gated: tuple[EngineThread, Gate]) -> None:
    worker, gate = gated
    handle = worker.submit(Request([1], KINDS[0]))
    gate.asked.wait()
    threading.Timer(0.05, gate.let).start()
    worker.close(drain=True, timeout=0.01)
    assert [step.finish_reason for step in handle][-1] == "abort"


def test_whoever_cannot_be_notified_is_gone() -> None:
    def gone() -> None:
        raise RuntimeError("Event loop is closed")

    with EngineThread(engine()) as worker:
        handle = worker.submit(Request([1], Sampling(max_new_tokens=200)), gone)
        assert [step.finish_reason for step in handle][-1] == "abort"


def test_a_full_queue_refuses_at_once(gated: tuple[EngineThread, Gate]) -> None:
    gate = Gate()
    config = EngineConfig(max_waiting=2, max_sequences=1, speculate=False)
    worker = EngineThread(Engine(gate, tokens=380, config=config))  # type: ignore[arg-type]
    handles: list[Handle] = [worker.submit(Request([1], KINDS[0]))]
    gate.asked.wait()
    handles += [worker.submit(Request([1], KINDS[0])) for _ in range(2)]
    with pytest.raises(ResourceError, match="2 requests are waiting, of at most 2"):
        worker.submit(Request([1], KINDS[0]))
    gate.let(1000)
    assert [len(ids(handle)) for handle in handles] == [20] * 3
    worker.close()


def test_memory_is_given_back_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    it, trimmed = engine(), threading.Event()
    monkeypatch.setattr(it, "trim", trimmed.set)
    with EngineThread(it, trim_after=0.01) as worker:
        assert len(ids(worker.submit(Request([1], KINDS[0])))) == 20
        trimmed.wait()
        assert len(ids(worker.submit(Request([1], KINDS[0])))) == 20


def test_calls_are_made_between_steps() -> None:
    with EngineThread(engine()) as worker:
        assert worker.call(lambda engine: engine.adapters).result() == []
        with pytest.raises(UserError, match="no adapter 'x'"):
            worker.call(lambda engine: engine.remove_adapter("x")).result()
