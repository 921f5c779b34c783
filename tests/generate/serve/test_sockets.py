"""Real connections: the official client, clients that go away, that are slow, and that are too many."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from conftest import write_adapter
from servers import Client, listening, service, tiny

from lit_llama.generate.answer import question_ids
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.llm import load
from lit_llama.generate.models import load_models
from lit_llama.generate.serve import server as server_module
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.models import Limits
from lit_llama.generate.serve.service import Service
from lit_llama.text.message import instruct

pytestmark = pytest.mark.timeout(60)
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def address(tiny_folder: Path) -> Iterator[str]:
    with listening(create_app(service(tiny_folder), keys=["a-key-of-some-length"])) as found:
        yield f"{found}/v1"


def until(condition: Callable[[], bool]) -> None:
    """Wait, for as long as the test may take."""
    while not condition():
        time.sleep(0.01)


def test_the_official_client(address: str) -> None:
    client = openai.OpenAI(base_url=address, api_key="a-key-of-some-length", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    fields: dict[str, Any] = {"model": "tiny", "messages": HI, "max_completion_tokens": 9, "temperature": 1, "seed": 5}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert choice.logprobs and choice.logprobs.content and len(choice.logprobs.content[0].top_logprobs) == 2
    assert whole.usage and whole.usage.prompt_tokens_details and whole.usage.completion_tokens == 9
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    text = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, logprobs=2, echo=True)
    assert [c.index for c in text.choices] == [0, 1] and text.choices[1].text.startswith("b")
    parsed = client.chat.completions.create(
        **fields | {"max_completion_tokens": 40},
        extra_body={"top_k": 5, "min_p": 0.1},
        response_format={"type": "json_object"},
    )
    assert (parsed.choices[0].message.content or "").lstrip().startswith("{")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**fields, extra_body={"mirostat": 1})
    assert refused.value.param == "mirostat" and refused.value.code == "unknown_field"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**fields | {"model": "other"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0).models.list()


def test_the_official_client_in_a_loop(address: str) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=address, api_key="a-key-of-some-length", max_retries=0) as client:
            fields: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 8, "temperature": 0}
            whole = await client.chat.completions.create(**fields)
            streams = [await client.chat.completions.create(**fields, stream=True) for _ in range(5)]
            for stream in streams:
                pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
                assert "".join(pieces) == whole.choices[0].message.content

    asyncio.run(run())


def test_a_client_that_goes_away_ends_its_request(tiny_folder: Path) -> None:
    """Catches: an engine that computes for nobody, blocks that are never given back."""
    own = service(tiny_folder)
    engine = tiny(tiny_folder)[0].engine
    with listening(create_app(own)) as address:
        token = tiny(tiny_folder)[0].tokenizer.encode("a")[0]
        body: dict[str, Any] = {"messages": HI, "n": 30, "logit_bias": {token: 100}, "temperature": 1}
        for stream in (True, False):
            url, before = f"{address}/v1/chat/completions", engine.statistics().made
            with (
                contextlib.suppress(httpx2.TimeoutException),
                httpx2.stream(
                    "POST", url, json={**body, "stream": stream}, timeout=httpx2.Timeout(30, read=0.05)
                ) as reply,
            ):
                next(reply.iter_lines())
            until(lambda: own.answers == 0 and engine.statistics().running == 0)
            assert engine.statistics().made - before < 30 * 200  # of 30 answers to the end of the context
        engine.check()


def test_more_clients_than_the_queue_holds(tiny_folder: Path) -> None:
    """200 at once on a queue of 16: those beyond are refused at once, all others have the right answer."""
    llm = load(tiny_folder)
    limits = Limits(max_waiting=16)
    made = Service(limits)
    with EngineThread(llm.engine) as worker:
        made.start({"tiny": llm}, worker)
        client = Client(create_app(made))

        gate, refusals = threading.Event(), 0  # the engine waits until all have asked
        worker.call(lambda engine: gate.wait(30))

        async def run() -> list[Any]:
            async with client.open() as http:

                async def one(number: int) -> Any:
                    nonlocal refusals
                    messages = [{"role": "user", "content": str(number)}]
                    body = {"messages": messages, "max_tokens": 12, "temperature": 0}
                    reply = await http.post("/v1/chat/completions", json=body)
                    refusals += reply.status_code == 429
                    if refusals == 200 - 48:
                        gate.set()
                    return reply

                return await asyncio.gather(*map(one, range(200)))

        replies = asyncio.run(run())
        answered = [number for number, reply in enumerate(replies) if reply.status_code == 200]
        assert len(answered) == 48 and refusals == 152  # 32 in the batch and 16 that wait
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert refused.headers["retry-after"] == "1" and refused.json()["error"]["type"] == "rate_limit_error"
        for number in answered[::7]:
            alone = client.chat(str(number), max_tokens=12, temperature=0).json()["choices"]
            assert replies[number].json()["choices"] == alone
        llm.engine.check()
        assert made.answers == 0 and llm.engine.statistics().running == 0


def test_a_reply_that_takes_too_long(tiny_folder: Path) -> None:
    client = Client(create_app(service(tiny_folder, Limits(max_seconds=0.0))))
    reply = client.chat(max_tokens=50)
    assert reply.status_code == 504 and reply.json()["error"]["type"] == "timeout_error"
    streamed = client.chat(max_tokens=50, stream=True)
    lines = [line for line in streamed.text.split("\n\n") if line]
    assert streamed.status_code == 200 and json.loads(lines[-2][6:])["error"]["code"] == "timeout"


def test_slow_requests_are_given_up(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a request, one with half a head, and one with half a body."""
    monkeypatch.setattr(server_module, "_HEAD_SECONDS", 0.2)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with listening(create_app(service(tiny_folder, Limits(body_seconds=0.2)))) as address:
        host, port = address.removeprefix("http://").split(":")
        half = b"POST /v1/completions HTTP/1.1\r\nHost: local"
        body = half + b"host\r\nContent-Length: 50\r\n\r\n{"
        for sent, more in ((b"", b""), (half, b""), (body, b""), (whole, half)):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(sent)
                received = connection.recv(4096)
                if more:
                    assert received.startswith(b"HTTP/1.1 200 ")
                    connection.sendall(more)
                    received = b""
                while part := connection.recv(4096):
                    received += part
            assert b"HTTP/1.1 408 " in received


def test_a_body_of_two_lengths_is_refused(address: str) -> None:
    """Catches waiting for the chunks of a body that was sent whole; a proxy before the server may see another end."""
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    for lengths in (
        b"Content-Length: 2\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2",
        b"Content-Length: 2\r\nContent-Length: 3",
        b"Content-Length: -2",
        b"Transfer-Encoding: gzip",
    ):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + lengths + b"\r\n\r\n{}")
            received = b""
            while part := connection.recv(4096):
                received += part
        assert received.startswith(b"HTTP/1.1 400 "), lengths


def test_adapters_answer_by_their_names_in_one_batch(tiny_folder: Path, tmp_path: Path) -> None:
    """Each as it would alone, against an engine that has only it."""
    folders = {
        name: write_adapter(tmp_path / name, tiny_folder, style="alpaca", seed=seed)
        for name, seed in (("a", 1), ("b", 2))
    }
    llms = load_models(tiny_folder, folders)
    made = Service()
    with EngineThread(next(iter(llms.values())).engine) as worker:
        made.start(llms, worker)
        client = Client(create_app(made))
        listed = {model["id"]: model["parent"] for model in client.get("/v1/models").json()["data"]}
        base = next(iter(listed))
        assert listed == {base: None, "a": base, "b": base}
        names = [None, base, "a", "b"] * 3

        async def run() -> list[Any]:
            async with client.open() as http:

                async def one(number: int, name: str | None) -> Any:
                    messages = [{"role": "user", "content": f"hi {number}"}]
                    body = {"messages": messages, "model": name, "max_tokens": 10, "temperature": 1, "seed": number}
                    return (await http.post("/v1/chat/completions", json=body)).json()

                return await asyncio.gather(*(one(number, name) for number, name in enumerate(names)))

        replies = asyncio.run(run())
    own = {name: load(folder) for name, folder in {base: tiny_folder, **folders}.items()}
    for number, (name, reply) in enumerate(zip(names, replies, strict=True)):
        assert reply["model"] == (name or base)
        llm = own[name or base]
        stream = llm.answer(
            question_ids(llm, instruct(f"hi {number}", "")), Sampling(max_new_tokens=10, temperature=1, seed=number)
        )
        assert reply["choices"][0]["message"]["content"] == "".join(text for _, text in stream)
