"""A teacher behind an API, against an endpoint that does all that endpoints do."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.flags import Loading
from lit_llama.generate.rows.make import open_teacher
from lit_llama.generate.rows.remote import RemoteTeacher, Waits
from lit_llama.generate.rows.teacher import Ask, Key, Reply

QUICK = Waits(patience=20, timeout=5, first=0.01, longest=0.02)
ASK = Ask(messages=({"role": "user", "content": "hi"},), sampling=Sampling(temperature=0.5, stop=["x"]))


def completion(*texts: str, reason: str = "stop") -> bytes:
    choices = [{"message": {"role": "assistant", "content": text}, "finish_reason": reason} for text in texts]
    return json.dumps({"choices": choices, "usage": {"completion_tokens": 3, "prompt_tokens": 4}}).encode()


class Endpoint(http.server.ThreadingHTTPServer):
    """Does with the n-th request what `script` says, with later ones the last of it."""

    daemon_threads = True

    def __init__(self, script: list[Callable[[Any], None]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.bodies, self.headers, self.lock = script, list[Any](), list[Any](), threading.Lock()
        self.most = self.now = 0

    def handle_error(self, *_: Any) -> None:
        """Clients go away, as they should."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        server = self.server
        with server.lock:
            server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            server.headers.append(dict(self.headers))
            act = server.script[min(len(server.bodies), len(server.script)) - 1]
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            act(self)
        finally:
            with server.lock:
                server.now -= 1

    def do_GET(self) -> None:
        answer(200, b'{"data": [{"id": "only"}]}')(self)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def answer(status: int, data: bytes, **headers: str) -> Callable[[Any], None]:
    def act(handler: Any) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return act


def hang_up(handler: Any) -> None:
    """As a server that is killed."""
    handler.close_connection = True


def dribble(handler: Any) -> None:
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(500):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


GOOD = answer(200, completion("fine"))


@contextmanager
def endpoint(*script: Callable[[Any], None]) -> Iterator[Endpoint]:
    server = Endpoint(list(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask_all(server: Endpoint, count: int = 1, waits: Waits = QUICK, ask: Ask = ASK, **more: Any) -> dict[Key, Reply]:
    teacher = RemoteTeacher(f"http://127.0.0.1:{server.server_port}/v1", waits=waits, **more)
    try:
        for number in range(count):
            teacher.add((number, "column"), ask)
        found: dict[Key, Reply] = {}
        while len(found) < count:
            found.update(teacher.wait())
        return found
    finally:
        teacher.close()


@pytest.mark.parametrize(
    "trouble",
    [
        answer(503, b"starting"),
        answer(429, b"{}", Retry_After="0.05"),
        answer(200, b"<!DOCTYPE html><html>log in</html>"),
        answer(200, completion("half")[:30]),
        answer(200, completion("half")[:30], Content_Length="900"),
        answer(200, b'{"error": "none"}'),
        hang_up,
    ],
)
def test_trouble_that_passes_is_waited_for(trouble: Callable[[Any], None]) -> None:
    with endpoint(trouble, trouble, GOOD) as server:
        assert ask_all(server) == {
            (0, "column"): Reply(texts=["fine"], finish_reasons=["stop"], tokens=3, prompt_tokens=4)
        }
        assert len(server.bodies) == 3


def test_an_answer_that_never_ends_is_given_up() -> None:
    with endpoint(dribble, GOOD) as server:
        found = ask_all(server, waits=Waits(patience=20, timeout=0.2, first=0.01))
        assert found[0, "column"].texts == ["fine"]


def test_an_endpoint_that_is_down_ends_the_run_after_a_while() -> None:
    waits = Waits(patience=0.1, first=0.01, longest=0.02)
    with (
        endpoint(answer(503, b"no")) as server,
        pytest.raises(ResourceError, match=r"answered nothing .*nothing is lost"),
    ):
        ask_all(server, waits=waits)
    with pytest.raises(ResourceError, match="ConnectError"):  # the port is free again
        RemoteTeacher(f"http://127.0.0.1:{server.server_port}/v1", waits=waits)


def test_what_the_endpoint_asks_for_holds_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint(answer(429, b"", Retry_After="3600"), GOOD) as server:
        teacher = RemoteTeacher(f"http://127.0.0.1:{server.server_port}/v1", waits=QUICK, concurrency=1)
        teacher.add((0, "a"), ASK)
        teacher.add((1, "a"), ASK)
        while not server.bodies:
            teacher.wait()
        for _ in range(2):
            assert teacher.wait() == []
        assert len(server.bodies) == 1
        teacher.close()


def test_a_prompt_that_is_refused_is_a_reply_and_the_others_go_on() -> None:
    with endpoint(answer(400, b"too long"), GOOD) as server:
        found = ask_all(server, 3, concurrency=1)
        assert "status 400: too long" in found[0, "column"].error
        assert [found[n, "column"].texts for n in (1, 2)] == [["fine"]] * 2


def test_a_prompt_that_always_fails_does_not_hold_the_others() -> None:
    def act(handler: Any) -> None:
        bad = handler.server.bodies[-1]["seed"] == ASK.sampling.seed
        (answer(500, b"bug") if bad else GOOD)(handler)

    with endpoint(act) as server:
        found = ask_all(server, 40, concurrency=2)
        assert "8 tries, at last: status 500: bug" in found[0, "column"].error
        assert all(found[number, "column"].texts == ["fine"] for number in range(1, 40))
        assert server.most <= 2


def test_a_wrong_key_or_address_ends_at_once() -> None:
    for status, says in ((401, "refuses the key"), (404, "status 404, expected 200; is the address right?")):
        with endpoint(answer(status, b"no")) as server, pytest.raises(UserError, match=says):
            ask_all(server)
            assert len(server.bodies) == 1


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with endpoint(GOOD) as server:
        ask_all(server, key_variable="MY_KEY")
        assert server.headers[0]["Authorization"] == "Bearer secret"
        teacher = RemoteTeacher(f"http://127.0.0.1:{server.server_port}/v1", key_variable="MY_KEY", model="m")
        assert "secret" not in teacher.name + teacher.identity
    for address, says in (
        ("http://example.com/v1", "would go to example.com unencrypted"),
        ("https://me:secret@example.com", "holds more than an address"),
        ("example.com", "expected an address such as"),
    ):
        with pytest.raises(UserError, match=says):
            RemoteTeacher(address, key_variable="MY_KEY", model="m")


def choice(content: str, usage: str = "null") -> bytes:
    """A completion of this JSON."""
    return f'{{"choices": [{{"message": {{"content": {content}}}}}], "usage": {usage}}}'.encode()


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b"3",
        b"[" * 100_000,
        b'{"choices": null}',
        b'{"choices": []}',
        b'{"choices": ["x"]}',
        b'{"choices": [{"message": null}]}',
        choice('[{"type": "text", "text": "x"}]'),
        choice("7"),
        choice('"x"', '{"completion_tokens": "many"}'),
        choice('"x"', '{"completion_tokens": 1e999}'),
        choice('"x"', "[1]"),
        b"\xff\xfe",
        b"",
    ],
)
def test_json_that_is_no_completion_is_asked_for_again(body: bytes) -> None:
    """Never another exception: what an endpoint sends is not ours."""
    with endpoint(answer(200, body), GOOD) as server:
        assert ask_all(server)[0, "column"].texts == ["fine"] and len(server.bodies) == 2


def test_halves_of_characters_are_replaced() -> None:
    with endpoint(answer(200, choice('"a \\ud83d b"'))) as server:
        assert ask_all(server)[0, "column"].texts == ["a ? b"]


def flood(handler: Any) -> None:
    """As fast as it goes, for ever."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b" " * (1 << 20))


def test_an_answer_without_end_is_not_kept_in_memory() -> None:
    with endpoint(flood, GOOD) as server:
        assert ask_all(server)[0, "column"].texts == ["fine"]


def test_redirects_are_not_followed() -> None:
    """The key would go where nobody has sent it."""
    with endpoint(answer(302, b"", Location="http://127.0.0.1:9/v1/chat/completions")) as server:
        with pytest.raises(UserError, match="status 302, expected 200; is the address right"):
            ask_all(server)
        assert len(server.bodies) == 1


def test_tokens_are_estimated_where_the_endpoint_does_not_tell() -> None:
    """Catches a limit of tokens that an endpoint without usage never reaches."""
    silent = json.dumps({"choices": [{"message": {"content": "0123456789"}, "finish_reason": "stop"}]}).encode()
    with endpoint(answer(200, silent)) as server:
        reply = ask_all(server)[0, "column"]
        assert (reply.texts, reply.tokens, reply.prompt_tokens) == (["0123456789"], 4, 1)


def test_what_is_asked_for_is_said() -> None:
    schema = {"type": "object"}
    with endpoint(answer(200, completion("{}", "{}", reason="length"))) as server:
        ask = Ask(messages=ASK.messages, sampling=Sampling(temperature=0.5, n=2, top_k=5, stop=["x"]), schema=schema)
        reply = ask_all(server, ask=ask)[0, "column"]
        assert reply.finish_reasons == ["length", "length"] and len(reply.texts) == 2
        body = server.bodies[0]
        assert body["model"] == "only" and body["n"] == 2 and body["top_k"] == 5 and body["stop"] == ["x"]
        assert body["response_format"]["json_schema"]["schema"] == schema and "min_p" not in body
        teacher = RemoteTeacher(f"http://127.0.0.1:{server.server_port}/v1", model="m")
        with pytest.raises(UserError, match="needs --checkpoint_dir"):
            teacher.check(Ask(messages=(), sampling=Sampling(), user_turn=True))


def test_what_a_folder_is_loaded_with_is_refused_beside_an_endpoint() -> None:
    """Rows of a model that was asked for in 4 bits and is not."""
    with pytest.raises(UserError, match="--quantize is for a model of --checkpoint_dir"):
        open_teacher(None, "http://localhost:1/v1", Loading(quantize="int4"))
    with pytest.raises(UserError, match="one of --checkpoint_dir and --endpoint, found none"):
        open_teacher(None, None)
