"""The page in Chromium, on a model whose steps wait for a sign."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser, Tab, chromium
from held_model import Held, app
from held_model import held as held  # a fixture
from held_model import store as store  # a fixture
from servers import listening

from lit_llama.generate.chat.store import Store

HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>\n\n"
    "[one](javascript:window.hit=3) [two](JAVASCRIPT:window.hit=4) [three](data:text/html,<script>hit=5</script>)"
    " [four](https://example.org/?a=1&b=2 \"onmouseover=window.hit=6\") ![p](https://example.org/pixel.png)\n\n"
    "| <svg onload=window.hit=7> | b |\n|---|---|\n| `<i>` | \x1b[31mred\x1b]0;t\x07 \u202eevil |\n\n"
    "```html\n</code></pre><script>window.hit = 8</script>\n```\n\n"
    f"{'x' * 50_000}\n\n{'*_`[' * 20_000}\n\n{'> ' * 3000}deep\n\n{'- ' * 300}deep\n"
)  # fmt: skip


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
