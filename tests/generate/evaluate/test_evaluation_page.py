"""The page of an evaluation: its numbers, its filters, and answers that are markup."""

import re
from html.parser import HTMLParser
from pathlib import Path

from lit_llama.generate.evaluate.page import render_page
from lit_llama.generate.evaluate.run import Rows
from lit_llama.generate.evaluate.summary import summarise
from lit_llama.generate.evaluate.tasks import Item, Task
from lit_llama.text.message import instruct

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m{{ 7 * 7 }}"


class Tags(HTMLParser):
    """Tags of a page, with the classes of its rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names, self.rows, self.ids, self.links = set[str](), list[set[str]](), set[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names.add(tag)
        self.ids.add(found.get("id") or "")
        self.links += [found[key] or "" for key in ("src", "href") if key in found]
        assert not any(name.startswith("on") for name in found)
        if tag == "article":
            self.rows.append({*(found["class"] or "").split()})


def page() -> str:
    items = tuple(Item(instruct(f"q{n} {HOSTILE}", "", "right", n)) for n in range(4))
    task = Task(name=f"t{HOSTILE}", items=items, metrics=("exact_match", "stopped", "characters"))
    answers = [("wrong", "right"), ("right", HOSTILE), ("right", "right"), ("x", "y")]
    models = [
        Rows(
            f"m{place}{HOSTILE}",
            Path("m") / str(place),
            {(task.name, "answer", n): {"answer": pair[place], "stopped": True} for n, pair in enumerate(answers)},
        )
        for place in range(2)
    ]
    return render_page(summarise("name", models, [task], {}), models, [task], {})


def test_answers_cannot_act_in_the_page() -> None:
    """Script out of an answer, a question or a name; or anything that is loaded from elsewhere."""
    made = page()
    tags = Tags(made)
    assert "script" not in tags.names and "img" not in tags.names and "\x1b" not in made
    assert "&lt;script&gt;" in made and "{{ 7 * 7 }}" in made
    assert all(link.startswith("#") or link == "data:," for link in tags.links)
    assert "default-src 'none'" in made


def test_each_row_is_won_lost_or_the_same_and_a_rule_shows_it() -> None:
    """Filters that hide the wrong rows, and rows that no filter finds."""
    made = page()
    tags = Tags(made)
    rules = re.findall(r"main:has\(#([\w-]+)-pick:checked\) \.of-(\w+):not\(\.([\w-]+)\) \{ display: none; \}", made)
    assert len(rules) == 6 and all(first == second and f"{first}-pick" in tags.ids for first, _, second in rules)
    exact = rules[0][0].removesuffix("-won")
    shown = [next(kind for kind in ("won", "lost", "same") if f"{exact}-{kind}" in row) for row in tags.rows]
    assert shown == ["won", "lost", "same", "same"]
    assert all("of-t0" in row for row in tags.rows) and {task for _, task, _ in rules} == {"t0"}
