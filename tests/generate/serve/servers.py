"""Servers on tiny models, in the process of the tests."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx2

from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.llm import LLM, load
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.models import Limits
from lit_llama.generate.serve.server import addresses, listen, make_server
from lit_llama.generate.serve.service import Service


class Client:
    """Requests to an application without a socket; each runs in an event loop of its own, or in one together."""

    def __init__(self, app: Any) -> None:
        self.app = app

    @asynccontextmanager
    async def open(self) -> AsyncIterator[httpx2.AsyncClient]:
        transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client

    def ask(self, method: str, path: str, **more: Any) -> httpx2.Response:
        async def one() -> httpx2.Response:
            async with self.open() as client:
                return await client.request(method, path, **more)

        return asyncio.run(one())

    def post(self, path: str, /, **body: Any) -> httpx2.Response:
        return self.ask("POST", path, json=body)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return self.ask("GET", path, **more)

    def chat(self, content: Any = "Where do llamas live?", **more: Any) -> httpx2.Response:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **more)

    def refused(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        content = body if isinstance(body, bytes | str) else json.dumps(body)
        reply = self.ask("POST", path, content=content)
        assert reply.status_code == status, reply.text
        error: dict[str, Any] = reply.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


@cache
def tiny(folder: Path) -> tuple[LLM, EngineThread]:
    """The model of a folder with a thread that drives it, for all tests of the process."""
    llm = load(folder)
    return llm, EngineThread(llm.engine)


def service(folder: Path, limits: Limits | None = None, **more: Any) -> Service:
    """A service of that model."""
    llm, worker = tiny(folder)
    made = Service(limits or Limits(), **more)
    made.start({"tiny": llm}, worker)
    return made


@cache
def serving(folder: Path) -> Client:
    """A client of a server of that model."""
    return Client(create_app(service(folder)))


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address of a server with a socket, in a thread."""
    made = listen("127.0.0.1", 0)
    server = make_server(app, 5)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[made])))
    thread.start()
    try:
        yield addresses(made)[0]
    finally:
        server.should_exit = True
        thread.join()


def events(text: str) -> list[Any]:
    """What the events of a stream hold."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
