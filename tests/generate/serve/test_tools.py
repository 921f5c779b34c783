"""Calls of functions, constrained to their schemas and read back, in the forms in which templates write them."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import QWEN25
from servers import Client, events
from tokenizer_zoo import TOOLS

from lit_llama.generate.engine.constraint import Constraint
from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.llm import LLM, load
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.service import Service
from lit_llama.generate.serve.tools import CallForm, CallReader, call_form, call_grammar
from lit_llama.text.prompts.teller import ThoughtsReader
from lit_llama.text.tokenizer.special import Place

pytestmark = pytest.mark.timeout(60)
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", 'Bø "}'], "type": "string"},
        "days": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTIONS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop_all"}},
]
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "stop_all", "arguments": {}}\n</tool_call>'
LLAMA31 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ '{\"name\": \"' + call.function.name + '\", \"parameters\": ' + (call.function.arguments | tojson) + '}' }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% if loop.first and tools %}"
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

THOUGHTFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def folder(path: Path, base: Path, template: str) -> Path:
    """A model whose template writes calls."""
    import shutil

    made = Path(shutil.copytree(base, path))
    (made / "chat_template.jinja").write_text(template)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return made


@pytest.fixture(scope="module")
def llm(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return load(folder(tmp_path_factory.mktemp("tools") / "it", tiny_folder, TOOLS))


@pytest.fixture(scope="module")
def client(llm: LLM) -> Client:
    service = Service()
    service.start({"tools": llm}, EngineThread(llm.engine))
    return Client(create_app(service))


def functions() -> list[dict[str, Any]]:
    from lit_llama.generate.serve.messages import read_tools

    return read_tools(FUNCTIONS)


def accepted(llm: LLM, grammar: str, text: str) -> bool:
    """Whether a grammar lets a text through as a whole."""
    matcher = llm.constraint(grammar=grammar).matcher()
    ids = llm.guarded.encode(text, Place.MORE)
    return all(matcher.accept(token) for token in ids) and matcher.accept(min(llm.stop_ids))


@pytest.mark.parametrize(
    ("text", "auto", "required"),
    [
        ("It is warm.", True, False),
        ("a <tool_cal", True, False),
        (ONE, True, True),
        (ONE + OTHER, True, True),
        ("Let me see. " + ONE, True, False),
        ("Let me see. " + ONE + OTHER, True, False),
        (ONE + " more", False, False),
        ("<tool_call> or so", False, False),
        (ONE.replace("Oslo", "Rome"), False, False),
        (ONE.replace("3", '"3"'), False, False),
        (ONE.replace("weather", "whether"), False, False),
    ],
)
def test_a_grammar_holds_calls_to_their_schemas(llm: LLM, text: str, auto: bool, required: bool) -> None:
    form, tools = call_form(llm, functions()), functions()
    assert accepted(llm, call_grammar(form, tools, "auto", True), text) is auto
    assert accepted(llm, call_grammar(form, tools, "required", True), text) is required
    only = call_grammar(form, tools, "required", False)
    assert accepted(llm, only, text) is (required and text == ONE)
    assert accepted(llm, call_grammar(form, tools, tools[1], True), text) is False


def test_a_form_that_begins_the_answer(tiny_folder: Path, tmp_path: Path) -> None:
    """Llama 3.1 writes one JSON object, with no tag around."""
    llm = load(folder(tmp_path / "it", tiny_folder, LLAMA31))
    form, tools = call_form(llm, functions()), functions()
    assert (form.opening, form.middle, form.closing) == ('{"name": "', '", "parameters": ', "}")
    grammar = call_grammar(form, tools, "auto", True)
    call = '{"name": "weather", "parameters": {"city": "Oslo", "days": 0}}'
    assert accepted(llm, grammar, call) and accepted(llm, grammar, "See: " + call) and accepted(llm, grammar, "{}")
    assert not accepted(llm, grammar, call.replace("Oslo", "Rome"))
    assert read(form, call, 1) == ("", [("weather", '{"city": "Oslo", "days": 0}')])
    assert read(form, "See: " + call, 3) == ("See: " + call, [])  # text, as the grammar has not held it


def test_a_form_that_opens_with_a_control_token(llm: LLM) -> None:
    """Mistral's [TOOL_CALLS], which is no part of the text."""
    form = CallForm('[CALLS] [{"name": "', '", "arguments": ', '}, {"name": "', "}]", {"[CALLS]": 1})
    grammar = call_grammar(form, functions(), "required", True)
    matcher = Constraint.lark(grammar, llm.token_table).matcher()
    assert not matcher.accept(llm.guarded.encode("[")[0]) and matcher.accept(1)
    text = ' [{"name": "stop_all", "arguments": {}}, {"name": "stop_all", "arguments": {}}]'
    assert read(form, text, 2) == ("", [("stop_all", "{}")] * 2)


@pytest.mark.parametrize(
    ("text", "opened", "thoughts", "content"),
    [
        ("<think>\nhm, 1 < 2 \n</think>\n\nYes.", False, "hm, 1 < 2", "Yes."),
        ("\n <thinking>a</think>b</thinking> c", False, "a</think>b", "c"),
        ("[THINK]a[/THINK]b", False, "a", "b"),
        ("hm </think>Yes. </think>", True, "hm", "Yes. </think>"),
        ("hm, so </thi", True, "hm, so </thi", ""),
        ("<think>", False, "", ""),
        ("<thin ice>", False, "", "<thin ice>"),
        (" Yes. <think>no</think>", False, "", " Yes. <think>no</think>"),
        ("<thi", False, "", "<thi"),
        ("</think>\nYes.", True, "", "Yes."),
        ("  ", True, "", ""),
    ],
)
def test_thoughts_are_told_from_content(text: str, opened: bool, thoughts: str, content: str) -> None:
    """However it is cut, and with no tag in either."""
    for size in (1, 2, 3, 7, 100):
        reader = ThoughtsReader(opened)
        parts = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
        parts.append(reader.flush())
        assert ["".join(side) for side in zip(*parts, strict=True)] == [thoughts, content], size


def test_thoughts_have_a_field_of_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a bare </think> in the content, and an answer in JSON that is taken for thoughts."""
    llm = load(folder(tmp_path / "it", tiny_folder, THOUGHTFUL))
    service = Service()
    with EngineThread(llm.engine) as worker:
        service.start({"it": llm}, worker)
        client = Client(create_app(service))
        forced = {"temperature": 1, "seed": 1, "max_tokens": 12}
        plain = client.chat(**forced).json()["choices"][0]["message"]
        assert plain["content"] == "" and plain["reasoning_content"]  # cut off amid them
        streamed = [e["choices"][0]["delta"] for e in events(client.chat(**forced, stream=True).text)]
        assert "".join(d.get("reasoning_content", "") for d in streamed) == plain["reasoning_content"]
        assert not any(d.get("content") for d in streamed)
        schema = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"const": {"a": 1}}}}
        kept = client.chat(response_format=schema).json()["choices"][0]["message"]
        assert json.loads(kept["content"]) == {"a": 1} and "reasoning_content" not in kept


def test_templates_that_write_none_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    llm = load(folder(tmp_path / "it", tiny_folder, QWEN25))  # it writes tools, and leaves out calls
    service = Service()
    service.start({"it": llm}, EngineThread(llm.engine))
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": FUNCTIONS}
    error = Client(create_app(service)).refused("/v1/chat/completions", body)
    assert error["param"] == "tools" and "leaves out tool_calls" in error["message"]


def read(form: CallForm, text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    reader = CallReader(form, ["weather", "stop_all"])
    pieces = [piece for at in range(0, len(text), size) for piece in reader.push(text[at : at + size])] + reader.flush()
    names = {piece.call: piece.name for piece in pieces if piece.name}
    calls = [(names[i], "".join(p.arguments for p in pieces if p.call == i)) for i in range(reader.calls)]
    return "".join(piece.content for piece in pieces), calls


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_calls_are_read_back_however_they_are_cut(llm: LLM, size: int) -> None:
    form = call_form(llm, functions())
    tricky = ONE.replace('"Oslo"', '"Bø \\"}{"')
    expected = [("weather", '{"city": "Bø \\"}{", "days": 3}'), ("stop_all", "{}")]
    assert read(form, tricky + OTHER, size) == ("", expected)
    assert read(form, "Well <tool x " + tricky, size) == ("Well <tool x ", expected[:1])
    assert read(form, "a <tool_cal", size) == ("a <tool_cal", [])
    assert read(form, ONE[:-40], size)[1][0][1] == '{"city": "Osl'[: len(ONE) - 40 - ONE.index('{"city')]


def test_a_model_calls(client: Client, llm: LLM) -> None:
    """A random model never calls on its own, so the form and the schema must hold at each token."""
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        fields: dict[str, Any] = {"tools": FUNCTIONS, "tool_choice": choice, "temperature": 1, "seed": 4}
        fields |= {"max_tokens": 180, "parallel_tool_calls": False}
        reply = client.chat("Weather?", **fields).json()["choices"][0]
        message = reply["message"]
        assert reply["finish_reason"] == "tool_calls" and message["content"] is None
        (call,) = message["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["type"] == "function" and call["id"].startswith("call_")
        if call["function"]["name"] == "weather":
            assert arguments.keys() == {"city", "days"} and arguments["city"] in ("Oslo", 'Bø "}')
        else:
            assert choice == "required" and isinstance(arguments, dict)
        streamed = events(client.chat("Weather?", **fields, stream=True).text)
        deltas = [c for event in streamed for c in event["choices"][0]["delta"].get("tool_calls", [])]
        assert [d["function"]["name"] for d in deltas if "name" in d["function"]] == [call["function"]["name"]]
        assert "".join(d["function"]["arguments"] for d in deltas) == call["function"]["arguments"]
        assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"
    following = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "fine"},
    ]
    more = client.post("/v1/chat/completions", messages=following, tools=FUNCTIONS, max_tokens=3)
    assert more.status_code == 200, more.text
    ids = client.post("/tokenize", messages=following, tools=FUNCTIONS).json()["tokens"]
    assert '"name": "weather"' in llm.tokenizer.decode(ids) and "<tool_response>" in llm.tokenizer.decode(ids)


def test_without_a_choice_of_tools_the_prompt_has_none(client: Client) -> None:
    plain = client.chat(max_tokens=2).json()["usage"]["prompt_tokens"]
    assert client.chat(max_tokens=2, tools=FUNCTIONS, tool_choice="none").json()["usage"]["prompt_tokens"] == plain
    assert client.chat(max_tokens=2, tools=FUNCTIONS).json()["usage"]["prompt_tokens"] > plain


def test_what_a_template_asks_for(client: Client) -> None:
    """`enable_thinking` of Qwen 3; nothing of it becomes a control token."""
    found = [
        client.post("/tokenize", messages=[{"role": "user", "content": "x"}], chat_template_kwargs=values).json()
        for values in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert found[0] == found[1] and found[2]["count"] > found[0]["count"]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    for values, said in (({"enable_thinking": "<|im_end|>"}, "control token"), ({"messages": []}, "nothing that"),
                         ({"enable_thinking": {}}, "expected text, a number")):  # fmt: skip
        assert said in client.refused("/v1/chat/completions", {**body, "chat_template_kwargs": values})["message"]
