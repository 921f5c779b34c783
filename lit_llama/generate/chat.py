"""Talking to a model turn after turn."""

import sys
import time
from collections.abc import Callable, Iterator

from lit_llama.console import Results
from lit_llama.errors import UserError
from lit_llama.generate.answer import ended
from lit_llama.generate.engine.request import Overflow, Sampling
from lit_llama.generate.llm import LLM, report
from lit_llama.generate.overflow import fitted_messages
from lit_llama.progress import stderr
from lit_llama.text.encode import prompt_ids

HELP = (
    "/new starts over, /system TEXT starts over with a system message, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
)


class Conversation:
    """Messages so far; what the engine has computed of them is found again.

    Args:
        llm: Who answers.
        sampling: How tokens are drawn, and where an answer ends.
        system: Message that it begins with.
        overflow: Beyond what the model reads: refuse the message, or leave out the oldest turns, aloud.

    Attributes:
        messages: So far.
        answer: The last answer: how many tokens it took, and how it ended.

    Raises:
        UserError: The prompt style has no system message.
    """

    def __init__(self, llm: LLM, sampling: Sampling, system: str = "", overflow: Overflow = "drop_oldest") -> None:
        self._speaker, self._sampling, self._overflow = llm, sampling, overflow
        self._style = llm.require_style()
        self.messages: list[dict[str, str]] = []
        self.answer = llm.text(sampling)
        if system:
            self.messages = [{"role": "system", "content": system}]
            prompt_ids(llm.tokenizer, self._style, [*self.messages, {"role": "user", "content": "."}])

    def ask(self, text: str) -> Iterator[str]:
        """Add a message of the user and stream the answer; both are kept, also if the answer is stopped half way.

        Raises:
            UserError: The message does not fit into what the model reads, even alone; it is forgotten again.
        """
        messages, prompt = self._fit([*self.messages, {"role": "user", "content": text}])
        stream = self._speaker.answer(prompt, self._sampling, number=len(messages))  # other draws in each turn
        self.messages = messages
        parts: list[str] = []
        self.answer = stream.text
        try:
            for _, piece in stream:
                parts.append(piece)
                yield piece
        finally:
            stream.close()
            self.messages.append({"role": "assistant", "content": "".join(parts)})

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """Messages and their prompt; the oldest turns are left out, aloud, beyond what the model reads."""
        limit = self._speaker.config.context_length - self._sampling.max_new_tokens
        fitted = fitted_messages(self._speaker, messages, limit, self._overflow)
        if len(fitted.ids) > limit:
            what = "the message has" if self._overflow == "drop_oldest" else "the conversation would have"
            raise UserError(
                f"{what} {len(fitted.ids)} tokens, but only {max(limit, 0)} fit beside an answer of "
                f"--max_new_tokens {self._sampling.max_new_tokens}"
            )
        if fitted.dropped:
            stderr().print(f"(the conversation is too long for the model: {fitted.dropped} oldest turns are forgotten)")
        return [dict(message) for message in fitted.messages], fitted.ids


def talk(
    llm: LLM, sampling: Sampling, read: Callable[[], str], system: str = "", overflow: Overflow = "drop_oldest"
) -> None:
    """Read messages until the end of input; answers go to stdout, everything else to stderr.

    Args:
        llm: Who answers.
        sampling: How tokens are drawn, and where an answer ends.
        read: Gives the next message; EOFError ends the conversation, KeyboardInterrupt drops the line.
        system: Message that conversations begin with.
        overflow: See Conversation.
    """
    say = stderr().print
    say(HELP)
    conversation = Conversation(llm, sampling, system, overflow)
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        command, _, rest = text.partition(" ")
        if not text:
            continue
        if command == "/quit":
            return
        if command == "/new" or (command == "/system" and rest):
            conversation = _begin(llm, sampling, rest if command == "/system" else system, overflow)
            continue
        if command.startswith("/"):
            say(f"unknown command {text}; {HELP}")
            continue
        _answer(conversation, text, llm, sampling)


def _begin(llm: LLM, sampling: Sampling, system: str, overflow: Overflow) -> Conversation:
    """A new conversation; without a system message, said, where the style has none."""
    try:
        return Conversation(llm, sampling, system, overflow)
    except UserError as error:
        stderr().print(f"({error})")
        return Conversation(llm, sampling, overflow=overflow)


def _answer(conversation: Conversation, text: str, llm: LLM, sampling: Sampling) -> None:
    start = time.perf_counter()
    pieces, results = conversation.ask(text), Results()
    try:
        for piece in pieces:
            results.write(piece)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        print(" ...", end="")
    except UserError as error:
        stderr().print(f"({error})")
        return
    print(flush=True)
    seconds, answer = time.perf_counter() - start, conversation.answer
    device = llm.device
    report(answer.tokens, seconds, device, ended(answer.finish_reason, sampling))


def line_reader() -> Callable[[], str]:
    """Editing and history on a terminal, plain lines elsewhere."""
    if not sys.stdin.isatty():

        def read() -> str:
            line = sys.stdin.buffer.readline()
            if not line:
                raise EOFError
            try:
                return line.decode("utf-8")
            except UnicodeDecodeError:
                stderr().print("(the line is not UTF-8; what cannot be read is replaced)")
                return line.decode("utf-8", "replace")

        return read
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output.defaults import create_output

    session: PromptSession[str] = PromptSession(output=create_output(stdout=sys.stderr))
    return lambda: session.prompt("> ")
