"""A thread that drives an engine for consumers in other threads and in event loops.

    with EngineThread(llm.engine) as worker:
        for step in worker.submit(request):              # in any thread
            ...
        async for step in worker.submit(request):        # in a coroutine
            ...

Nothing here waits for a step: `submit`, `abort` and `take` return at once, whatever the model computes.
"""

import asyncio
import atexit
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from lit_llama.errors import ResourceError
from lit_llama.generate.engine.engine import Engine
from lit_llama.generate.engine.request import Request, Step
from lit_llama.generate.engine.ticket import Ticket

T = TypeVar("T")


class EngineFailed(RuntimeError):
    """Failure of the engine itself, which raised an exception, its cause; all requests that it had are called off."""


class Handle:
    """A request of an EngineThread, and the steps of its answers that were not read yet.

    Attributes:
        request: As it was submitted.
    """

    def __init__(self, worker: "EngineThread", request: Request, notify: Callable[[], object] | None) -> None:
        self.request = request
        self._worker, self._notify = worker, notify
        self._ticket: Ticket | None = None
        self._steps: deque[Step] = deque()
        self._error: Exception | None = None
        self._closed = False  # nothing more is put into it
        self._news = threading.Condition()

    @property
    def done(self) -> bool:
        """Whether everything was taken that will ever come."""
        return self._closed and not self._steps

    def take(self) -> list[Step]:
        """Return the steps that have come, without waiting.

        Raises:
            UserError: The request failed, or its steps were not read in time; all before was taken.
            EngineFailed: The engine failed, with all its requests.
        """
        with self._news:
            steps = list(self._steps)
            self._steps.clear()
            if not steps and self._error is not None:
                raise self._error
            return steps

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found computed, once the first step has come."""
        return 0 if self._ticket is None else self._ticket.answers[0].sequence.reused

    def abort(self, answer: int | None = None) -> None:
        """End the request, or one of its answers; what goes on ends with the reason `abort`.

        Nothing happens where it has ended.
        """
        self._worker._call_off(self, answer)

    def listen(self, notify: Callable[[], object] | None) -> None:
        """Call something, in the engine's thread, whenever steps or the end have come.

        It must return at once, as `lambda: loop.call_soon_threadsafe(event.set)` does. If it raises, nobody listens
        any more, and the request is aborted.
        """
        self._notify = notify

    def __iter__(self) -> Iterator[Step]:
        """Wait for the steps, in a thread; leaving the loop aborts the request. Errors are those of `take`."""
        try:
            while not self.done or self._error is not None:
                with self._news:
                    self._news.wait_for(lambda: self._steps or self._closed)
                yield from self.take()
        finally:
            self.abort()

    async def __aiter__(self) -> AsyncIterator[Step]:
        """Wait for the steps, in a coroutine; closing the iterator aborts the request. Errors are those of `take`.

        A loop that is left early closes it only when it is collected: use `contextlib.aclosing`, or `abort`.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        self.listen(lambda: loop.call_soon_threadsafe(news.set))
        try:
            while not self.done or self._error is not None:
                news.clear()
                for step in self.take():
                    yield step
                if not self._closed:
                    await news.wait()
        finally:
            self.listen(None)
            self.abort()

    def _put(self, steps: deque[Step], error: Exception | None, end: bool) -> bool:
        """Take over what has come; False if whoever is to read it cannot be told."""
        with self._news:
            if self._closed:
                return True
            while steps:
                self._steps.append(steps.popleft())
            self._error, self._closed = error, end or error is not None
            self._news.notify_all()
        try:
            if (notify := self._notify) is not None:
                notify()
        except Exception:  # the loop of the consumer is closed, say
            self._notify = None
            return False
        return True


class EngineThread:
    """Thread that drives an engine, and waits where there is nothing to compute.

    Args:
        engine: Whose steps nobody else computes meanwhile.
        max_unread: Steps that wait for one consumer, at most; a request beyond is ended with a ResourceError.
        trim_after: Seconds without work after which the memory of known prompts is given back, see `Engine.trim`; None
            to keep it.
    """

    def __init__(self, engine: Engine, *, max_unread: int = 4096, trim_after: float | None = None) -> None:
        self.engine, self.max_unread, self._trim_after = engine, max_unread, trim_after
        self._wake = threading.Condition()
        self._new: deque[Handle] = deque()
        self._off: deque[tuple[Handle, int | None]] = deque()
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._live: dict[Handle, None] = {}  # submitted, not ended
        self._closing = self._ending = False  # nothing is taken in; what is there is aborted
        self._failure: BaseException | None = None  # after which the engine cannot go on
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        # A daemon amid a step when the interpreter goes down could crash it.
        atexit.register(self.close)

    # ---- for consumers, from any thread

    def submit(self, request: Request, notify: Callable[[], object] | None = None) -> Handle:
        """Take a request in.

        Args:
            request: What is asked.
            notify: See `Handle.listen`; iterating needs none.

        Raises:
            UserError: It cannot be answered, see `Engine.check_request`.
            ResourceError: Too many requests are waiting, or the thread is being closed.
            EngineFailed: The engine failed and cannot go on.
        """
        self.engine.check_request(request)
        handle = Handle(self, request, notify)
        with self._wake:
            self._check_open()
            most = self.engine.config.max_waiting
            waiting = self.engine.statistics().waiting + sum(other.request.sampling.n for other in self._new)
            if waiting + request.sampling.n > most:
                raise ResourceError(f"{waiting} requests are waiting, of at most {most}; try again later")
            self._live[handle] = None
            self._new.append(handle)
            self._wake.notify_all()
        return handle

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Let something be done with the engine between two steps, such as loading an adapter.

        Raises:
            ResourceError: The thread is being closed.
            EngineFailed: The engine failed and cannot go on.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.engine))
                except BaseException as error:
                    future.set_exception(error)

        with self._wake:
            self._check_open()
            self._calls.append((run, future))  # type: ignore[arg-type]
            self._wake.notify_all()
        return future

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """End the thread; the engine stays as it is. Closing it twice does nothing.

        Args:
            drain: Answer first what was submitted; else it is aborted at once.
            timeout: Seconds after which what is not answered is aborted all the same.
        """
        with self._wake:
            self._closing = True
            if drain:
                self._wake.wait_for(lambda: not self._live or self._ending, timeout)
            self._ending = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "EngineThread":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise _failed(self._failure)
        if self._closing:
            raise ResourceError("no more requests are taken in, as the engine is being closed")

    def _call_off(self, handle: Handle, answer: int | None = None) -> None:
        with self._wake:
            if handle in self._live:
                self._off.append((handle, answer))
                self._wake.notify_all()

    # ---- in the thread

    def _run(self) -> None:
        while True:
            with self._wake:
                rested = self._trim_after is not None and not self._wake.wait_for(self._has_work, self._trim_after)
            if rested:
                self.engine.trim()
            with self._wake:
                self._wake.wait_for(self._has_work)
                new, off, calls, ending = self._new, self._off, self._calls, self._ending
                self._new, self._off, self._calls = deque(), deque(), deque()
            try:
                for run, _ in calls:
                    run()
                for handle in new:
                    self._admit(handle)
                for handle, answer in off:
                    self._abort(handle, answer)
                for handle in list(self._live) if ending else ():  # nothing is submitted while it ends
                    self._abort(handle)
                if ending:
                    return
                if self._live:
                    self.engine.step(streamed=True)
            except BaseException as error:
                if not self._recovers(error):
                    return

    def _has_work(self) -> bool:
        return bool(self._new or self._off or self._calls or self._ending or (self._live and self.engine.busy))

    def _admit(self, handle: Handle) -> None:
        try:
            handle._ticket = self.engine.add(handle.request, notify=lambda: self._deliver(handle))
        except Exception as error:  # of this request alone, as nothing is changed
            self._end(handle, error)

    def _abort(self, handle: Handle, answer: int | None = None) -> None:
        if handle._ticket is not None and not handle._ticket.done:
            self.engine.abort(handle._ticket, answer)

    def _deliver(self, handle: Handle) -> None:
        """Hand over what the engine has put into a ticket."""
        ticket = handle._ticket
        if ticket is None:
            return
        told = handle._put(ticket.steps, ticket.error, ticket.done)
        unread = len(handle._steps)
        if ticket.done:
            self._end(handle)
        elif unread > self.max_unread:
            message = f"{unread} steps of the answer were not read, of at most {self.max_unread}: it was ended"
            handle._put(deque(), ResourceError(message), True)
            self._call_off(handle)
        elif not told:
            self._call_off(handle)

    def _end(self, handle: Handle, error: Exception | None = None) -> None:
        handle._put(deque(), error, True)
        with self._wake:
            self._live.pop(handle, None)
            self._wake.notify_all()

    def _recovers(self, error: BaseException) -> bool:
        """Report an exception of the engine to all requests; whether the engine is in order without them."""
        with self._wake:
            handles = list(self._live)
        for handle in handles:
            self._end(handle, _failed(error))
        try:
            self.engine.abort_all()
            self.engine.check()
        except BaseException:
            with self._wake:
                self._failure = error
                for _, future in self._calls:
                    future.cancel()
                handles = list(self._live)
            for handle in handles:  # submitted meanwhile
                self._end(handle, _failed(error))
            return False
        return True


def _failed(error: BaseException) -> EngineFailed:
    failed = EngineFailed(f"the engine failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed
