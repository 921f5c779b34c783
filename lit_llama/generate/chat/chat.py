"""A conversation with models of one engine: what it is, and how a message is answered."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from lit_llama.errors import UserError
from lit_llama.generate.chat.dialogue import ROOT, Dialogue
from lit_llama.generate.chat.screen import Screen
from lit_llama.generate.chat.session import Answer, check_system, context_used, message, sampling_of, title
from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Overflow, Sampling
from lit_llama.generate.llm import LLM

Edit = Callable[[str], str]
"""Has the user change a text."""


class Chat:
    """Conversations with models of one engine, by lines of a user.

    Args:
        models: By their names; the first one answers where none was chosen.
        default: How tokens are drawn where a conversation has no settings of its own.
        store: Where conversations are kept.
        say: Tells what is no answer.
        screen: Where answers are shown.
        system: Message that new conversations begin with.
        edit: Has the user change a text; None where that cannot be had.
        overflow: Beyond what the model reads: refuse a message, or leave out the oldest turns, aloud.

    Attributes:
        id: The conversation; None before its first message.
        pending: Its system message until then.
        own: Its settings until then.
        answer: The last one that was made.
        told: How many remarks of the store were told.
    """

    def __init__(
        self,
        models: Mapping[str, LLM],
        default: Sampling,
        store: Store,
        *,
        say: Callable[[str], object],
        screen: Screen,
        system: str = "",
        edit: Edit | None = None,
        overflow: Overflow = "drop_oldest",
    ) -> None:
        self.models, self.store, self.system = models, store, system
        self.default, self.say, self.screen, self.edit = default, say, screen, edit
        self.overflow = overflow
        self.id: str | None = None
        self.answer: Answer | None = None
        self.pending = system
        self.own: dict[str, Any] = {}
        self.told = 0
        check_system(self.llm, system)

    # ---- what there is

    @property
    def dialogue(self) -> Dialogue:
        """The conversation as it is now."""
        return Dialogue("", "new conversation") if self.id is None else self.store.get(self.id)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the conversation."""
        return self.own if self.id is None else self.dialogue.settings

    @property
    def model(self) -> str:
        """Name of the model that answers; the first one where that of the conversation is not given."""
        name = str(self.settings.get("model"))
        return name if name in self.models else next(iter(self.models))

    @property
    def llm(self) -> LLM:
        """The model that answers."""
        return self.models[self.model]

    @property
    def sampling(self) -> Sampling:
        """Sampling of the next answer."""
        return sampling_of(self.default, self.settings)

    def status(self) -> str:
        """Return the conversation, the model and the use of the context in a line."""
        dialogue = self.dialogue
        used, reads = context_used(dialogue.path()), self.llm.config.context_length
        return f"{dialogue.name}  |  {self.model}  |  context {used:,} of {reads:,} tokens ({used / reads:.0%})"

    # ---- a message

    def ask(self, text: str) -> None:
        """Add a message and show its answer."""
        self.make(text, self.dialogue.heads[0])

    def make(self, text: str | None, parent: int) -> None:
        """Answer a message.

        Args:
            text: What it says; None where `parent` is the one to be answered.
            parent: The message that it follows.

        Raises:
            UserError: It cannot be asked so; the conversation is as it was.
        """
        begins = self.id is None
        if begins and text is not None:
            self.create(self.store.free_name(title(text)))
            parent = self.dialogue.heads[0]  # the system message
        if self.id is None:
            raise UserError("there is no message yet")
        try:
            answer = Answer(
                self.store,
                self.id,
                self.llm,
                self.sampling,
                text=text,
                parent=parent,
                model=self.model,
                overflow=self.overflow,
            )
        except UserError:
            if begins:  # nothing is left of a conversation without messages
                self.own = dict(self.settings)
                self.store.delete(self.id)
                self.id = None
            raise
        self._show(answer)

    def create(self, name: str) -> None:
        """Begin to keep the conversation, with its settings and its system message."""
        system = [message(1, ROOT, "system", self.pending, time.time())] if self.pending else []
        settings = [{"type": "set", "name": key, "value": value} for key, value in self.own.items()]
        self.id = self.store.create(name, [*settings, *system])
        self.own = {}

    def _show(self, answer: Answer) -> None:
        self.answer, stopped = answer, False
        if answer.prompt.forgotten:
            self.say(
                f"(the conversation is too long for the model: {answer.prompt.forgotten} oldest turns are forgotten)"
            )
        self.screen.begin(answer.opened)
        try:
            for piece in answer:
                self.screen.write(piece)
        except KeyboardInterrupt:
            answer.close()
            stopped = True
        finally:
            self.screen.end(stopped)
        ending = f"; cut off at --max_new_tokens {self.sampling.max_new_tokens}" if answer.cut_off else ""
        used, reads = len(answer.prompt.ids) + answer.tokens, self.llm.config.context_length
        self.say(
            f"{answer.tokens} tokens in {answer.seconds:.2f} s, {answer.tokens / max(answer.seconds, 1e-9):.1f} "
            f"tokens/s; context {used:,} of {reads:,}{ending}"
        )
