"""A conversation with models of one engine: what it is, and how a message is answered on a screen.

Answers are shown as they come: plain text into a pipe, Markdown on a terminal, on which no word of them acts.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from lit_llama import progress
from lit_llama.console import Results, harmless
from lit_llama.errors import UserError
from lit_llama.generate.chat.dialogue import ROOT, Dialogue
from lit_llama.generate.chat.session import Answer, check_system, context_used, message, sampling_of, title
from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Overflow, Sampling
from lit_llama.generate.llm import LLM
from lit_llama.text.prompts.teller import thoughts_of
from lit_llama.wording import param

_FENCE = re.compile(r"\s{0,3}(```+|~~~+)")
_OPENED = re.compile(r"\s*(<(think|thinking|thought|thoughts|reasoning)>|\[THINK\])")


@dataclass(frozen=True)
class Folded:
    """An answer and the thoughts before it.

    Attributes:
        thoughts: None where there are none.
        rest: The answer.
        thinking: The thoughts go on.
    """

    thoughts: str | None
    rest: str
    thinking: bool = False


def folded(text: str, opened: bool = False) -> Folded:
    """Tell thoughts from an answer.

    Args:
        text: As far as it has come.
        opened: Its prompt ends in the tag that begins thoughts.
    """
    found = thoughts_of({"role": "assistant", "content": text})
    if found is not None and (found.opening or opened):
        return Folded(found.inner.strip(), found.rest)
    begun = _OPENED.match(text)
    if begun or opened:
        return Folded(text[begun.end() :].strip() if begun else text.strip(), "", True)
    return Folded(None, text)


def summed(folded: Folded) -> str:
    """Return a line in place of thoughts."""
    words = len((folded.thoughts or "").split())
    return f"▸ thinking, {words} words so far" if folded.thinking else f"▸ thought in {words} words"


def finished(text: str) -> int:
    """Return the end of the text up to which nothing that comes later changes how Markdown is shown: where the last
    block begins that follows an empty line, outside of code, and is no part of an item of a list.
    """
    fence, position, end, empty = "", 0, 0, False
    for line in text.splitlines(keepends=True):
        if empty and not fence and line[0] not in " \t\n":
            end = position
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
        empty = not line.strip()
        position += len(line)
    return end


class Harmless:
    """Renderable whose words cannot act on a terminal, whatever they were made of.

    Args:
        inner: What is shown.
        last: Most rows, of which the last ones are shown; 0 for all.
    """

    def __init__(self, inner: RenderableType, last: int = 0) -> None:
        self._inner, self._last = inner, last

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich."""
        rows = console.render_lines(self._inner, options, pad=False)
        for row in rows[-self._last :]:
            for text, style, control in row:
                if not control:
                    yield Segment(harmless(text), None if style is None else style.update_link(None))
            yield Segment.line()


def markdown(text: str) -> Harmless:
    """Return Markdown as it is shown."""
    return Harmless(Markdown(harmless(text), hyperlinks=False))


class Screen(Protocol):
    """Place where answers are shown."""

    def begin(self, opened: bool) -> None:
        """Begin an answer; `opened` if its prompt ends in the tag that begins thoughts."""
        ...

    def write(self, piece: str) -> None:
        """Write more of the answer that has come."""
        ...

    def end(self, stopped: bool) -> None:
        """End the answer; `stopped` by somebody."""
        ...

    def show(self, text: str, opened: bool = False) -> None:
        """Show a whole message."""
        ...


class Plain:
    """Text as it is."""

    def begin(self, opened: bool) -> None:
        """Begin an answer on stdout."""
        self._results = Results()

    def write(self, piece: str) -> None:
        """Write text as it is."""
        self._results.write(piece)

    def end(self, stopped: bool) -> None:
        """End the line of the answer; `stopped` by somebody."""
        self._results.end(" ...\n" if stopped else "\n")

    def show(self, text: str, opened: bool = False) -> None:
        """Show a message as it is."""
        results = Results()
        results.write(text)
        results.end()


class Terminal:
    """Markdown on a terminal: what is finished stays, the block that is being written is drawn anew.

    Args:
        console: Of the terminal; None for stdout.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or progress.Screen()
        self._live: Live | None = None

    def begin(self, opened: bool) -> None:
        """Begin an answer, drawn anew as it grows."""
        self._text, self._shown, self._opened, self._told = "", 0, opened, False
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def write(self, piece: str) -> None:
        """Write text, whose finished blocks stay."""
        self._text += piece
        found = folded(self._text, self._opened)
        if found.thinking:
            self._draw([summed(found)])
            return
        self._tell(found)
        open_ = found.rest[self._shown :]
        if end := finished(open_):
            self._live_console.print(markdown(open_[:end]))
            self._shown += end
        self._draw([found.rest[self._shown :]])

    def end(self, stopped: bool) -> None:
        """End the answer, all of which stays."""
        if self._live is None:
            return
        self._live.update("", refresh=True)
        self._live.stop()
        self._live = None
        found = folded(self._text, self._opened)
        self._tell(found)
        rest = found.rest[self._shown :]
        if rest.strip():
            self._console.print(markdown(rest))
        if stopped:
            self._console.print("...")

    def show(self, text: str, opened: bool = False) -> None:
        """Show a message as Markdown."""
        found = folded(text, opened)
        if found.thoughts is not None:
            self._console.print(summed(found), style="dim")
        self._console.print(markdown(found.rest))

    @property
    def _live_console(self) -> Console:
        assert self._live is not None
        return self._live.console

    def _tell(self, found: Folded) -> None:
        if found.thoughts is not None and not self._told:
            self._console.print(f"{summed(found)}; /show tells them", style="dim")
            self._told = True

    def _draw(self, parts: Iterable[str]) -> None:
        assert self._live is not None
        rows = max(1, self._console.height - 3)
        self._live.update(Harmless(Markdown(harmless("".join(parts)), hyperlinks=False), rows), refresh=True)


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
        ending = f"; cut off at {param('max_new_tokens', self.sampling.max_new_tokens)}" if answer.cut_off else ""
        used, reads = len(answer.prompt.ids) + answer.tokens, self.llm.config.context_length
        self.say(
            f"{answer.tokens} tokens in {answer.seconds:.2f} s, {answer.tokens / max(answer.seconds, 1e-9):.1f} "
            f"tokens/s; context {used:,} of {reads:,}{ending}"
        )
