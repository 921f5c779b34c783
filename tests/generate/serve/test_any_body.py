"""Any body is answered, or refused as OpenAI's API refuses: generated requests, right, almost right and absurd."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import Client, events
from test_tools import FUNCTIONS, folder
from tokenizer_zoo import TOOLS

from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.llm import load
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.page.routes import page_routes
from lit_llama.generate.serve.service import Service

pytestmark = pytest.mark.timeout(120)

_TEXTS = st.one_of(
    st.text(st.characters(), max_size=20),  # lone surrogates among them
    st.sampled_from(["", "hi", "<|im_end|>", "<|im_start|>system\n", "\x1b[31m", "\0", "é" * 9, "(a+)+$", "\ud800"]),
)
_NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([0.0, 0.5, 1.0, -0.0, 1e308, 1e-308, 2**31, 2**63, 2**64, -(2**63), 10**30, 1.5]),
)
_ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXTS, inner, max_size=4)),
    max_leaves=8,
)


def _mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 24).flatmap(lambda draw: _ANY if draw == 0 else right)


def _object(*needed: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """An object that has the fields that are needed, and a few of the others."""
    right = {name: _mostly(value) for name, value in fields.items()}
    others = st.lists(st.sampled_from(sorted(set(fields) - {*needed}) or [""]), max_size=4, unique=True)
    return others.flatmap(
        lambda names: st.fixed_dictionaries({name: right[name] for name in fields if name in (*needed, *names)})
    )


_CALL = _object(
    "function",
    id=_TEXTS,
    type=st.just("function"),
    function=_object(
        "name",
        "arguments",
        name=st.sampled_from(["weather", "no name", "f"]),
        arguments=st.sampled_from(["{}", "[", '{"a":1}']),
    ),
)
_MESSAGE = _object(
    "role",
    "content",
    role=st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
    content=st.one_of(_TEXTS, st.lists(_object("type", type=st.just("text"), text=_TEXTS), max_size=2)),
    tool_calls=st.lists(_CALL, max_size=2),
    tool_call_id=_TEXTS,
    name=_TEXTS,
    reasoning_content=_TEXTS,
)
_TALK = st.tuples(st.lists(_MESSAGE, max_size=2), st.just({"role": "user", "content": "hi"})).map(
    lambda parts: [*parts[0], parts[1]]
)
_SCHEMA = st.recursive(
    st.one_of(
        _object(
            type=st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array", "thing"]),
            enum=st.lists(_ANY, max_size=3),
            const=_ANY,
            pattern=st.sampled_from(["^a$", "(a+)+$", "[", "(?=a)b", "\\1", "a{1000000}", ".*" * 20]),
            minLength=_NUMBERS,
            maxLength=_NUMBERS,
            minimum=_NUMBERS,
            multipleOf=_NUMBERS,
            format=st.sampled_from(["date", "email", "none"]),
        ),
        st.sampled_from([{"$ref": "#"}, {"$ref": "http://localhost/x"}, True, False]),
    ),
    lambda inner: _object(
        properties=st.dictionaries(_TEXTS, inner, max_size=2),
        required=st.lists(_TEXTS, max_size=2),
        items=inner,
        anyOf=st.lists(inner, max_size=2),
        allOf=st.lists(inner, max_size=2),
        additionalProperties=inner,
        minItems=_NUMBERS,
    ),
    max_leaves=4,
)
_SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"), st.floats(0, 1)),
    "repetition_penalty": st.floats(0.5, 2),
    "top_k": st.integers(-1, 20),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(0, 8),
    "seed": st.integers(0, 1 << 62),
    "stop": st.one_of(_TEXTS, st.lists(_TEXTS, max_size=3)),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.integers(-100, 100), max_size=3),
    "stream": st.booleans(),
    "stream_options": _object(include_usage=st.booleans()),
    "model": st.just("it"),
    "user": _TEXTS,
}
_BODIES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "/v1/chat/completions": _object(
        "messages",
        **_SAMPLING,
        messages=_TALK,
        max_completion_tokens=st.integers(1, 8),
        logprobs=st.booleans(),
        top_logprobs=st.integers(0, 3),
        response_format=_object(
            "type",
            "json_schema",
            type=st.sampled_from(["text", "json_object", "json_schema"]),
            json_schema=_object("schema", name=_TEXTS, schema=_SCHEMA),
        ),
        tools=st.one_of(
            st.just(FUNCTIONS),
            st.lists(
                _object(
                    "type",
                    "function",
                    type=st.just("function"),
                    function=_object("name", name=st.just("f"), parameters=_SCHEMA),
                ),
                min_size=1,
                max_size=2,
            ),
        ),
        tool_choice=st.sampled_from(
            ["none", "auto", "required", {"type": "function", "function": {"name": "weather"}}]
        ),
        parallel_tool_calls=st.booleans(),
        chat_template_kwargs=st.dictionaries(
            st.sampled_from(["enable_thinking", "messages", "tools"]), _ANY, max_size=2
        ),
    ),
    "/v1/completions": _object(
        "prompt",
        **_SAMPLING,
        prompt=st.one_of(_TEXTS, st.lists(_TEXTS, max_size=3), st.lists(st.integers(0, 383), max_size=5)),
        logprobs=st.integers(0, 3),
        echo=st.booleans(),
        best_of=st.integers(1, 2),
        suffix=_TEXTS,
    ),
    "/tokenize": _object(
        prompt=_TEXTS,
        messages=_TALK,
        add_special_tokens=st.booleans(),
        return_token_strs=st.booleans(),
        model=st.just("it"),
    ),
    "/detokenize": _object("tokens", tokens=st.lists(st.integers(-1, 400), max_size=9)),
    "/api/conversations": _object(
        text=_TEXTS,
        system=_TEXTS,
        settings=_object(
            temperature=_NUMBERS, top_k=_NUMBERS, seed=_NUMBERS, stop=_TEXTS, model=_TEXTS, max_new_tokens=_NUMBERS
        ),
    ),
    "/api/load": _object(
        "text", name=_TEXTS, text=st.one_of(_TEXTS, _object("messages", messages=_TALK).map(json.dumps))
    ),
}


@pytest.fixture(scope="module")
def client(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    llm, service = load(folder(tmp_path_factory.mktemp("any") / "it", tiny_folder, TOOLS)), Service()
    routes, public = page_routes(service, Store(None))
    with EngineThread(llm.engine) as worker:
        service.start({"it": llm}, worker)
        yield Client(create_app(service, routes=routes, public=public))
        llm.engine.check()
        assert service.answers == 0 and llm.engine.statistics().running == 0


def _check(client: Client, path: str, content: bytes) -> None:
    reply = client.ask("POST", path, content=content)
    kind = reply.headers["content-type"]
    if reply.status_code == 200:
        assert events(reply.text) is not None if kind.startswith("text/event-stream") else reply.json() is not None
    else:
        assert 400 <= reply.status_code < 500, (reply.status_code, reply.text)
        error = reply.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]


@pytest.mark.parametrize("path", _BODIES)
def test_a_body_of_the_right_fields(client: Client, path: str) -> None:
    """Catches 500, a reply that is no JSON, a request that is never answered, and blocks that are left behind."""

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(_BODIES[path])
    def check(body: dict[str, Any]) -> None:
        _check(client, path, json.dumps(body).encode())

    check()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.sampled_from(list(_BODIES)), st.one_of(st.binary(max_size=50), _ANY.map(lambda any: json.dumps(any).encode()))
)
def test_a_body_of_anything(client: Client, path: str, content: bytes) -> None:
    _check(client, path, content)
