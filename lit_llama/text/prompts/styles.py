"""Prompt styles: messages -> segments of text, each trained or not, and the equal Jinja chat template."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lit_llama.errors import UserError
from lit_llama.text.message import Message
from lit_llama.wording import param


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt or an answer.

    `template` text was written by us or by the model's publisher and may spell control tokens; everything else is
    somebody's words, which never become one. `trained` text is of an answer; a `muted` answer carries no loss, but is
    encoded as any other, so that a prompt has the same ids whether its former answers were trained or not.
    """

    text: str
    trained: bool = False
    template: bool = False
    muted: bool = False


UNSAID = ("tool_calls", "reasoning_content", "tools")
"""Keys of a message or a conversation that the model would have to read or write, and that only a chat template may
have words for."""


def refuse_unsaid(name: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if a conversation holds what a prompt style would leave out in silence."""
    there = {key for message in messages for key in message if key in UNSAID} | ({"tools"} if tools else set())
    for unsaid in (key for key in UNSAID if key in there):
        raise UserError(
            f"the prompt style {name} cannot say {unsaid}: use a model whose own template does, with "
            f"{param('prompt_style', 'chat_template')}, or leave such rows out with {param('on_error', 'skip')}"
            + _without(unsaid)
        )


def _without(unsaid: str) -> str:
    """How to do without what a style cannot say."""
    if unsaid == "reasoning_content":
        keep = param("thoughts", "keep")
        return f"; {keep} writes them into the answer as <think>...</think>, drop leaves them out"
    return f", or their tools with {param('ignore_fields', ['tools'])}" if unsaid == "tools" else ""


class PromptStyle:
    """Style in which messages become the text that a model was trained on.

    No prompt ends in a space, which most tokenizers would join to the answer's first word: it begins the answer.

    Attributes:
        name: As in `prompt_style`.
        tokens: Spellings in the templates that have to be control tokens.
        begins: Whether the template that it was read from writes the token that begins a text; None where it was named,
            and the tokenizer decides.
    """

    name: str
    tokens: tuple[str, ...] = ()
    begins: bool | None = None

    def marks(self, words: Collection[str], bos: str, eos: str) -> set[str]:
        """Return those of a tokenizer's added words that open turns, so that nobody else may spell them."""
        return {*self.tokens} & {*words}

    def user(self, instruction: str, input: str) -> str:
        """Return the content of the user message for an instruction and its input, which stands below it."""
        return f"{instruction}\n\n{input}" if input else instruction

    def joined(self, message: Message) -> Message:
        """Return the message with its input, if it has one, in its content."""
        if "input" not in message:
            return message
        rest = {key: value for key, value in message.items() if key != "input"}
        return rest | {"content": self.user(message["content"], message["input"])}

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos: str = "",
        eos: str = "",
        answer: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Segment]:
        """Render a conversation as segments.

        Args:
            messages: The turns so far.
            bos: Spelling of the token that begins a text, empty where the model wants none.
            eos: Spelling of the token that ends one.
            answer: End where the assistant has to begin.
            tools: The functions that the assistant may call.

        Raises:
            UserError: The style has no words for a message, or for what a message or the conversation holds.
        """
        raise NotImplementedError

    def jinja(self, bos: bool) -> str:
        """Return the chat template that renders the same text; `bos` if the model wants a beginning-of-text token."""
        raise NotImplementedError


@dataclass(frozen=True)
class Turn:
    """Text that a style writes around the content of a message; {bos}, {eos} and {role} stand for their spellings.

    Of an assistant's turn, everything from `lead` to `end` is learned.

    Attributes:
        before: Opens the turn. A prompt ends in that of the assistant.
        lead: Begins the answer.
        trail: Stands behind its last word.
        end: The token that ends it.
        after: Closes the turn.
        strip: The content goes without the blanks around it.
    """

    before: str = ""
    lead: str = ""
    trail: str = ""
    end: str = ""
    after: str = ""
    strip: bool = False

    @property
    def text(self) -> str:
        """The whole turn in one."""
        return f"{self.before}{self.lead}{{content}}{self.trail}{self.end}{self.after}"


class TurnStyle(PromptStyle):
    """A style that is told once, by its turns: the segments and the Jinja template are both made from them.

    Attributes:
        every: The turn of every role, if they are alike.
        user_turn: That of a user otherwise.
        assistant_turn: That of an assistant.
        system_turn: That of a system message, which stands at the beginning. Without it there is none.
        preface: Stands at the beginning where there is no such message.
        again: Stands before each user's turn but the first.
    """

    every: Turn | None = None
    user_turn = Turn()
    assistant_turn = Turn(end="{eos}")
    system_turn: Turn | None = None
    preface: str = ""
    again: str = ""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)  # whether or not one was read from a template that begins texts

    def __hash__(self) -> int:
        return hash(type(self))

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos: str = "",
        eos: str = "",
        answer: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Segment]:
        """Render a conversation as the turns say."""

        def own(text: str, role: str = "") -> Segment:
            return _own(text, bos, eos, role, False)

        def around(turn: Turn, message: Message, trained: bool = False) -> list[Segment]:
            content = message["content"].strip() if turn.strip else message["content"]
            ahead, behind = _around(turn, bos, eos, message["role"], trained)
            turned = [*ahead, Segment(content, trained), *behind]
            if trained and not message.get("train", True):
                return [replace(segment, muted=segment.trained) for segment in turned]
            return turned

        refuse_unsaid(self.name, messages, tools)
        segments = [] if self._places_bos else [own("{bos}")]
        if self.system_turn and messages and messages[0]["role"] == "system":
            segments += around(self.system_turn, messages[0])
            messages = messages[1:]
        else:
            segments.append(own(self.preface))
        for index, message in enumerate(messages):
            role = message["role"]
            turn = self.every or self._turns.get(role)
            if turn is None:
                raise UserError(f"the prompt style {self.name} has no {role} message{self._where}")
            if role == "user":
                segments.append(own(self._opening(index == 0, message["content"])))
            segments += around(turn, message, role == "assistant")
        if answer:
            segments.append(own((self.every or self.assistant_turn).before, "assistant"))
        return [segment for segment in segments if segment.text]

    def jinja(self, bos: bool) -> str:
        """Return the chat template of the turns."""
        head, turns = "{{ bos_token }}" if bos and not self._places_bos else "", "messages"
        if self.system_turn:
            turns = "turns"
            head += (
                "{%- if messages and messages[0]['role'] == 'system' -%}{%- set turns = messages[1:] -%}"
                + _print(self.system_turn.text, bos, self.system_turn.strip, "messages[0]")
                + "{%- else -%}{%- set turns = messages -%}" + _print(self.preface, bos) + "{%- endif -%}"
            )  # fmt: skip
        if self.every:
            body = _print(self.every.text, bos, self.every.strip)
        else:
            branches = [
                f"if message['role'] == '{role}' -%}}"
                + (self._jinja_opening(bos) if role == "user" else "")
                + _print(turn.text, bos, turn.strip)
                for role, turn in self._turns.items()
            ]
            refusal = f"'the prompt style {self.name} has no ' + message['role'] + ' message{self._where}'"
            body = "{%- " + "{%- el".join(branches) + "{%- else -%}{{ raise_exception(" + refusal + ") }}{%- endif -%}"
        prompt = (self.every or self.assistant_turn).before.replace("{role}", "assistant")
        return (
            f"{head}{{%- for message in {turns} -%}}{body}{{%- endfor -%}}"
            + (f"{{%- if add_generation_prompt -%}}{_print(prompt, bos)}{{%- endif -%}}" if prompt else "")
        )  # fmt: skip

    @property
    def _turns(self) -> dict[str, Turn]:
        return {"user": self.user_turn, "assistant": self.assistant_turn}

    @property
    def _places_bos(self) -> bool:
        return "{bos}" in self.preface

    @property
    def _where(self) -> str:
        return " but at the beginning" if self.system_turn else ""

    def _opening(self, first: bool, content: str) -> str:
        """Template text before a user's turn."""
        return "" if first else self.again

    def _jinja_opening(self, bos: bool) -> str:
        return "{%- if not loop.first -%}" + _print(self.again, bos) + "{%- endif -%}" if self.again else ""


@lru_cache(4096)  # a style has a dozen of them, and a data set a million rows
def _own(text: str, bos: str, eos: str, role: str, trained: bool) -> Segment:
    return Segment(text.format(bos=bos, eos=eos, role=role), trained, template=True)


@lru_cache(4096)
def _around(
    turn: Turn, bos: str, eos: str, role: str, trained: bool
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """What stands before and behind the words of a turn."""

    def segments(*parts: tuple[str, bool]) -> tuple[Segment, ...]:
        return tuple(_own(text, bos, eos, role, learned) for text, learned in parts if text)

    return (
        segments((turn.before, False), (turn.lead, trained)),
        segments((turn.trail, trained), (turn.end, trained), (turn.after, False)),
    )


def _print(text: str, bos: bool, strip: bool = False, message: str = "message") -> str:
    """The Jinja statement that prints a text with placeholders."""
    values = {
        "{bos}": "bos_token" if bos else "",
        "{eos}": "eos_token",
        "{role}": f"{message}['role']",
        "{content}": f"{message}['content']" + (".strip()" if strip else ""),
    }
    parts = [values[part] if part in values else _quote(part) for part in re.split(r"(\{\w+\})", text) if part]
    return f"{{{{ {' + '.join(filter(None, parts))} }}}}" if any(parts) else ""


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


class Alpaca(TurnStyle):
    """The prompt of Stanford Alpaca as lit-llama wrote it: it ends in `### Response:` without a newline.

    The answer mark is part of the user's turn, as every user turn expects an answer.
    """

    name = "alpaca"
    user_turn = Turn("### Instruction:\n", after="\n\n### Response:")
    again = "\n\n"
    _WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    _WITHOUT = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    _INPUT = "\n\n### Input:\n"

    def user(self, instruction: str, input: str) -> str:
        """Return the instruction, and its input under a heading."""
        return instruction + (self._INPUT + input if input else "")

    def _opening(self, first: bool, content: str) -> str:
        if not first:
            return self.again
        return self._WITH_INPUT if self._INPUT in content else self._WITHOUT

    def _jinja_opening(self, bos: bool) -> str:
        return (
            "{%- if not loop.first -%}" + _print(self.again, bos)
            + "{%- elif " + _quote(self._INPUT) + " in message['content'] -%}" + _print(self._WITH_INPUT, bos)
            + "{%- else -%}" + _print(self._WITHOUT, bos) + "{%- endif -%}"
        )  # fmt: skip


class ChatML(TurnStyle):
    """`<|im_start|>role`, content, `<|im_end|>` (OpenAI's chat markup; SmolLM2, Qwen)."""

    name = "chatml"
    tokens = ("<|im_start|>", "<|im_end|>")
    every = Turn("<|im_start|>{role}\n", end="<|im_end|>", after="\n")


class Ziya(TurnStyle):
    """Ziya-LLaMA-13B-v1: `<human>:` and the stripped question, `<bot>:` in the next line, answer and end of text.

    It was trained on answers encoded apart, which sentencepiece begins with a blank.
    """

    name = "ziya"
    tokens = ("<human>", "<bot>")
    user_turn = Turn("<human>:", after="\n", strip=True)
    assistant_turn = Turn("<bot>:", lead=" ", end="{eos}")


class Vicuna(TurnStyle):
    """Vicuna v1.1, as FastChat writes it; a system message takes the place of the sentence at the beginning."""

    name = "vicuna"
    system_turn = Turn(after=" ")
    preface = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    user_turn = Turn("USER: ", after=" ")
    assistant_turn = Turn("ASSISTANT:", lead=" ", end="{eos}")


class Llama2(TurnStyle):
    """Llama 2 Chat, as Meta's code writes it: each exchange is a text with its beginning and its end.

    The system message stands within the first user's turn. There, too, the user's words are stripped on both sides,
    where Meta leaves the blanks that they begin with.
    """

    name = "llama-2"
    system_turn = Turn("{bos}[INST] <<SYS>>\n", after="\n<</SYS>>\n\n")
    preface = again = "{bos}[INST] "
    user_turn = Turn(after=" [/INST]", strip=True)
    assistant_turn = Turn(lead=" ", trail=" ", end="{eos}", strip=True)


class Llama3(TurnStyle):
    """Llama 3 Instruct, as Meta's code writes it: role in a header, stripped content, `<|eot_id|>`."""

    name = "llama-3"
    tokens = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    every = Turn("<|start_header_id|>{role}<|end_header_id|>\n\n", end="<|eot_id|>", strip=True)


class Mistral(TurnStyle):
    """Mistral 7B Instruct 0.1 and 0.2, whose `[INST]` is text: `[INST] question [/INST] answer</s>`.

    Where `[INST]` is a control token (0.3 and later), it becomes that; the template there has no blank before
    `[/INST]`, and comes with the model's folder.
    """

    name = "mistral"
    user_turn = Turn("[INST] ", after=" [/INST]")
    assistant_turn = Turn(lead=" ", end="{eos}")


class Plain(TurnStyle):
    """No prompt at all: a text, and the answer goes on with it."""

    name = "plain"
