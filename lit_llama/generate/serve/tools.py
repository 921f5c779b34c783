"""Calls of functions: how a model's template writes them, a grammar that keeps answers to that, and reading them back.

A template that writes calls is asked to write two of them, of functions with telling names. What stands around the
names and the arguments is the form in which the model was trained to call.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lit_llama.errors import UserError
from lit_llama.generate.llm import LLM
from lit_llama.generate.serve.fields import refusal
from lit_llama.text.message import Message
from lit_llama.text.prompts.encode import JinjaStyle, answer_end, for_style, rendered
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import any_of

_NAMES = ("probed_function_one", "probed_function_two")
_ID = "a1B2c3D4e"
_ARGUMENTS = {"probed_key": "probed value"}
_TAG = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
_WRITTEN_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as templates do
_WRITTEN = re.compile(r'\{\s*"probed_key"\s*:\s*"probed value"\s*\}')


@dataclass(frozen=True)
class CallForm:
    """Spelling of calls: opening, name, middle, arguments, and again after between; closing.

    Attributes:
        between: None where there is one call at most.
        control: Spellings of control tokens, which stand for no text.
    """

    opening: str
    middle: str
    between: str | None
    closing: str
    control: Mapping[str, int]

    @property
    def shown(self) -> "CallForm":
        """The form as it is in the text of an answer, where control tokens are not."""
        bare = any_of(self.control).sub
        between = None if self.between is None else bare("", self.between)
        return replace(
            self, opening=bare("", self.opening), middle=self.middle, between=between, closing=bare("", self.closing)
        )

    @property
    def tag(self) -> str:
        """The tag that opens calls, so that they may stand behind text; "" where they begin the answer."""
        found = _TAG.match(self.shown.opening)
        return found[0] if found else ""


def call_form(llm: LLM, tools: Sequence[Mapping[str, Any]]) -> CallForm:
    """Find the form in which the template of a model writes calls.

    Raises:
        ApiError: It writes no tools, or in a form that cannot be read back.
    """
    style = llm.require_style()
    if not isinstance(style, JinjaStyle):
        raise refusal("tools", f"are not written by the prompt style {style.name} of this model", "unsupported_value")
    form = _probed(for_style(llm.tokenizer, style), style)
    if isinstance(form, str):
        raise refusal("tools", form, "unsupported_value")
    return form


@lru_cache(64)
def _probed(tokenizer: Tokenizer, style: PromptStyle) -> CallForm | str:
    """The form, or why there is none."""
    try:
        one, two = (_answer(tokenizer, style, names) for names in (_NAMES[:1], _NAMES))
    except UserError as error:
        return f"cannot be used: {str(error).split(';')[0]}"
    if one is None:
        return "cannot be used: the model's template writes calls in a form that cannot be read back"
    opening, middle, _, closing = one
    between = two[2] if two and (two[0], two[1], two[3]) == (opening, middle, closing) else None
    return CallForm(opening, middle, between, closing, dict(tokenizer.control))


def _answer(tokenizer: Tokenizer, style: PromptStyle, names: Sequence[str]) -> tuple[str, str, str, str] | None:
    """What a template writes before, within, between and after calls; None if it cannot be told."""
    tools: list[Mapping[str, Any]] = [
        {"type": "function", "function": {"name": n, "description": ".", "parameters": {"type": "object"}}}
        for n in names
    ]
    calls = [{"type": "function", "id": _ID, "function": {"name": n, "arguments": _ARGUMENTS}} for n in names]
    messages: list[Message] = [
        {"role": "user", "content": "."},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    try:
        segments = rendered(tokenizer, style, messages, tools=tools).segments
    except UserError:
        if len(names) > 1:  # some templates write one call at a time
            return None
        raise
    text = "".join(segment.text for segment in segments if segment.trained)
    end = answer_end(style, tokenizer.bos_token, tokenizer.eos, tokenizer.control)
    text = text.removesuffix(end) if end else text
    for spelling in tokenizer.control:
        text = text.removesuffix(spelling)
    arguments = [match.span() for match in _WRITTEN.finditer(text)]
    if len(arguments) != len(names) or _ID in text or any(text.count(name) != 1 for name in names):
        return None
    starts = [text.index(name) for name in names]
    ends = [start + len(name) for start, name in zip(starts, names, strict=True)]
    middles = {text[end:begin] for end, (begin, _) in zip(ends, arguments, strict=True)}
    if len(middles) != 1 or any(end > begin for end, (begin, _) in zip(ends, arguments, strict=True)):
        return None
    between = text[arguments[0][1] : starts[1]] if len(names) > 1 else ""
    lead = _lead(tokenizer, style, tools)
    return text[: starts[0]].removeprefix(lead).lstrip(), middles.pop(), between, text[arguments[-1][1] :].rstrip()


def _lead(tokenizer: Tokenizer, style: PromptStyle, tools: Sequence[Mapping[str, Any]]) -> str:
    """What stands before the words of any answer, such as thoughts that are empty."""
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    segments = rendered(tokenizer, style, messages, tools=tools).segments
    return "".join(segment.text for segment in segments if segment.trained).partition(".")[0]


def call_grammar(
    form: CallForm, tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any], parallel: bool
) -> str:
    """Return a grammar, in llguidance's variant of Lark, of answers that call functions by their schemas.

    Args:
        form: How calls are written.
        tools: The functions.
        choice: "auto" allows text instead of calls, "required" does not; a function is the one to call.
        parallel: Whether there may be several calls.
    """
    wanted = [choice] if isinstance(choice, Mapping) else list(tools)
    several = parallel and form.between is not None and not isinstance(choice, Mapping)
    more = f" ({_literal(form.between or '', form.control)} call)*" if several else ""
    rest = f"call{more} {_literal(form.closing, form.control)}"
    rules = [f"calls: {_literal(form.opening, form.control)} {rest}"]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(wanted))))
    for index, tool in enumerate(wanted):
        function = tool["function"]
        schema = {"type": "object", **function["parameters"], "x-guidance": _WRITTEN_JSON}
        head = json.dumps(function["name"] + form.middle, ensure_ascii=False)
        rules += [f"call_{index}: {head} arguments_{index}", f"arguments_{index}: %json {json.dumps(schema)}"]
    if choice == "auto":
        unlike = f"(?s:.*){_escaped(form.tag)}(?s:.*)" if form.tag else f"{_escaped(form.shown.opening)}(?s:.*)"
        rules += [f"TEXT: /(?s:.*)/ & ~/{unlike}/"]
        if form.tag:  # text is read up to the first tag, and no further
            behind = _literal(form.shown.opening.removeprefix(form.tag), {})
            rules += [f"opened[lazy]: /(?s:.*)/ {json.dumps(form.tag)}", f"late: opened {behind} {rest}"]
        rules.insert(0, "start: TEXT | calls | late" if form.tag else "start: TEXT | calls")
    else:
        rules.insert(0, "start: calls")
    return "\n".join(rules)


def _literal(text: str, control: Mapping[str, int]) -> str:
    """A text as a grammar has it, its control tokens by their ids."""
    parts = any_of(control).split(text)
    found = [
        f"<[{control[part]}]>" if index % 2 else json.dumps(part, ensure_ascii=False)
        for index, part in enumerate(parts)
        if part
    ]
    return " ".join(found) or '""'


def _escaped(text: str) -> str:
    return re.sub(r"([.+*?()|\[\]{}^$/\\])", r"\\\1", text).replace("\n", r"\n")


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an answer: thoughts, content, or of a call its name once and its arguments in pieces.

    Attributes:
        content: Text outside calls.
        call: Number of the call, None for content.
        name: Of the function, with the first piece of a call.
        arguments: More of the arguments.
        thoughts: Text before all that.
    """

    content: str = ""
    call: int | None = None
    name: str = ""
    arguments: str = ""
    thoughts: str = ""


class CallReader:
    """Text of an answer as it comes -> content and calls.

    What may become the opening of a call is held back. A text that is no call after all is content.
    """

    def __init__(self, form: CallForm, names: Sequence[str]) -> None:
        self._form, self._names = form.shown, names
        self._tagged = bool(form.tag)
        self._held = ""
        self._state = "text"
        self._depth, self._quoted, self._escape = 0, False, False
        self.calls = 0
        self._spoke = False

    def push(self, text: str) -> list[Piece]:
        """Take more text; return the pieces that became certain."""
        self._held += text
        pieces: list[Piece] = []
        while (found := self._next()) is not None:
            pieces += found
        return pieces

    def flush(self) -> list[Piece]:
        """Return the pieces that are left at the end."""
        held, self._held = self._held, ""
        return [Piece(content=held)] if held and self._state in ("text", "name") and not self.calls else []

    def _next(self) -> list[Piece] | None:
        """The next step; None where more text is needed."""
        if not self._held:
            return None
        return {"text": self._text, "name": self._name, "arguments": self._arguments, "between": self._between}[
            self._state
        ]()

    def _text(self) -> list[Piece] | None:
        opening = self._form.opening
        at = self._held.find(opening)
        if at >= 0 and (self._tagged or (not self._spoke and not self._held[:at].strip())):
            before, self._held, self._state = self._held[:at], self._held[at + len(opening) :], "name"
            return [Piece(content=before)] if before and (self._spoke or before.strip()) else []
        keep = 0
        if self._tagged or not self._spoke:
            keep = next(
                (n for n in range(min(len(opening), len(self._held)), 0, -1) if self._held.endswith(opening[:n])), 0
            )
            if not self._spoke and not self._held[: len(self._held) - keep].strip():
                keep = len(self._held)
            if not self._tagged and keep < len(self._held):
                keep = 0
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._spoke = self._spoke or bool(out.strip())
        return [Piece(content=out)] if out else None

    def _name(self) -> list[Piece] | None:
        for name in self._names:
            head = name + self._form.middle
            if self._held.startswith(head):
                self._held, self._state = self._held[len(head) :], "arguments"
                self.calls += 1
                self._depth, self._quoted, self._escape = 0, False, False
                return [Piece(call=self.calls - 1, name=name)]
        return None

    def _arguments(self) -> list[Piece] | None:
        for index, character in enumerate(self._held):
            if self._escape:
                self._escape = False
            elif self._quoted:
                self._escape, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    out, self._held, self._state = self._held[: index + 1], self._held[index + 1 :], "between"
                    return [Piece(call=self.calls - 1, arguments=out)]
        out, self._held = self._held, ""
        return [Piece(call=self.calls - 1, arguments=out)]

    def _between(self) -> list[Piece] | None:
        between = self._form.between
        if between and self._held.startswith(between):
            self._held, self._state = self._held[len(between) :], "name"
            return []
        return None


def call_id() -> str:
    """Return a fresh id of a call."""
    return f"call_{secrets.token_hex(12)}"
