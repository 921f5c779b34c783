"""State of a server: its models once they are loaded, the answers that are being made, and how each one is made.

Its counts and times are those of Prometheus.
"""

import asyncio
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lit_llama.console import visible
from lit_llama.device import resident_memory, trim_freed_memory
from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.engine.ticket import Statistics
from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.llm import LLM
from lit_llama.generate.serve.fields import ApiError, parse_json, refusal
from lit_llama.generate.serve.models import Limits, Models
from lit_llama.generate.serve.replies import Reply, encoded
from lit_llama.generate.serve.requests import Asked
from lit_llama.generate.serve.running import Running

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_ALL = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts and times of one server.

    Args:
        statistics: Those of the engine; None while there is none.
    """

    def __init__(self, statistics: Callable[[], Statistics | None]) -> None:
        self._registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self._registry}
        self.replies = Counter("lit_llama_requests", "Replies by path and status.", ["path", "status"], **more)
        self.open = Gauge("lit_llama_requests_open", "Requests that are being answered.", **more)
        self.gone = Counter("lit_llama_disconnects", "Requests whose client went away.", **more)
        self.prompt_tokens = Counter("lit_llama_prompt_tokens", "Tokens of prompts.", **more)
        self.made_tokens = Counter("lit_llama_generated_tokens", "Tokens of answers.", **more)
        self.first = Histogram(
            "lit_llama_time_to_first_token_seconds", "Until an answer began.", buckets=_FIRST, **more
        )
        self.token = Histogram("lit_llama_time_per_token_seconds", "Between tokens, as a mean.", buckets=_TOKEN, **more)
        self.whole = Histogram("lit_llama_request_seconds", "Until an answer was complete.", buckets=_ALL, **more)
        self._registry.register(_Engine(statistics))

    def answered(self, *, prompt: int, made: int, seconds: float, first: float | None) -> None:
        """Count a request that has ended, however it did.

        Args:
            prompt: Tokens of its prompts.
            made: Tokens of its answers.
            seconds: That it took.
            first: Seconds until its answers began; None if they did not.
        """
        self.prompt_tokens.inc(prompt)
        self.made_tokens.inc(made)
        self.whole.observe(seconds)
        if first is not None:
            self.first.observe(first)
            if made > 1:
                self.token.observe((seconds - first) / (made - 1))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """What the engine counts itself."""

    def __init__(self, statistics: Callable[[], Statistics | None]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("lit_llama_resident_bytes", "Memory of the process.", resident_memory())
        now = self._statistics()
        if now is None:
            return
        yield GaugeMetricFamily("lit_llama_answers_running", "Answers in the batch.", now.running)
        yield GaugeMetricFamily("lit_llama_answers_waiting", "Answers in the queue.", now.waiting)
        yield GaugeMetricFamily("lit_llama_cache_blocks", "Blocks of the cache.", now.blocks)
        yield GaugeMetricFamily("lit_llama_cache_blocks_free", "Blocks that nothing running holds.", now.blocks_free)
        counts = {
            "steps": ("Steps of the engine.", now.steps),
            "computed_tokens": ("Tokens that went through the model.", now.computed),
            "cached_tokens": ("Tokens of prompts that were found computed.", now.reused),
            "guessed_tokens": ("Tokens that were guessed.", now.guessed),
            "guessed_right_tokens": ("Guesses that were right.", now.guessed_right),
            "preemptions": ("Answers that were put off for want of memory.", now.preemptions),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(f"lit_llama_{name}", text, value)


T = TypeVar("T")
_READERS = 4
"""Requests that are read together: each takes up to some 200 times the bytes of its text while that is encoded."""
_TRIM_EVERY = 1 << 20
"""Bytes of requests after which the memory that encoding them took is given back, which takes milliseconds."""
GONE = 499
"""Status of a request whose client went away, as nginx has it; nobody receives it."""


@dataclass
class Service:
    """State that the routes of a server share.

    Args:
        limits: Of requests.
        log: Takes lines about requests, without what was asked and answered.
        content_log: Takes what was asked and answered, as JSON; None for nothing.

    Attributes:
        models: None while they are loaded.
        answers: That are being made or wait, of this service alone.
    """

    limits: Limits = field(default_factory=Limits)
    log: Callable[[str], object] = lambda line: None
    content_log: Callable[[str], object] | None = None
    models: Models | None = None
    answers: int = 0
    metrics: Metrics = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _readers: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(_READERS), repr=False)
    _untrimmed: int = 0  # bytes of requests

    def __post_init__(self) -> None:
        self.metrics = Metrics(self._statistics)

    def _statistics(self) -> Statistics | None:
        return None if self.models is None else self.models.worker.engine.statistics()

    def start(
        self, llms: Mapping[str, LLM], worker: EngineThread, defaults: Mapping[str, Sampling] | None = None
    ) -> None:
        """Answer requests from now on.

        Args:
            llms: The models by their names, all on one engine; the first one is that of requests that name none.
            worker: The thread that drives it.
            defaults: How each is sampled where a request does not say; others take the most likely token.
        """
        self.models = Models(llms, worker, self.limits, defaults or {})

    def ready(self) -> Models:
        """Return the models.

        Raises:
            ApiError: They are still being loaded.
        """
        if self.models is None:
            raise ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "5"})
        return self.models

    # ---- a request

    async def answer(self, request: Request, read: Callable[[Mapping[str, Any], Models], Asked]) -> Response:
        """Answer a request for text.

        Args:
            request: Of HTTP.
            read: What makes requests of the engine of it.

        Raises:
            ApiError: It is refused.
        """
        models = self.ready()
        self.check_room(models, 1)
        body = await self.body(request)
        asked = await self.read(read, body, models)
        self.check_room(models, asked.choices)
        running = Running(asked, models.worker, self.limits.max_seconds)
        running.submit()
        self.note(asked.choices)
        reply = Reply(asked, running)
        headers = {"X-Dropped": str(asked.dropped)} if asked.dropped else {}

        def after() -> None:
            self.note(-asked.choices)
            running.abort()
            self._count(request, body, reply, running)

        if asked.stream:
            return _Events(reply, after, self.limits.max_seconds + 60, headers)
        try:
            response = await self._whole(request, reply)
            response.headers.update(headers)
            return response
        finally:
            after()

    async def _whole(self, request: Request, reply: Reply) -> Response:
        """A reply in one, unless the client goes away before."""
        made = asyncio.ensure_future(reply.whole())
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not made.done():
                self.metrics.gone.inc()
                return Response(status_code=GONE)
            return json_response(made.result())
        finally:
            for task in (made, gone):
                task.cancel()
            await asyncio.gather(made, gone, return_exceptions=True)

    def note(self, more: int) -> None:
        """Note answers that begin, or, below 0, that have ended; from any thread."""
        with self._lock:
            self.answers += more

    def check_room(self, models: Models, more: int) -> None:
        """Raise ApiError if not so many answers may run and wait besides those that do."""
        most = models.worker.engine.config.max_sequences + self.limits.max_waiting
        if more > most:
            raise refusal("n", f"asks for {more} answers, expected at most {most}, which is all that may run and wait")
        if self.answers + more > most:
            message = f"{self.answers} answers are being made or wait, of at most {most}; try again later"
            raise ApiError(429, message, headers={"Retry-After": "1"})

    async def body(self, request: Request) -> dict[str, Any]:
        """Read the JSON object of a request.

        Raises:
            ApiError: It is too large, too slow, or something else.
        """
        raw = await self._received(request)
        self._untrimmed += len(raw)
        return await self.read(parse_json, raw) if len(raw) > 1 << 16 else parse_json(raw)

    async def read(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call what parses or encodes a request in a thread, and give back what memory that took."""

        def work() -> T:
            try:
                return function(*arguments)
            finally:
                if self._untrimmed >= _TRIM_EVERY:
                    self._untrimmed = 0
                    trim_freed_memory()

        return await anyio.to_thread.run_sync(work, limiter=self._readers)

    async def _received(self, request: Request) -> bytes:
        most = self.limits.max_body
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > most:
            raise ApiError(413, f"the body has {announced} bytes, expected at most {most}")
        raw = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    raw += part
                    if len(raw) > most:
                        raise ApiError(413, f"the body has more than {most} bytes")
        except TimeoutError:
            message = f"the body did not arrive within {self.limits.body_seconds:g} seconds"
            raise ApiError(408, message, headers={"Connection": "close"}) from None
        return bytes(raw)

    def _count(self, request: Request, body: Mapping[str, Any], reply: Reply, running: Running) -> None:
        seconds, made, usage = time.monotonic() - running.started, running.made, running.usage()
        first = None if running.first is None else running.first - running.started
        self.metrics.answered(prompt=usage["prompt_tokens"], made=made, seconds=seconds, first=first)
        request.state.told = f"{usage['prompt_tokens']} tokens in, {made} out"
        if self.content_log is not None:
            import json

            self.content_log(json.dumps({"path": request.url.path, "request": body, "answers": reply.answers}))

    def fault(self) -> Response:
        """Return the reply where this program is at fault, which is logged."""
        self.log(visible(traceback.format_exc()))
        return error_response(ApiError(500, "the server failed; its log says more"))


class _Events(StreamingResponse):
    """A stream of events that ends what makes them, however it ends."""

    def __init__(self, reply: Reply, after: Callable[[], None], seconds: float, headers: Mapping[str, str]) -> None:
        said = {"Cache-Control": "no-store", **headers}
        super().__init__(reply.events(), media_type="text/event-stream", headers=said)
        self._after, self._seconds = after, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream the response as StreamingResponse does; a client that does not read is left alone after a while."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._after()


Endpoint = Callable[[Service, Request], Awaitable[Response]]


def route(service: Service, method: str, path: str, endpoint: Endpoint) -> Route:
    """Build a route all of whose errors are told as OpenAI's API has it, and never as a traceback."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(service, request)
        except ApiError as error:
            return error_response(error)
        except UserError as error:
            status = 503 if isinstance(error, ResourceError) else 400
            return error_response(ApiError(status, str(error).replace("--", "")))  # without the dashes of flags
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Exception:
            return service.fault()

    return Route(path, answered, methods=[method], name=f"{method} {path}")


async def _gone(request: Request) -> None:
    """Wait until a client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a reply in JSON."""
    return Response(encoded(body), status, media_type="application/json", headers=headers)


def error_response(error: ApiError) -> Response:
    """Return a refusal."""
    return json_response(error.body, error.status, error.headers)
