"""A teacher that answers by a function, in an order of its own."""

import random
from collections.abc import Callable

from lit_llama.generate.rows.teacher import Ask, Key, Reply


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
