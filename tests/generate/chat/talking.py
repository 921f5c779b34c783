"""A conversation with a model, kept in memory, and a model that notes what it is asked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_llama.generate.chat.session import Answer, add_system, check_system
from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.llm import LLM


@dataclass(frozen=True)
class Recorder(LLM):
    """Notes what is asked at each turn."""

    run: list[list[int]] = field(default_factory=list)

    def request(self, prompt: Sequence[int], sampling: Sampling, **more: Any) -> Request:
        self.run.append(list(prompt))
        return super().request(prompt, sampling, **more)


def recorder(llm: LLM, **changes: Any) -> Recorder:
    fields = {name: getattr(llm, name) for name in LLM.__dataclass_fields__}
    return Recorder(**(fields | {"run": []} | changes))


class Conversation:
    """Messages of a branch, as `messages`, and the last answer."""

    def __init__(self, llm: LLM, sampling: Sampling, system: str = "") -> None:
        self.llm, self.sampling = llm, sampling
        self.store = Store(None)
        self.id = self.store.create("talk")
        if system:
            check_system(llm, system)
            add_system(self.store, self.id, system)
        self.answer: Answer | None = None

    def ask(self, text: str) -> Iterator[str]:
        head = self.store.get(self.id).heads[0]
        self.answer = Answer(self.store, self.id, self.llm, self.sampling, text=text, parent=head)
        return iter(self.answer)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [node.message() for node in self.store.get(self.id).path()]

    @messages.setter
    def messages(self, messages: Sequence[dict[str, str]]) -> None:
        self.id = self.store.create(self.store.free_name("talk"))
        for id, message in enumerate(messages, 1):
            self.store.write(self.id, {"type": "message", "id": id, "parent": id - 1, **message})


def say(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))
