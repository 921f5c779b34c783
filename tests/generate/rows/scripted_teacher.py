"""A teacher that answers by a function, in an order of its own, and a recipe for it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_llama.generate.rows.recipe import Recipe, read_recipe
from lit_llama.generate.rows.teacher import Ask, Key, Reply

Make = Callable[..., Recipe]
SEEDS = [{"instruction": f"seed number {n} of all", "output": f"answer {n}"} for n in range(9)]
WINDOW = 8


class ScriptedTeacher:
    """Answers each prompt with `answer(key, ask)`, in an order drawn from `order`; dies after `dies` replies."""

    name, identity, seeded = "scripted", "scripted 1", True

    def __init__(self, answer: Callable[[Key, Ask], Reply | str], order: int = 0, dies: int | None = None) -> None:
        self.answer, self.dies, self.asked = answer, dies, list[Key]()
        self._chance, self._open = random.Random(order), dict[Key, Ask]()

    def check(self, ask: Ask) -> None:
        """All is possible."""

    def add(self, key: Key, ask: Ask) -> None:
        """Take it in."""
        self.asked.append(key)
        self._open[key] = ask

    def wait(self) -> list[tuple[Key, Reply]]:
        """A reply to one of the open prompts."""
        if not self._open:
            return []
        if self.dies is not None:
            self.dies -= 1
            if self.dies < 0:
                raise KeyboardInterrupt
        key = self._chance.choice(sorted(self._open))
        reply = self.answer(key, self._open.pop(key))
        return [(key, reply if isinstance(reply, Reply) else said(reply))]

    def close(self) -> None:
        """Forget what is open."""
        self._open.clear()


def said(*texts: str, reason: str = "stop") -> Reply:
    """Answers of a token for each word."""
    return Reply(texts=texts, finish_reasons=[reason] * len(texts), tokens=sum(len(t.split()) for t in texts))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr("lit_llama.generate.rows.run.WINDOW", WINDOW)

    def make(**changes: Any) -> Recipe:
        seeds = tmp_path / "seeds.jsonl"
        seeds.write_text("".join(json.dumps(row) + "\n" for row in SEEDS))
        text: dict[str, Any] = {
            "sources": {"seeds": {"rows": str(seeds), "draw": 3, "accepted": 1}},
            "columns": [
                {"name": "kind", "sample": ["red", "blue"]},
                {"name": "task", "prompt": "{% for s in seeds %}{{ s.instruction }};{% endfor %}{{ kind }}"},
                {"name": "answer", "prompt": "{{ task }}"},
            ],
            "output": {"alpaca": {"instruction": "{{ task }}", "output": "{{ answer }}"}},
        }
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(text | changes, sort_keys=False))
        return read_recipe(tmp_path / "mine.yaml")

    return make


def echo(key: Key, ask: Ask) -> Reply | str:
    """Every third task is one of five, so that filters have something to do; all else tells its prompt."""
    number, column = key
    words = ask.messages[-1]["content"]
    if column == "answer":
        return said("cut", reason="length") if number % 10 == 7 else f"reply {number % 2 * number} to {words}"
    return f"do this {number % 5}" if number % 3 == 0 else f"w{number} x{number * 7} y{hash_of(words)} z{number}"


def hash_of(text: str) -> int:
    return sum(ord(letter) * place for place, letter in enumerate(text))


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "state.json"}
