"""Conversations -> runs of text and control tokens, each of which the tokenizer encodes at once."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from lit_llama.errors import CheckpointError, UserError
from lit_llama.text.config import OnError, ThoughtsRule, TrainOn, TypedEnds
from lit_llama.text.message import Conversation, Dropped, Message
from lit_llama.text.prompts.encode import Cutter, JinjaStyle, Run, rendered
from lit_llama.text.prompts.styles import PromptStyle, Segment
from lit_llama.text.prompts.teller import Told, with_thoughts_inside, without_thoughts
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import Place, any_of
from lit_llama.wording import param

Note = Literal["thoughts_left_out", "typed_ends", "looks_rendered", "opened", "joined"]
"""Of a row: its answer is trained without its thoughts; ends in an end that somebody typed; is a text that was rendered
before; is trained behind what the template ends a prompt in, and does not write before an answer; or begins with what
the tokenizer would join to the end of its prompt."""
_SHOWN = 4  # words of a template
_MARKS = re.compile(r"</?s>|<\|\w+\|>|<(?:start|end)_of_turn>")  # as control tokens of most models are spelled
_TYPED_ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<|end|>")
_NEAR = 12  # characters on either side of a border within which a tokenizer may join something
_REMEMBERED = 4096  # borders that were looked at
_HEAD = re.compile(rf"\s*\S{{0,{_NEAR}}}")


@dataclass(frozen=True)
class Rendered:
    """Conversations on their way into samples.

    Args:
        conversations: Those that can be rendered.
        runs: Of each of them.
        dropped: The others.
        apart: Rows of which each answer is one of the conversations.
        notes: What there is to say of some rows, and which.
    """

    conversations: list[Conversation]
    runs: list[list[Run]]
    dropped: list[Dropped]
    apart: list[int] = field(default_factory=list)
    notes: dict[Note, list[int]] = field(default_factory=dict)

    def note(self, what: Note, row: int) -> None:
        """Say something of a row."""
        self.notes.setdefault(what, []).append(row)


class Renderer:
    """Renderer of conversations in one style; the parameters are those of `Encoder`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        style: PromptStyle,
        *,
        train_on: TrainOn,
        on_error: OnError,
        thoughts: ThoughtsRule,
        mask_inputs: bool,
        spelled: bool,
        typed_ends: TypedEnds,
    ) -> None:
        self._tokenizer, self._style, self._cutter = tokenizer, style, Cutter(tokenizer)
        self._train_on, self._on_error, self._thoughts, self._spelled = train_on, on_error, thoughts, spelled
        self._mask_inputs, self._typed_ends = mask_inputs, typed_ends
        ends = "|".join(map(re.escape, {*tokenizer.control, *_TYPED_ENDS}))
        self._typed = re.compile(rf"(?:\s*(?:{ends}))+\s*\Z")
        self._joins: dict[tuple[str, str], bool] = {}

    def render(self, conversations: Sequence[Conversation]) -> Rendered:
        """Cut conversations into what is encoded apart: all that is to do before the tokenizer has its turn.

        Raises:
            UserError: The style cannot render a row, or does not say where an answer is.
            CheckpointError: The style ends answers in no control token of this tokenizer.
        """
        made = Rendered([], [], [])
        for given in conversations:
            conversation = self._asked_for(given)
            try:
                self._check_flags(given)
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
            for what in self._noted(given, parts):
                made.note(what, conversation.row)
        self._note_joined(made)
        return made

    def _noted(self, given: Conversation, parts: Sequence[tuple[Conversation, Told | None]]) -> Iterator[Note]:
        """What there is to say of a row."""
        last = given.messages[-1]["content"]
        if given.text:
            if not self._spelled and (_MARKS.search(last) or any_of(self._tokenizer.control).search(last)):
                yield "looks_rendered"
            return
        if self._thoughts == "drop":
            if any(without_thoughts(message) is not message for message in given.messages):
                yield "thoughts_left_out"
        elif any(told and not _trained(part).isdisjoint(told.left_out) for part, told in parts):
            yield "thoughts_left_out"
        if any(told and told.opened for _, told in parts):
            yield "opened"
        if any(self._typed.search(given.messages[index]["content"]) for index in _trained(given)):
            yield "typed_ends"

    def _note_joined(self, made: Rendered) -> None:
        """Look for answers whose beginning the tokenizer would join to the end of their prompt."""
        pairs: list[tuple[int, tuple[str, str]]] = []
        for conversation, runs in zip(made.conversations, made.runs, strict=True):
            for before, run in pairwise(runs):
                if run.trained and not run.muted and run.place == Place.MORE and not before.trained:
                    head = _HEAD.match(run.text)
                    pairs.append((conversation.row, (before.text[-_NEAR:], head.group() if head else "")))
        if len(self._joins) > _REMEMBERED:
            self._joins.clear()
        if new := list({pair for _, pair in pairs} - self._joins.keys()):
            whole, left, right = (
                self._tokenizer.encode_batch(texts, Place.MORE)
                for texts in (["".join(pair) for pair in new], [pair[0] for pair in new], [pair[1] for pair in new])
            )
            found = (all_ids != a + b for all_ids, a, b in zip(whole, left, right, strict=True))
            self._joins.update(zip(new, found, strict=True))
        said = set(made.notes.get("opened", ()))  # of which this is no news
        for row in dict.fromkeys(row for row, pair in pairs if self._joins[pair] and row not in said):
            made.note("joined", row)

    def _parts(self, conversation: Conversation) -> list[tuple[Conversation, Told | None]]:
        """The conversation, rendered; or one for each of its answers, where they cannot be trained together.

        Answers are apart where the template tells a former one otherwise than it asks for it, or does not end it.
        """
        if conversation.text:
            return [(conversation, None)]
        told = self._told(conversation)
        answers = sorted(_trained(conversation))
        if (
            len(answers) < 2
            or self._train_on == "last"
            or not self._mask_inputs
            or not isinstance(self._style, JinjaStyle)
        ):
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

    def _check_flags(self, conversation: Conversation) -> None:
        if not self._mask_inputs and any("train" in message for message in conversation.messages):
            raise UserError(
                f"an answer is marked not to be trained on, while {param('mask_inputs', False)} trains on every "
                "token: use "
                f"{param('mask_inputs', True)}"
            )

    def _ended(self, told: Told) -> bool:
        """Whether every answer ends in a control token."""
        runs = self._cutter.runs(told.segments)
        follows = [*(run.trained for run in runs[1:]), True]
        return not any(
            run.trained and run.control is None and not after for run, after in zip(runs, follows, strict=True)
        )

    def _told(self, conversation: Conversation) -> Told:
        """A conversation in the style."""
        messages = list(conversation.messages)
        if self._train_on == "last":
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            messages = [
                {**message, "train": False} if message["role"] == "assistant" and i < last else message
                for i, message in enumerate(messages)
            ]
        return rendered(self._tokenizer, self._style, messages, tools=conversation.tools, keep=self._thoughts == "keep")

    def _asked_for(self, conversation: Conversation) -> Conversation:
        """The conversation as the rules of thoughts and of typed ends have it, as far as no template is concerned."""
        if conversation.text:
            return conversation
        messages = conversation.messages
        if self._thoughts == "drop":
            messages = tuple(map(without_thoughts, messages))
        elif self._thoughts == "keep" and not isinstance(self._style, JinjaStyle):
            messages = tuple(map(with_thoughts_inside, messages))
        if self._typed_ends == "strip":
            messages = tuple(map(self._without_end, messages))
        same = all(new is old for new, old in zip(messages, conversation.messages, strict=True))
        return conversation if same else replace(conversation, messages=messages)

    def _without_end(self, message: Message) -> Message:
        """An answer without the ends that somebody typed behind it."""
        if message["role"] != "assistant" or not (found := self._typed.search(message["content"])):
            return message
        return {**message, "content": message["content"][: found.start()]}

    def runs(self, conversation: Conversation) -> list[Run]:
        """Render a conversation as runs.

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
            return (
                f"{found} of this tokenizer{self._foreign()}; a model trained so would never stop: name a style with "
                f"{param('prompt_style')}"
            )
        return f"{found} of this tokenizer; train the last answer of each row alone with {param('train_on', 'last')}"

    def _foreign(self) -> str:
        """What to say of words that a template spells as control tokens, and that are none of the tokenizer."""
        template = self._style.jinja(bos=True)
        words = [word for word in dict.fromkeys(_MARKS.findall(template)) if word not in self._tokenizer.control]
        if not words:
            return ""
        shown = ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")
        return f", nor is {shown} of the template: it may be that of another model"

    def _text_runs(self, text: str) -> list[Run]:
        """Runs of a plain text, which stands at the beginning, whatever is put before it."""
        bos, eos, control = self._tokenizer.bos, self._tokenizer.eos, self._tokenizer.control
        runs = self._cutter.runs([Segment(text, trained=True, template=self._spelled)])
        if self._spelled and (
            foreign := next(filter(None, (_MARKS.search(run.text) for run in runs if run.control is None)), None)
        ):
            raise UserError(
                f"{param('rendered')}, but {foreign.group()} is no control token of this tokenizer: pass the "
                "tokenizer of the "
                f"model that the text was rendered for, or leave {param('rendered')} out"
            )
        if self._spelled and runs and runs[-1].control is None and not runs[-1].text.strip():
            runs.pop()  # the end of the line behind the last token
        if bos and not (runs and runs[0].control == control[bos]):
            runs.insert(0, Run(bos, False, control[bos]))
        if not (runs and runs[-1].control is not None and len(runs) > 1):
            runs.append(Run(eos, True, control[eos]))
        return runs


def _trained(conversation: Conversation) -> set[int]:
    """Numbers of the messages that are to be trained."""
    messages = enumerate(conversation.messages)
    return {index for index, message in messages if message["role"] == "assistant" and message.get("train", True)}
