"""Prompt styles: messages -> segments of text, each trained or not, and the equal Jinja chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_llama.errors import UserError
from lit_llama.text.formats import Example

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt or an answer.

    `template` text was written by us or by the model's publisher and may spell control tokens; everything else is
    somebody's words, which never become one.
    """

    text: str
    trained: bool = False
    template: bool = False


class PromptStyle:
    """How messages become the text that a model was trained on.

    No prompt ends in a space, which most tokenizers would join to the answer's first word: it begins the answer.

    Attributes:
        name: As in --prompt_style.
        tokens: Spellings in the templates that have to be control tokens.
    """

    name: str
    tokens: tuple[str, ...] = ()

    def user(self, example: Example) -> str:
        """Content of the user message for an instruction and its input, which stands below it."""
        return f"{example.instruction}\n\n{example.input}" if example.input else example.instruction

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = False
    ) -> list[Segment]:
        """Segments of a conversation.

        Args:
            messages: The turns so far.
            bos: Spelling of the token that begins a text, empty where the model wants none.
            eos: Spelling of the token that ends one.
            answer: End where the assistant has to begin.
        """
        raise NotImplementedError

    def jinja(self, bos: bool) -> str:
        """The chat template that renders the same text; `bos` if the model wants a beginning-of-text token."""
        raise NotImplementedError

    def _refuse(self, message: Message) -> UserError:
        return UserError(f"the prompt style {self.name} has no {message['role']} message")

    def _jinja_refuse(self) -> str:
        return f"{{{{ raise_exception('the prompt style {self.name} has no ' + message['role'] + ' message') }}}}"


class Alpaca(PromptStyle):
    """The prompt of Stanford Alpaca as lit-llama wrote it: it ends in `### Response:` without a newline."""

    name = "alpaca"
    _WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    _WITHOUT = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    _INPUT = "\n\n### Input:\n"

    def user(self, example: Example) -> str:
        """The instruction, and its input under a heading."""
        return example.instruction + (self._INPUT + example.input if example.input else "")

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = False
    ) -> list[Segment]:
        """See PromptStyle. The answer mark is part of the user's turn, as every user turn expects an answer."""
        segments = [Segment(bos, template=True)]
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "user":
                preamble = self._WITH_INPUT if self._INPUT in content else self._WITHOUT
                opening = "\n\n" if index else preamble
                segments.append(Segment(f"{opening}### Instruction:\n", template=True))
                segments.append(Segment(content))
                segments.append(Segment("\n\n### Response:", template=True))
            elif role == "assistant":
                segments.append(Segment(content, trained=True))
                segments.append(Segment(eos, trained=True, template=True))
            else:
                raise self._refuse(message)
        return [segment for segment in segments if segment.text]

    def jinja(self, bos: bool) -> str:
        """See PromptStyle."""
        return (
            ("{{ bos_token }}" if bos else "")
            + "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
            + "{%- if not loop.first -%}{{ '\\n\\n' }}"
            + "{%- elif " + _quote(self._INPUT) + " in message['content'] -%}{{ " + _quote(self._WITH_INPUT) + " }}"
            + "{%- else -%}{{ " + _quote(self._WITHOUT) + " }}{%- endif -%}"
            + "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:' }}"
            + "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}"
            + "{%- else -%}" + self._jinja_refuse()
            + "{%- endif -%}{%- endfor -%}"
        )  # fmt: skip


class ChatML(PromptStyle):
    """`<|im_start|>role`, content, `<|im_end|>` (OpenAI's chat markup; SmolLM2, Qwen)."""

    name = "chatml"
    tokens = ("<|im_start|>", "<|im_end|>")

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = False
    ) -> list[Segment]:
        """See PromptStyle."""
        segments = [Segment(bos, template=True)]
        for message in messages:
            trained = message["role"] == "assistant"
            segments.append(Segment(f"<|im_start|>{message['role']}\n", template=True))
            segments.append(Segment(message["content"], trained))
            segments.append(Segment("<|im_end|>", trained, template=True))
            segments.append(Segment("\n", template=True))
        if answer:
            segments.append(Segment("<|im_start|>assistant\n", template=True))
        return [segment for segment in segments if segment.text]

    def jinja(self, bos: bool) -> str:
        """See PromptStyle."""
        return (
            ("{{ bos_token }}" if bos else "")
            + "{%- for message in messages -%}"
            + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
            + "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
        )


class Ziya(PromptStyle):
    """Ziya-LLaMA-13B-v1: `<human>:` and the stripped question, `<bot>:` in the next line, answer and end of text."""

    name = "ziya"
    tokens = ("<human>", "<bot>")

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = False
    ) -> list[Segment]:
        """See PromptStyle."""
        segments = [Segment(bos, template=True)]
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "user":
                segments.append(Segment("<human>:", template=True))
                segments.append(Segment(content.strip()))
                segments.append(Segment("\n", template=True))
            elif role == "assistant":
                segments.append(Segment("<bot>:", template=True))
                segments.append(Segment(content, trained=True))
                segments.append(Segment(eos, trained=True, template=True))
            else:
                raise self._refuse(message)
        if answer:
            segments.append(Segment("<bot>:", template=True))
        return [segment for segment in segments if segment.text]

    def jinja(self, bos: bool) -> str:
        """See PromptStyle."""
        return (
            ("{{ bos_token }}" if bos else "")
            + "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
            + "{{ '<human>:' + message['content'].strip() + '\\n' }}"
            + "{%- elif message['role'] == 'assistant' -%}{{ '<bot>:' + message['content'] + eos_token }}"
            + "{%- else -%}"
            + self._jinja_refuse()
            + "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<bot>:' }}{%- endif -%}"
        )


class Vicuna(PromptStyle):
    """Vicuna v1.1, as FastChat writes it; a system message takes the place of the sentence at the beginning."""

    name = "vicuna"
    _SYSTEM = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = False
    ) -> list[Segment]:
        """See PromptStyle."""
        own = bool(messages) and messages[0]["role"] == "system"
        system = Segment(messages[0]["content"]) if own else Segment(self._SYSTEM, template=True)
        segments = [Segment(bos, template=True), system, Segment(" ", template=True)]
        for message in messages[own:]:
            role, content = message["role"], message["content"]
            if role == "user":
                segments.append(Segment("USER: ", template=True))
                segments.append(Segment(content))
                segments.append(Segment(" ", template=True))
            elif role == "assistant":
                segments.append(Segment("ASSISTANT:", template=True))
                segments.append(Segment(" ", trained=True, template=True))
                segments.append(Segment(content, trained=True))
                segments.append(Segment(eos, trained=True, template=True))
            else:
                raise self._refuse(message)
        if answer:
            segments.append(Segment("ASSISTANT:", template=True))
        return [segment for segment in segments if segment.text]

    def jinja(self, bos: bool) -> str:
        """See PromptStyle."""
        return (
            ("{{ bos_token }}" if bos else "")
            + "{%- if messages and messages[0]['role'] == 'system' -%}{{ messages[0]['content'] }}"
            + "{%- else -%}{{ " + _quote(self._SYSTEM) + " }}{%- endif -%}{{ ' ' }}"
            + "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
            + "{{ 'USER: ' + message['content'] + ' ' }}"
            + "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
            + "{%- elif not (loop.first and message['role'] == 'system') -%}"
            + self._jinja_refuse()
            + "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
        )  # fmt: skip


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
