"""A chat in a terminal, with line editing, completion and history; or a message a line out of a pipe."""

import contextlib
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import OneStyleAndTextTuple
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.layout.utils import explode_text_fragments
from prompt_toolkit.output.defaults import create_output

from lit_llama.console import harmless, own, visible
from lit_llama.errors import UserError
from lit_llama.generate.chat.chat import Chat, Plain, Screen, Terminal
from lit_llama.generate.chat.commands import COMMANDS, HELP, Leave, take
from lit_llama.generate.chat.lines import default_folder
from lit_llama.generate.chat.session import SETTINGS
from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Overflow, Sampling
from lit_llama.generate.llm import LLM
from lit_llama.progress import stderr

Read = Callable[[], str]
_FILES = ("/save", "/load", "/export")


def talk(
    models: Mapping[str, LLM],
    sampling: Sampling,
    *,
    system: str = "",
    folder: Path | None = None,
    read: Read | None = None,
    overflow: Overflow = "drop_oldest",
) -> None:
    """Read messages until the end of input; answers go to stdout, everything else to stderr.

    Args:
        models: By their names; the first one answers where none was chosen.
        sampling: How tokens are drawn, and where an answer ends.
        system: Message that conversations begin with.
        folder: Where conversations are kept; None for the user's own place on a terminal, and nowhere for a pipe.
        read: Gives the next message; EOFError ends the chat, KeyboardInterrupt drops the line. None reads stdin.
        overflow: Beyond what a model reads: refuse a message, or leave out the oldest turns, aloud.

    Raises:
        UserError: Lines out of a pipe failed; all others were answered.
    """
    interactive = read is None and sys.stdin.isatty()
    store = Store(default_folder() if interactive and folder is None else folder)
    screen: Screen = Terminal() if interactive and sys.stdout.isatty() else Plain()
    say = stderr().print
    chat = Chat(models, sampling, store, say=say, screen=screen, system=system, overflow=overflow)
    say(HELP)
    if interactive:
        editor = Editor(chat)
        read, chat.edit = editor.read, editor.edit
        if kept := len(store.list()):
            say(f"{kept} conversations in {store.folder}: /list shows them, /switch NAME goes on with one")
    errors = _loop(chat, read or read_line)
    if errors and read is None:
        failed = UserError(f"{len(errors)} lines failed, see above")
        failed.exit_status = errors[0].exit_status
        raise failed


def _loop(chat: Chat, read: Read) -> list[UserError]:
    """Take lines to their end; gives what failed."""
    errors: list[UserError] = []
    dropped = False  # the line before, by Ctrl-C
    while True:
        try:
            line = read().strip()
        except EOFError:
            return errors
        except KeyboardInterrupt:
            if dropped:
                return errors
            dropped = True
            chat.say("(Ctrl-C once more, or Ctrl-D, leaves)")
            continue
        dropped = False
        if not line:
            continue
        try:
            take(chat, line)
        except Leave:
            return errors
        except UserError as error:
            errors.append(error)
            chat.say(f"({error})")
        except KeyboardInterrupt:
            chat.say("(stopped)")


def read_line() -> str:
    """Read the next line of stdin, whatever its bytes.

    Raises:
        EOFError: There is none.
    """
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        stderr().print("(the line is not UTF-8; what cannot be read is replaced)")
        return line.decode("utf-8", "replace")


class Editor:
    """Lines that are edited on a terminal.

    Args:
        chat: Whose names are completed and whose state stands below the line.
    """

    def __init__(self, chat: Chat) -> None:
        folder = chat.store.folder
        history: History = InMemoryHistory() if folder is None else _Lasting(folder)
        self._chat = chat
        self._session: PromptSession[str] = PromptSession(
            output=create_output(stdout=own(sys.stderr)),
            history=history,
            completer=Names(chat),
            complete_while_typing=False,
            key_bindings=_keys(),
            bottom_toolbar=lambda: harmless(_status(chat)),
            enable_history_search=True,
            input_processors=[Spelled()],
        )

    def read(self) -> str:
        """Read the next message or command."""
        return self._session.prompt("> ")

    def edit(self, text: str) -> str:
        """Return a text as the user changes it."""
        alone: PromptSession[str] = PromptSession(
            output=create_output(stdout=own(sys.stderr)),
            history=InMemoryHistory(),
            key_bindings=_keys(),
            input_processors=[Spelled()],
        )
        return alone.prompt("edit> ", default=text)


def _status(chat: Chat) -> str:
    try:
        return chat.status()
    except UserError as error:  # removed by another process
        return str(error)


def _keys() -> KeyBindings:
    """Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class Spelled(Processor):
    """Processor that shows what is edited, pasted or an earlier message, so that no character of it acts on the
    terminal.
    """

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        """Spell the fragments of a line, as prompt_toolkit's Processor transforms them."""
        fragments = explode_text_fragments(transformation_input.fragments)
        text = "".join(fragment[1] for fragment in fragments)
        if harmless(text) == text:
            return Transformation(transformation_input.fragments)
        shown: list[OneStyleAndTextTuple] = [(fragment[0], visible(fragment[1])) for fragment in fragments]
        ends = [*accumulate((len(fragment[1]) for fragment in shown), initial=0)]  # the beginning of each
        return Transformation(
            [*shown],
            source_to_display=lambda at: ends[at] if at < len(ends) else ends[-1] + at + 1 - len(ends),
            display_to_source=lambda at: max(0, bisect_right(ends, at) - 1) + max(0, at - ends[-1]),
        )


class _Lasting(FileHistory):
    """Lines that were typed, beside the conversations; a full disk forgets them and no more."""

    def __init__(self, folder: Path) -> None:
        self._private = folder / ".history"
        super().__init__(str(self._private))

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):
            self._private.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self._private, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            super().store_string(string)


class Names(Completer):
    """Completer of commands, and of names of what they take."""

    def __init__(self, chat: Chat) -> None:
        self._chat, self._paths = chat, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield completions, as prompt_toolkit's Completer does."""
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        word, blank, rest = text.partition(" ")
        if not blank:
            for command in COMMANDS.values():
                if command.name.startswith(word):
                    yield Completion(command.name, -len(word), display_meta=command.does)
        elif word in _FILES:
            for found in self._paths.get_completions(Document(rest), complete_event):
                yield Completion(found.text, found.start_position, display=harmless(found.display_text))
        else:
            for name in self._names(word):
                if name.startswith(rest):
                    yield Completion(name, -len(rest), display=harmless(name))

    def _names(self, word: str) -> list[str]:
        if word in ("/switch", "/delete"):
            return [summary.name for summary in self._chat.store.list()]
        return {"/set": list(SETTINGS), "/model": list(self._chat.models)}.get(word, [])
