"""Each field is obeyed or refused by its name, and everything else that may come over a wire is refused as well."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from servers import Client, service, serving, tiny
from starlette.routing import Route

from lit_llama.generate.serve import service as service_module
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.fields import ApiError, once
from lit_llama.generate.serve.models import Limits
from lit_llama.generate.serve.service import Service

pytestmark = pytest.mark.timeout(60)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def client(tiny_folder: Path) -> Client:
    return serving(tiny_folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", -1, "expected 0 to 100"),
        ("temperature", "hot", "is text, expected a number"),
        ("temperature", True, "is a boolean"),
        ("top_p", 1.5, "expected 0 to 1"),
        ("top_k", 1.5, "expected a whole number"),
        ("min_p", [], "is a list"),
        ("n", 0, "expected 1"),
        ("n", 129, "expected at most 128"),
        ("max_tokens", 0, "expected 1 or more"),
        ("max_tokens", 10**30, "expected 0 to"),
        ("max_completion_tokens", 0, "expected 1"),
        ("seed", -1, "expected 0 to"),
        ("stop", [""], "expected texts of 1 to"),
        ("stop", ["a"] * 65, "expected at most 64"),
        ("presence_penalty", 3, "expected -2 to 2"),
        ("frequency_penalty", -3, "expected -2 to 2"),
        ("repetition_penalty", 0, "expected 0.001 to 1000"),
        ("logit_bias", {"a": 1}, "expected token ids from 0 to 383"),
        ("logit_bias", {"384": 1}, "expected token ids from 0 to 383"),
        ("logit_bias", {"3": 101}, "expected a number from -100 to 100"),
        ("logprobs", 3, "expected true or false"),
        ("top_logprobs", 2, "expected logprobs true"),
        ("stream_options", {"include_usage": True}, "expected stream true"),
        ("response_format", {"type": "xml"}, "expected one of text, json_object, json_schema"),
        ("response_format", {"type": "json_schema"}, "is missing"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}, "strin"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "not"),
        ("tools", [TOOL], "does not write tools"),
        ("tools", [{"type": "retrieval"}], "expected 'function'"),
        ("tool_choice", "required", "there are no tools"),
        ("tool_choice", {"type": "function", "function": {"name": "g"}}, "none of the tools"),
        ("chat_template_kwargs", {"enable_thinking": False}, "nothing that the model's chat template asks for"),
        ("messages", [], "at least one message"),
        ("messages", "hi", "expected a list"),
        ("messages", [{"role": "king", "content": "x"}], "expected one of system, developer, user, assistant, tool"),
        ("messages", [{"role": "user"}], "is missing"),
        ("messages", [{"role": "user", "content": 3}], "expected text or a list of text parts"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "reads text only"),
        ("messages", [{"role": "user", "content": "x", "colour": 1}], "not a field that is known"),
        ("messages", [{"role": "user", "content": "x", "name": "Bo"}], "not a field that is known"),
        ("messages", [*HI, {"role": "assistant", "content": "x"}], "is of the assistant"),
        ("messages", [{"role": "user", "content": "\ud800"}], "lone surrogate"),
        ("functions", [], "not a field that is known"),
        ("best_of", 2, "not a field that is known"),
        ("reasoning_effort", "high", "chat_template_kwargs"),
    ],
)
def test_each_field_is_refused_by_its_name(client: Client, field: str, value: Any, said: str) -> None:
    error = client.refused(CHAT, {"messages": HI, field: value})
    assert error["type"] == "invalid_request_error" and str(error["param"]).startswith(field.split("_kwargs")[0])
    assert said in error["message"] and error["message"].startswith(error["param"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [384]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "stream"),
        ({"prompt": "a", "messages": HI}, "messages"),
    ],
)
def test_fields_of_completions(client: Client, fields: dict[str, Any], param: str) -> None:
    assert client.refused(TEXT, fields)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "[]", "null", '"a"', "NaN", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', b"\xff\xfe"),
        *("[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, '{"a": ' + "9" * 5000 + "}"),
    ],
)
def test_what_is_no_json_object(client: Client, body: Any) -> None:
    assert client.refused(CHAT, body)["code"] == "invalid_json"


def test_a_field_twice_among_many_is_found_by_looking_once() -> None:
    """A body of a megabyte that keeps a core busy for an hour, as names are counted for each name."""

    class Name(str):
        compared = 0

        def __hash__(self) -> int:
            return super().__hash__()

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return super().__eq__(other)

    names = [Name(f"a{number}") for number in range(300)]
    with pytest.raises(ValueError, match="'a299' stands twice"):
        once([(name, 0) for name in [*names, Name("a299")]])
    assert Name.compared < 10 * len(names)


def test_memory_of_long_requests_is_given_back(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a MiB of them, however it is made up, and whatever becomes of them."""
    trimmed: list[int] = []
    monkeypatch.setattr(service_module, "trim_freed_memory", lambda: trimmed.append(1))
    client.refused(TEXT, {"prompt": "x" * (1 << 20), "mirostat": 1})
    assert len(trimmed) == 1
    for _ in range(5):
        client.post("/tokenize", prompt="x" * (1 << 18))
    assert len(trimmed) == 2


def test_a_prompt_that_is_too_long_is_told_with_both_numbers(client: Client) -> None:
    for path, fields in (
        (CHAT, {"messages": [{"role": "user", "content": "x y" * 400}]}),
        (TEXT, {"prompt": [5] * 250}),
    ):
        error = client.refused(path, {**fields, "max_tokens": 10})
        assert error["code"] == "context_length_exceeded" and "256" in error["message"]
        assert "250 tokens" in error["message"] or path == CHAT
    for path, fields in (
        (CHAT, {"messages": [{"role": "user", "content": "x" * 50_000}]}),
        (TEXT, {"prompt": "x" * 50_000}),
    ):
        error = client.refused(path, fields)  # whatever they are, so that they are not encoded
        assert error["code"] == "context_length_exceeded"
        assert "50000 characters" in error["message"] and "256" in error["message"]
    assert client.post(TEXT, prompt=[5] * 250, max_tokens=6).status_code == 200
    rest = client.chat("x" * 100, temperature=1, seed=1).json()  # without max_tokens an answer takes what is left
    assert rest["choices"][0]["finish_reason"] in ("length", "stop") and rest["usage"]["total_tokens"] <= 256


def test_other_paths_and_models(client: Client) -> None:
    assert client.refused(CHAT, {"messages": HI, "model": "gpt-9"}, 404)["code"] == "model_not_found"
    assert client.refused("/v1/chat", {}, 404)["code"] == "not_found"
    assert client.get(CHAT).status_code == 405
    assert client.get("/v1/models/nobody").status_code == 404
    (listed,) = client.get("/v1/models").json()["data"]
    assert listed["id"] == "tiny" and listed["parent"] is None and listed["max_model_len"] == 256
    assert client.get("/v1/models/tiny").json() == listed
    assert client.get("/health").json() == {"status": "ok"}


def test_bodies_are_bounded(tiny_folder: Path) -> None:
    client = Client(create_app(service(tiny_folder, Limits(max_body=1000, max_length=30, max_choices=2))))
    assert client.refused(CHAT, {"messages": [{"role": "user", "content": "x" * 1000}]}, 413)
    assert "30" in client.refused(TEXT, {"prompt": [5] * 30})["message"]
    assert client.refused(TEXT, {"prompt": "a", "n": 3})["param"] == "n"
    few = Client(create_app(service(tiny_folder, Limits(max_waiting=0))))  # and 32 in the batch
    assert "at most 32" in few.refused(TEXT, {"prompt": "a", "n": 33})["message"]

    async def parts() -> Any:
        for _ in range(20):
            yield b"x" * 100

    assert client.ask("POST", CHAT, content=parts()).status_code == 413


def test_what_is_too_long_loses_its_oldest_turns_where_the_server_is_told_so(tiny_folder: Path) -> None:
    """A prompt that is cut without a word, or its system message; an answer that ends at the edge of the context."""
    client = Client(create_app(service(tiny_folder, Limits(overflow="drop_oldest"))))
    roles = ("user", "assistant")
    turns = [{"role": role, "content": f"{role} {n} " + "words " * 8} for n in range(6) for role in roles]
    messages = [{"role": "system", "content": "Be kind."}, *turns, *HI]
    assert "context length" in serving(tiny_folder).refused(CHAT, {"messages": messages, "max_tokens": 20})["message"]
    for stream in (False, True):
        reply = client.post(CHAT, messages=messages, max_tokens=20, stream=stream)
        assert reply.status_code == 200 and 1 <= int(reply.headers["X-Dropped"]) <= 6
    kept = client.post(CHAT, messages=[messages[0], *HI], max_tokens=300, logit_bias={"0": -100, "2": -100})
    assert "X-Dropped" not in kept.headers
    assert kept.json()["usage"]["completion_tokens"] == 300, "longer than the model reads"
    text = client.post(TEXT, prompt=[5] * 300, max_tokens=8)
    assert text.json()["usage"]["prompt_tokens"] == 248 and text.headers["X-Dropped"] == "52"
    alone = {"role": "user", "content": "long " * 300}
    assert client.refused(CHAT, {"messages": [alone]})["code"] == "context_length_exceeded"


def test_while_a_model_is_loaded(tiny_folder: Path) -> None:
    service = Service()
    client = Client(create_app(service))
    for path in ("/health", "/v1/models"):
        reply = client.get(path)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "loading"
    assert client.refused(CHAT, {"messages": HI}, 503)
    service.start({"tiny": tiny(tiny_folder)[0]}, tiny(tiny_folder)[1])
    assert client.get("/health").status_code == 200


def test_keys_hosts_and_origins(tiny_folder: Path) -> None:
    keys = ["a-key-of-some-length", "another-key-of-length"]

    async def page(request: Any) -> Any:
        raise ApiError(418, "tea")

    routes = [Route("/", page), Route("/private", page)]
    client = Client(create_app(service(tiny_folder), keys=keys, routes=routes, public=["/"]))
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": keys[0]}, {"Authorization": "Bearer "}):
        reply = client.get("/v1/models", headers=header)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    for key in keys:
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert client.get("/health").status_code == 200 and client.get("/private").status_code == 401
    assert client.get("/").status_code == 418 and client.get("/").json()["error"]["message"] == "tea"

    client = serving(tiny_folder)
    for name, status in (
        ("localhost:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8", 200),
        ("evil.example", 403),
        *(("", 403), ("[", 403), ("]:x", 403)),
    ):
        assert client.get("/health", headers={"Host": name}).status_code == status
    for origin, status in (("http://localhost", 200), ("http://evil.example", 403), ("null", 403), ("http://[", 403)):
        reply = client.get("/health", headers={"Origin": origin})
        assert reply.status_code == status and "access-control-allow-origin" not in reply.headers


def test_what_is_said_is_not_logged_unless_asked(tiny_folder: Path) -> None:
    lines: list[str] = []
    contents: list[str] = []
    made = service(tiny_folder, log=lines.append)
    client = Client(create_app(made))
    secret = "my \x1b[31msecret"
    client.chat(secret, max_tokens=2)
    client.ask("POST", "/v1/%1b[31m%0aserving%09evil", content=b"secret")
    assert len(lines) == 2 and "200" in lines[0] and "2 out" in lines[0]
    assert "secret" not in "".join(lines) and not {"\x1b", "\n", "\t"} & set("".join(lines))
    made.content_log = contents.append
    client.chat(secret, max_tokens=2)
    (line,) = contents
    assert json.loads(line)["request"]["messages"][0]["content"] == secret and "\x1b" not in line


def test_a_request_that_is_under_way_when_the_server_goes_down(tiny_folder: Path) -> None:
    """A traceback in the log for a client that is slow to send, and a reply that says nothing."""
    lines: list[str] = []
    app, sent = create_app(service(tiny_folder, log=lines.append)), list[Any]()

    async def never() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        task = asyncio.ensure_future(app(scope, never, send))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    asyncio.run(ask())
    assert sent[0]["status"] == 503 and b"the server is stopping" in sent[1]["body"]
    (line,) = lines
    assert f"POST {CHAT} 503" in line


def test_metrics_count(tiny_folder: Path) -> None:
    client = Client(create_app(service(tiny_folder)))
    usage = client.chat(max_tokens=3).json()["usage"]
    client.refused(CHAT, {"messages": HI, "x": 1})
    client.get("/any/path/at/all")
    text = client.get("/metrics").text
    assert f"lit_llama_prompt_tokens_total {usage['prompt_tokens']:.1f}" in text
    assert "lit_llama_generated_tokens_total 3.0" in text
    assert 'lit_llama_requests_total{path="/v1/chat",status="200"} 1.0' in text
    assert 'lit_llama_requests_total{path="/v1/chat",status="400"} 1.0' in text
    assert "/any" not in text and 'lit_llama_requests_total{path="other",status="404"} 1.0' in text
    assert "lit_llama_answers_running 0.0" in text and "lit_llama_time_to_first_token_seconds_count 1.0" in text
