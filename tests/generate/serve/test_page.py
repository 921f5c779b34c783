"""The page: its routes as programs see them, and itself in Chromium, on a model whose steps wait for a sign."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Tab, chromium
from servers import Client, listening, tiny

from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.llm import LLM, make_llm, open_folder
from lit_llama.generate.serve import server as server_module
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.models import Limits
from lit_llama.generate.serve.page.routes import page_routes
from lit_llama.generate.serve.service import Service
from lit_llama.model.checkpoint import load_model

HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>\n\n"
    "[one](javascript:window.hit=3) [two](JAVASCRIPT:window.hit=4) [three](data:text/html,<script>hit=5</script>)"
    " [four](https://example.org/?a=1&b=2 \"onmouseover=window.hit=6\") ![p](https://example.org/pixel.png)\n\n"
    "| <svg onload=window.hit=7> | b |\n|---|---|\n| `<i>` | \x1b[31mred\x1b]0;t\x07 \u202eevil |\n\n"
    "```html\n</code></pre><script>window.hit = 8</script>\n```\n\n"
    f"{'x' * 50_000}\n\n{'*_`[' * 20_000}\n\n{'> ' * 3000}deep\n\n{'- ' * 300}deep\n"
)  # fmt: skip


class Held:
    """A model whose steps can be held."""

    def __init__(self, folder: Path) -> None:
        self.gate = threading.Event()
        self.gate.set()
        opened = open_folder(folder)
        self.llm: LLM = make_llm(load_model(folder), opened.tokenizer, opened.style, opened.ends)
        runner = self.llm.engine.runner
        compute = runner.logits

        def logits(batch: Any) -> Any:
            self.gate.wait(60)
            return compute(batch)

        runner.logits = logits  # type: ignore[method-assign]
        self.worker = EngineThread(self.llm.engine)


@pytest.fixture(scope="module")
def held(tiny_folder: Path) -> Iterator[Held]:
    made = Held(tiny_folder)
    yield made
    made.gate.set()
    made.worker.close()


def app(llms: dict[str, LLM], worker: EngineThread, store: Store, **more: Any) -> Any:
    service = Service()
    defaults = dict.fromkeys(llms, Sampling(max_new_tokens=40))
    service.start(llms, worker, defaults)
    routes, public = page_routes(service, store)
    return create_app(service, routes=routes, public=public, **more)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def client(tiny_folder: Path, store: Store) -> Client:
    llm, worker = tiny(tiny_folder)
    return Client(app({"tiny": llm}, worker, store))


def begin(client: Client, **fields: Any) -> str:
    id: str = client.post("/api/conversations", text="hi", **fields).json()["id"]
    return f"/api/conversations/{id}"


# ---- the routes


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
        ("PATCH", "", {"settings": {"temperature": "hot"}}, 400, "temperature is hot"),
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


# ---- in Chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@contextlib.contextmanager
def page(browser: Browser, held: Held, store: Store, **more: Any) -> Iterator[tuple[Tab, str]]:
    with listening(app({"base": held.llm, "tuned": held.llm}, held.worker, store)) as address:
        tab = browser.tab(address, **more)
        tab.until("document.querySelectorAll('#model option').length === 2")
        try:
            yield tab, address
            assert tab.complaints() == [] and tab.asked() == {address.split("/")[2]}
        finally:
            held.gate.set()
            tab.close()


def write(tab: Tab, text: str) -> None:
    tab.run("document.getElementById('text').focus()")
    tab.type(text)
    tab.key("Enter", 13)


IDLE = "document.getElementById('stop').hidden && document.querySelector('.message.assistant:last-child')"
LIVE = "document.querySelector('.message.live')"
LAST = "[...document.querySelectorAll('.message.assistant .body')].at(-1).innerText"


def press(tab: Tab, label: str, which: int = -1) -> None:
    tab.run(f"[...document.querySelectorAll('[aria-label=\"{label}\"]')].at({which}).click()")


def test_sending_editing_retrying_and_branches(browser: Browser, held: Held, store: Store) -> None:
    """A page on which what was said before an edit is gone, or that shows another branch than the server keeps."""
    with page(browser, held, store) as (tab, _):
        write(tab, "Say hi")
        tab.until(IDLE)
        (summary,) = store.list()
        assert store.get(summary.id).path()[0].content == "Say hi" and summary.name == "Say hi"
        press(tab, "Edit", 0)
        tab.until("document.getElementById('ask').open")
        tab.run("document.getElementById('ask-text').select()")
        tab.type("Say ho")
        tab.run("document.getElementById('ask-ok').click()")
        tab.until("document.querySelector('.user .plain')?.innerText === 'Say ho' && " + IDLE)
        assert store.get(summary.id).path()[0].content == "Say ho"
        press(tab, "Version before", 0)
        tab.until("document.querySelector('.user .plain').innerText === 'Say hi'")
        press(tab, "Answer again")
        tab.until("document.querySelectorAll('.branches')[1].innerText.includes('2 / 2') && " + IDLE)
        dialogue = store.get(summary.id)
        assert len(dialogue.leaves()) == 3 and dialogue.path()[0].content == "Say hi"
        assert "tokens/s" in tab.run("document.body.innerText") and "context" in tab.run("document.body.innerText")


def test_a_reload_and_a_second_tab_see_an_answer_go_on(browser: Browser, held: Held, store: Store) -> None:
    """An answer that ends with the connection of the tab that asked, or tabs that show different things."""
    with page(browser, held, store) as (tab, address):
        held.gate.clear()
        write(tab, "Say hi")
        tab.until(LIVE)
        (summary,) = store.list()
        tab.call("Page.reload")
        tab.until(LIVE)
        other = browser.tab(f"{address}/#{summary.id}")
        other.until(LIVE)
        held.gate.set()
        tab.until(IDLE)
        other.until(IDLE)
        assert store.get(summary.id).path()[-1].finish_reason == "length"
        assert tab.run(LAST) == other.run(LAST)
        write(other, "And now?")
        tab.until("document.querySelectorAll('.message').length === 4 && " + IDLE)
        other.close()


def test_an_answer_is_stopped_and_kept(browser: Browser, held: Held, store: Store) -> None:
    """A button that stops the display and not the model."""
    with page(browser, held, store) as (tab, _):
        held.gate.clear()
        write(tab, "Say hi")
        tab.until(LIVE)
        tab.key("Escape", 27)
        tab.until("document.activeElement")
        held.gate.set()
        tab.until(IDLE)
        (summary,) = store.list()
        node = store.get(summary.id).path()[-1]
        assert node.finish_reason == "abort" and node.tokens < 40
        assert "stopped" in tab.run("document.querySelector('.assistant .meta').innerText")
        assert held.llm.engine.statistics().running == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_two_models_answer_side_by_side(browser: Browser, held: Held, store: Store, width: int) -> None:
    """Sides that get other prompts or seeds: here both are one model, so that the answers have to be equal. On a phone,
    sides that are found by scrolling sideways only."""
    with page(browser, held, store, width=width) as (tab, _):
        tab.run("document.getElementById('compare').click()")
        tab.until("document.querySelectorAll('.pane:not([hidden])').length === 2")
        for turn in (1, 2):
            write(tab, f"Question {turn}")
            tab.until(f"document.querySelectorAll('.message').length === {4 * turn} && {IDLE}")
        boxes = tab.run("[...document.querySelectorAll('.pane')].map(p => p.getBoundingClientRect().toJSON())")
        assert all(box["left"] >= 0 and box["right"] <= width and box["height"] > 150 for box in boxes), boxes
        assert boxes[0]["bottom"] <= boxes[1]["top"] if width == 390 else boxes[0]["right"] <= boxes[1]["left"]
        (summary,) = store.list()
        dialogue = store.get(summary.id)
        left, right = dialogue.path(side=0), dialogue.path(side=1)
        assert [node.content for node in left] == [node.content for node in right] and len(left) == 4
        assert [node.model for node in left] == ["", "base", "", "base"]
        assert [node.model for node in right] == ["", "tuned", "", "tuned"]
        assert left[0].id == right[0].id and left[2].id != right[2].id


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_hostile_answer_runs_nothing_and_fits(
    browser: Browser, held: Held, store: Store, width: int, dark: bool
) -> None:
    """Script of an answer that runs, an address that is followed, or a line that makes the page scroll sideways."""
    id = store.create("hostile <b>name</b>")
    store.write(id, {"type": "message", "id": 1, "parent": 0, "role": "user", "content": HOSTILE})
    store.write(id, {"type": "message", "id": 2, "parent": 1, "role": "assistant", "content": HOSTILE})
    with page(browser, held, store, width=width, dark=dark) as (tab, _):
        tab.run(f"location.hash = '{id}'")
        tab.until("document.querySelector('.assistant .code')")
        tab.run("document.querySelectorAll('.message *').forEach(e => e.dispatchEvent(new Event('mouseover')))")
        assert tab.run("window.hit") is None
        addresses = tab.run("[...document.querySelectorAll('.message a')].map(a => a.href)")
        assert sorted(addresses) == ["https://example.org/?a=1&b=2", "https://example.org/pixel.png"]
        inside = (
            "document.querySelectorAll('.message script, .message img, .message svg, .message iframe, [onmouseover]')"
        )
        assert tab.run(f"{inside}.length") == 0
        shown = tab.run("document.querySelector('.assistant').innerText")
        assert "<script>window.hit = 1</script>" in shown and "⟨U+001B⟩" in shown and "\x1b" not in shown
        assert "\u202e" not in shown and tab.run("document.getElementById('name').innerText") == "hostile <b>name</b>"
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.run("(list => list.scrollWidth <= list.clientWidth)(document.querySelector('.list'))")
        ground = tab.run("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 60) is dark


def test_every_control_has_a_name_and_is_reached_by_keys(browser: Browser, held: Held, store: Store) -> None:
    """Buttons that a screen reader calls "button", and dialogs that keep the focus."""
    with page(browser, held, store, width=390) as (tab, _):
        write(tab, "Say hi")
        tab.until(IDLE)
        nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
        roles = ("button", "textbox", "combobox", "checkbox", "searchbox", "menuitem", "log", "link", "dialog")
        named = [(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n.get("ignored")]
        assert all(name for role, name in named if role in roles)
        assert {"log", "button", "textbox", "combobox", "checkbox", "main"} <= {role for role, _ in named}
        tab.run("document.getElementById('settings-open').click()")
        tab.until("document.getElementById('settings').open && document.activeElement.id === 'set-system'")
        tab.key("Escape", 27)
        tab.until("!document.getElementById('settings').open")
        tab.run("document.getElementById('open-side').click()")
        tab.until("document.activeElement.id === 'filter'")
        tab.key("Escape", 27)
        tab.until("document.activeElement.id === 'open-side'")
