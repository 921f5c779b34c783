"""Routes of the page as programs see them."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from held_model import Held, app
from held_model import held as held  # a fixture
from held_model import store as store  # a fixture
from servers import Client, tiny

from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.serve import server as server_module
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.models import Limits
from lit_llama.generate.serve.page.routes import page_routes
from lit_llama.generate.serve.service import Service


@pytest.fixture
def client(tiny_folder: Path, store: Store) -> Client:
    llm, worker = tiny(tiny_folder)
    return Client(app({"tiny": llm}, worker, store))


def begin(client: Client, **fields: Any) -> str:
    id: str = client.post("/api/conversations", text="hi", **fields).json()["id"]
    return f"/api/conversations/{id}"


def test_files_carry_a_policy_and_hold_no_foreign_address(client: Client) -> None:
    """A page that loads from elsewhere, or whose policy lets an answer run anything."""
    page = client.get("/").text
    paths = ["/", *re.findall(r'(?:src|href)="(/[^"]*)"', page)]
    scripts = client.get("/page/page.js").text + client.get("/page/view.js").text
    paths += ["/page/" + name for name in re.findall(r'from "\./([\w.]+)"', scripts)]
    assert len(set(paths)) == 7
    for path in paths:
        reply = client.get(path)
        policy = reply.headers["content-security-policy"]
        assert reply.status_code == 200 and reply.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "require-trusted-types-for 'script'" in policy
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", reply.text)
    assert not re.search(r"@import|url\(", client.get("/page/style.css").text)
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", page)


def test_a_key_is_needed_for_all_but_the_files(tiny_folder: Path, store: Store) -> None:
    """Conversations that anybody on the network reads, or a page that cannot ask for the key."""
    llm, worker = tiny(tiny_folder)
    client = Client(app({"tiny": llm}, worker, store, keys=["k" * 20]))
    assert client.get("/").status_code == client.get("/page/page.js").status_code == 200
    for path in ("/api/info", "/api/conversations", "/api/rows", "/api/conversations/x/events"):
        assert client.get(path).status_code == 401
    headers = {"Authorization": f"Bearer {'k' * 20}"}
    assert client.get("/api/info", headers=headers).json()["models"][0]["id"] == "tiny"
    assert client.get("/api/info", headers=headers | {"Origin": "https://evil.example"}).status_code == 403


def test_answers_are_those_of_the_engine_and_kept_with_their_measures(client: Client, store: Store) -> None:
    """A page that asks in another form than generate/chat.py, or an answer that is lost with the tab that asked."""
    path = begin(client, system="Be brief", settings={"max_new_tokens": 8})
    asked = client.post(f"{path}/ask", text="Say hi", parent=1).json()
    dialogue = wait(store, path, asked["id"])
    said = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Say hi"}]
    reply = client.post("/v1/chat/completions", messages=said, temperature=0, max_tokens=8).json()
    assert dialogue.path()[-1].content == reply["choices"][0]["message"]["content"]
    node = dialogue.nodes[asked["id"]]
    assert (node.prompt_tokens, node.tokens) == (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"])
    again = client.post(f"{path}/ask", parent=asked["user"]).json()
    assert wait(store, path, again["id"]).path()[-1].id == again["id"] and len(store.get(path[19:]).leaves()) == 2


def wait(store: Store, path: str, number: int) -> Any:
    """The conversation once an answer has ended."""
    for thread in threading.enumerate():
        if thread.name == f"answer {number}":
            thread.join(60)
    dialogue = store.get(path[19:])
    assert dialogue.nodes[number].finish_reason is not None
    return dialogue


@pytest.mark.parametrize(
    ("method", "more", "body", "status", "told"),
    [
        ("POST", "/ask", {"text": " ", "parent": 0}, 400, "text: is empty"),
        ("POST", "/ask", {"text": "x", "parent": 9}, 400, "parent: is 9"),
        ("POST", "/ask", {"text": "x", "model": "other"}, 404, "model: there is no 'other'"),
        ("POST", "/ask", {"text": "x", "colour": 1}, 400, "colour: is not a field"),
        ("POST", "/ask", {"parent": 0}, 400, "no message to be answered"),
        ("POST", "/ask", {"text": "many words " * 200}, 400, "tokens, but only"),
        ("PATCH", "", {"settings": {"temperature": -1}}, 400, "temperature is -1"),
        ("PATCH", "", {"settings": {"temperature": "hot"}}, 400, "temperature is 'hot', expected 0"),
        ("PATCH", "", {"settings": {"temperature": 10**400}}, 400, "temperature is 1000"),
        ("PATCH", "", {"settings": {"seed": 10**400}}, 400, "seed is 1000"),
        ("PATCH", "", {"settings": {"colour": 1}}, 400, "no setting 'colour'"),
        ("PATCH", "", {"settings": {"model": "other"}}, 404, "there is no 'other'"),
        ("PATCH", "", {"name": "\x1b[2J"}, 400, "is none"),
        ("PATCH", "", {"head": 7}, 400, "id is 7"),
        ("PATCH", "", {"name": "new", "head": 7}, 400, "id is 7"),
        ("PATCH", "", {"name": "", "head": 0}, 400, "is none"),
        ("PATCH", "", {"system": "new", "train": {"id": 7, "train": True}}, 400, "id is 7"),
        ("PATCH", "", {"train": {"id": 7, "train": True}}, 400, "id is 7"),
        ("POST", "/answer", {"id": 1, "text": "x"}, 400, "an answer is changed by its id"),
        ("GET", "/rows", None, 400, "no answer is to be learned"),
        ("DELETE", "x", None, 404, "there is no conversation"),
        ("GET", "x/events", None, 404, "there is no conversation"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: Client, store: Store, method: str, more: str, body: Any, status: int, told: str
) -> None:
    """A fault of the server, or half of what was asked."""
    path = begin(client)
    before = list(store.get(path[19:]).records())
    reply = client.ask(method, path + more, **({} if body is None else {"json": body}))
    assert reply.status_code == status and told in reply.json()["error"]["message"], reply.text
    assert "--" not in reply.text and list(store.get(path[19:]).records()) == before


def test_answers_keep_to_the_limits_of_the_server_and_are_counted(held: Held, store: Store) -> None:
    """A page whose answers take for ever, that nobody counts, or for which there is no queue."""
    limits = Limits(max_seconds=0.05, max_waiting=1 - held.worker.engine.config.max_sequences)
    service = Service(limits)
    service.start({"held": held.llm}, held.worker, {"held": Sampling(max_new_tokens=200)})
    routes, public = page_routes(service, store)
    client = Client(create_app(service, routes=routes, public=public))
    path = begin(client)
    held.gate.clear()
    try:
        asked = client.post(f"{path}/ask", text="a").json()
        before = list(store.get(path[19:]).records())
        refused = client.post(f"{path}/ask", text="b")
        assert refused.status_code == 429 and list(store.get(path[19:]).records()) == before
        assert service.answers == 1 and server_module._stopped(service, False).startswith("stopped; 1 answer of the ")
        for thread in threading.enumerate():  # that of the limit
            if isinstance(thread, threading.Timer) and thread.ident is not None:
                thread.join(60)
    finally:
        held.gate.set()
    node = wait(store, path, asked["id"]).nodes[asked["id"]]
    assert node.finish_reason == "abort" and node.tokens < 200
    assert service.answers == 0 and server_module._stopped(service, False) == "stopped; all that was asked is answered"
    counts = service.metrics.text().decode()
    assert f"lit_llama_prompt_tokens_total {float(node.prompt_tokens)}" in counts
    assert f"lit_llama_generated_tokens_total {float(node.tokens)}" in counts
    assert "lit_llama_request_seconds_count 1.0" in counts


def test_files_and_rows_come_back_as_they_were(client: Client, store: Store) -> None:
    """An export that lacks branches or marks."""
    path = begin(client, system="Be brief")
    asked = client.post(f"{path}/ask", text="Say hi", parent=1).json()
    wait(store, path, asked["id"])
    client.post(f"{path}/answer", id=asked["id"], text="Hi.")
    messages = json.loads(client.get(f"{path}/rows").text)["messages"]
    assert [m["content"] for m in messages] == ["Be brief", "Say hi", "Hi."]
    assert client.get("/api/rows").text == client.get(f"{path}/rows").text
    saved = client.get(f"{path}/file").text
    (id,) = client.post("/api/load", name="saved.jsonl", text=saved).json()["ids"]
    one, two = store.get(path[19:]), store.get(id)
    assert (one.nodes, one.heads) == (two.nodes, two.heads) and two.name == f"{one.name} 2"
    assert "line 1" in client.post("/api/load", name="x", text='{"messages": 1}').json()["error"]["message"]
    client.ask("DELETE", path)
    client.ask("PATCH", f"/api/conversations/{id}", json={"name": "one", "system": "two", "settings": {"top_k": 5}})
    two = store.get(id)
    assert (two.name, two.path()[-1].content, two.settings["top_k"], len(two.path())) == ("one", "two", 5, 1)
    assert [c["id"] for c in client.get("/api/conversations").json()["conversations"]] == [id]


def test_what_a_file_holds_and_nobody_reads_is_refused_later_by_name(client: Client, store: Store) -> None:
    """A fault of the server by what was loaded: text without an encoding, settings of any kind."""
    turns = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "\udfff"}]
    (id,) = client.post("/api/load", name="x", text=json.dumps({"messages": turns})).json()["ids"]
    assert client.get("/api/rows").json() == {"messages": turns}
    settings = [{"type": "set", "name": name, "value": ["a"]} for name in ("model", "temperature")]
    dialogue = [{"type": "dialogue", "format": 1, "id": "x", "name": "n", "time": 10}, *settings]
    text = "\n".join(map(json.dumps, dialogue))
    (id,) = client.post("/api/load", name="x", text=text).json()["ids"]
    reply = client.post(f"/api/conversations/{id}/ask", text="a")
    assert reply.status_code == 400 and "temperature is ['a']" in reply.json()["error"]["message"]
    reply = client.post("/api/load", name="x", text=text.replace("10", "1" + "0" * 400))
    assert reply.status_code == 400 and "line 1 time is 1000" in reply.json()["error"]["message"]
