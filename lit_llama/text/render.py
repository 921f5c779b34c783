"""Conversations -> runs of text and control tokens, each of which the tokenizer encodes at once."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lit_llama.errors import CheckpointError, UserError
from lit_llama.text.conversation import Conversation, Dropped, Message
from lit_llama.text.encode import Cutter, Run, rendered
from lit_llama.text.formats import Example
from lit_llama.text.jinja.teller import Told
from lit_llama.text.prompts import JinjaStyle
from lit_llama.text.styles import PromptStyle, Segment
from lit_llama.text.thoughts import ThoughtsRule, with_thoughts_inside, without_thoughts
from lit_llama.text.tokenizer import Tokenizer

OnError = Literal["stop", "skip"]
TrainOn = Literal["all", "last"]
_MARKS = re.compile(r"</?s>|<\|\w+\|>|<(?:start|end)_of_turn>")  # as control tokens of most models are spelled


@dataclass(frozen=True)
class Rendered:
    """Conversations on their way into samples.

    Args:
        conversations: Those that can be rendered.
        runs: Of each of them.
        dropped: The others.
        apart: Rows of which each answer is one of the conversations.
        thoughts: Rows with answers that are trained without their thoughts.
    """

    conversations: list[Conversation]
    runs: list[list[Run]]
    dropped: list[Dropped]
    apart: list[int] = field(default_factory=list)
    thoughts: list[int] = field(default_factory=list)


class Renderer:
    """Renders conversations in one style; the parameters are those of `Encoder`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        style: PromptStyle,
        *,
        train_on: TrainOn,
        on_error: OnError,
        thoughts: ThoughtsRule,
        spelled: bool,
    ) -> None:
        self._tokenizer, self._style, self._cutter = tokenizer, style, Cutter(tokenizer)
        self._train_on, self._on_error, self._thoughts, self._spelled = train_on, on_error, thoughts, spelled

    def render(self, conversations: Sequence[Conversation]) -> Rendered:
        """Cut conversations into what is encoded apart: all that is to do before the tokenizer has its turn.

        Raises:
            UserError: The style cannot render a row, or does not say where an answer is.
            CheckpointError: The style ends answers in no control token of this tokenizer.
        """
        made = Rendered([], [], [])
        for given in conversations:
            conversation = self._with_thoughts(given)
            try:
                parts = self._parts(conversation)
                runs = [self._runs_of(part, told) for part, told in parts]
            except UserError as error:
                if self._on_error == "stop":
                    raise type(error)(f"{conversation.where}: {error}") from error
                made.dropped.append(Dropped(conversation.row, conversation.where, str(error)))
                continue
            made.conversations.extend(part for part, _ in parts)
            made.runs.extend(runs)
            if len(parts) > 1:
                made.apart.append(conversation.row)
            if (conversation is not given and self._thoughts == "drop") or any(
                told and not _trained(part).isdisjoint(told.left_out) for part, told in parts
            ):
                made.thoughts.append(conversation.row)
        return made

    def _parts(self, conversation: Conversation) -> list[tuple[Conversation, Told | None]]:
        """The conversation, rendered; or one for each of its answers, where they cannot be trained together.

        Answers are apart where the template tells a former one otherwise than it asks for it, or does not end it.
        """
        if conversation.text:
            return [(conversation, None)]
        told = self._told(conversation)
        answers = sorted(_trained(conversation))
        if len(answers) < 2 or self._train_on == "last" or not isinstance(self._style, JinjaStyle):
            return [(conversation, told)]
        lost = self._thoughts == "keep" and any(index in told.left_out for index in answers[:-1])
        if not told.apart and not lost and self._ended(told):
            return [(conversation, told)]
        muted = [{**message, "train": False} for message in conversation.messages]
        roles = [message["role"] for message in conversation.messages]
        parts: list[tuple[Conversation, Told | None]] = []
        for index in answers:
            before = [muted[i] if roles[i] == "assistant" else conversation.messages[i] for i in range(index)]
            part = replace(conversation, messages=(*before, conversation.messages[index]))
            parts.append((part, self._told(part)))
        return parts

    def _ended(self, told: Told) -> bool:
        """Whether every answer ends in a control token."""
        runs = self._cutter.runs(told.segments)
        follows = [*(run.trained for run in runs[1:]), True]
        return not any(
            run.trained and run.control is None and not after for run, after in zip(runs, follows, strict=True)
        )

    def _told(self, conversation: Conversation) -> Told:
        """A conversation in the style."""
        messages = [self._joined(message) for message in conversation.messages]
        if self._train_on == "last":
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            messages = [
                {**message, "train": False} if message["role"] == "assistant" and i < last else message
                for i, message in enumerate(messages)
            ]
        return rendered(self._tokenizer, self._style, messages, tools=conversation.tools, keep=self._thoughts == "keep")

    def _with_thoughts(self, conversation: Conversation) -> Conversation:
        """The conversation as the rule of thoughts has it, as far as that is no matter of a template."""
        if conversation.text or self._thoughts == "template":
            return conversation
        if self._thoughts == "keep" and isinstance(self._style, JinjaStyle):
            return conversation
        change = without_thoughts if self._thoughts == "drop" else with_thoughts_inside
        messages = tuple(change(message) for message in conversation.messages)
        same = all(new is old for new, old in zip(messages, conversation.messages, strict=True))
        return conversation if same else replace(conversation, messages=messages)

    def runs(self, conversation: Conversation) -> list[Run]:
        """Runs of a conversation.

        Raises:
            UserError: As `render`.
        """
        return self._runs_of(conversation, None if conversation.text else self._told(conversation))

    def _runs_of(self, conversation: Conversation, told: Told | None) -> list[Run]:
        """Runs up to the end of the last answer: what a template puts after it is never generated."""
        if told is None:
            return self._text_runs(conversation.messages[-1]["content"])
        runs = self._cutter.runs(told.segments)
        while runs and not runs[-1].trained:
            runs.pop()
        if not runs:
            raise UserError(
                f"the prompt style {self._style.name} does not say where an answer is, so it cannot be trained"
            )
        last = follows = True  # whether it is of the last answer, and whether what follows is trained
        for index in range(len(runs) - 1, -1, -1):
            run = runs[index]
            if run.trained and not run.muted and run.control is None and (index + 1 == len(runs) or not follows):
                raise CheckpointError(self._endless(run, last))
            last, follows = last and run.trained, run.trained
        if all(run.muted or not run.trained for run in runs):
            raise UserError("no answer of it is trained")
        return runs

    def _endless(self, run: Run, last: bool) -> str:
        """What to say of an answer that does not end."""
        found = f"the prompt style {self._style.name} ends an answer in {run.text[-20:]!r}, which is no control token"
        if last:
            return f"{found} of this tokenizer; a model trained so would never stop: name a style with --prompt_style"
        return f"{found} of this tokenizer; train the last answer of each row alone with --train_on last"

    def _text_runs(self, text: str) -> list[Run]:
        """Runs of a plain text, which stands at the beginning, whatever is put before it."""
        bos, eos, control = self._tokenizer.bos, self._tokenizer.eos, self._tokenizer.control
        runs = self._cutter.runs([Segment(text, trained=True, template=self._spelled)])
        if self._spelled and (
            foreign := next(filter(None, (_MARKS.search(run.text) for run in runs if run.control is None)), None)
        ):
            raise UserError(
                f"--rendered, but {foreign.group()} is no control token of this tokenizer: pass the tokenizer of the "
                "model that the text was rendered for, or leave --rendered out"
            )
        if self._spelled and runs and runs[-1].control is None and not runs[-1].text.strip():
            runs.pop()  # the end of the line behind the last token
        if bos and not (runs and runs[0].control == control[bos]):
            runs.insert(0, Run(bos, False, control[bos]))
        if not (runs and runs[-1].control is not None and len(runs) > 1):
            runs.append(Run(eos, True, control[eos]))
        return runs

    def _joined(self, message: Message) -> Message:
        """An instruction and its input are one content, put together as the style has it."""
        if "input" not in message:
            return message
        example = Example(message["content"], message["input"])
        joined = {key: value for key, value in message.items() if key != "input"}
        return joined | {"content": self._style.user(example)}


def _trained(conversation: Conversation) -> set[int]:
    """Numbers of the messages that are to be trained."""
    messages = enumerate(conversation.messages)
    return {index for index, message in messages if message["role"] == "assistant" and message.get("train", True)}
