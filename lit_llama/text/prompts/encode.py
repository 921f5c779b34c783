"""Prompt style that a folder carries, and segments -> runs -> ids: the same for training and for generation.

A folder carries its style as `chat_template.jinja`, which transformers, vLLM and llama.cpp read too. A template that is
equal to one of the built-in styles is rendered by it, any other by sandboxed Jinja. Segments of text become runs of
text and control tokens, and these the ids of a prompt.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from lit_llama.errors import CheckpointError, UserError
from lit_llama.text.config import StyleName
from lit_llama.text.message import Message
from lit_llama.text.prompts.styles import (
    Alpaca,
    ChatML,
    Llama2,
    Llama3,
    Mistral,
    Plain,
    PromptStyle,
    Segment,
    Vicuna,
    Ziya,
)
from lit_llama.text.prompts.teller import Told
from lit_llama.text.prompts.template import TEMPLATE_FILE as TEMPLATE_FILE
from lit_llama.text.prompts.template import JinjaStyle as JinjaStyle
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import LEADING, SETTINGS_FILE, TRAILING, Place, any_of, read_object
from lit_llama.wording import call, param

_STYLES: dict[str, PromptStyle] = {
    style.name: style for style in (Alpaca(), ChatML(), Ziya(), Vicuna(), Llama2(), Llama3(), Mistral(), Plain())
}
assert set(_STYLES) == set(get_args(StyleName))


def named_style(name: str) -> PromptStyle:
    """Return a built-in style."""
    return _STYLES[name]


def style_of(template: str) -> PromptStyle:
    """Return the style that a chat template stands for."""
    for style in _STYLES.values():
        for begins in (True, False):
            if template == style.jinja(bos=begins):
                found = copy(style)
                found.begins = begins
                return found
    return JinjaStyle(template)


def trained_ends(segments: Iterable[Segment], control: Collection[str], usual: str | None = None) -> list[Segment]:
    """Return the segments in which the end of every answer is trained: the template's text up to its first control
    token.

    What ends an answer already, or is followed by somebody's words before a control token, stays as it is.

    Args:
        segments: As a style rendered them.
        control: Spellings of the tokenizer's control tokens.
        usual: The control token that ends most answers, which counts before others that stand in front of it.
    """
    pattern = any_of(control)
    result: list[Segment] = []
    end: int | None = None  # where the text behind an open answer begins
    muted = False
    for segment in segments:
        if not segment.template:
            end, muted = len(result) + 1 if segment.trained else None, segment.muted
            result.append(segment)
            continue
        found = pattern.search(segment.text) if end is not None else None
        if end is None or found is None:
            result.append(segment)
            continue
        stop = segment.text.find(usual) + len(usual) if usual and usual in segment.text else found.end()
        result[end:] = [Segment(held.text, trained=True, template=True, muted=muted) for held in result[end:]]
        cut = len(segment.text) if segment.trained else stop
        rest = Segment(segment.text[cut:], template=True)
        own = Segment(segment.text[:cut], trained=True, template=True, muted=muted)
        result += [own, *([rest] if rest.text else [])]
        end = None
    return result


def answer_end(style: PromptStyle, bos: str, eos: str, control: Collection[str]) -> str | None:
    """Return the spelling of the token that ends an answer in a style, which need not be the model's own end.

    Where nothing ends the last answer, it is what opens the next question and so ends the answers before (GLM-4).
    None if the style does not say, or refuses to render a question and its answer.
    """
    exchange: list[Message] = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    for exchanges, answer in ((1, -1), (2, 0)):
        try:
            segments = trained_ends(style.render(exchange * exchanges, bos=bos, eos=eos), control)
        except CheckpointError:
            return None
        answers = [index for index, segment in enumerate(segments) if segment.trained and not segment.template]
        if not answers:
            return None
        behind = takewhile(lambda segment: segment.trained, segments[answers[answer] :])
        ends = (any_of(control).search(segment.text) for segment in behind)
        if (found := next(filter(None, ends), None)) and (exchanges == 1 or found.group() != bos):
            return found.group()
    return None


def folder_style(folder: Path) -> PromptStyle | None:
    """Return the style a folder carries, as chat_template.jinja or inside tokenizer_config.json; None if it has none.

    Of several templates it is the one named "default".

    Raises:
        CheckpointError: The file is not UTF-8, or not a JSON object.
    """
    path, settings = folder / TEMPLATE_FILE, folder / SETTINGS_FILE
    if not path.is_file():
        template = read_object(settings).get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        return style_of(template) if isinstance(template, str) else None
    try:
        return style_of(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from error


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pieces that are encoded together: a text, or one control token.

    Attributes:
        text: What is encoded.
        trained: Whether it is of an answer.
        control: Id of the control token.
        place: Where the text stands.
        muted: It is of an answer that carries no loss.
    """

    text: str
    trained: bool
    control: int | None = None
    place: Place = Place.START
    muted: bool = False


def for_style(tokenizer: Tokenizer, style: PromptStyle) -> Tokenizer:
    """Return the tokenizer, in which the words that open turns in a style are control tokens.

    Raises:
        CheckpointError: It would cut a token of the style into pieces that no model has learned.
    """
    marks = style.marks(tokenizer.words, tokenizer.bos_token, tokenizer.eos) if tokenizer.words else ()
    tokenizer = tokenizer.guarded(marks)
    if missing := [token for token in style.tokens if token not in tokenizer.control]:
        raise CheckpointError(
            f"the prompt style {style.name} needs the tokens {', '.join(missing)}, which this tokenizer has not: name "
            f"another with {param('prompt_style')}, or use the tokenizer of a model that was trained in it, with the "
            "added_tokens.json and tokenizer_config.json beside it"
        )
    return tokenizer


def begins(tokenizer: Tokenizer, style: PromptStyle) -> bool:
    """Whether a built-in style puts the token that begins a text before its first turn."""
    return bool(tokenizer.bos_token if style.begins else tokenizer.bos if style.begins is None else "")


def rendered(
    tokenizer: Tokenizer,
    style: PromptStyle,
    messages: Sequence[Message],
    *,
    answer: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    keep: bool = False,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Told:
    """Render a conversation in a style, with the end of each answer among what is trained.

    Args:
        tokenizer: As `for_style` gives it.
        style: How it is rendered.
        messages: The turns so far; an `input` becomes part of its instruction.
        answer: End where the assistant has to begin.
        tools: The functions that the assistant may call.
        keep: The last answer has its thoughts, whatever the style.
        more: Values by name that a chat template may ask for, and built-in styles do not.

    Raises:
        UserError: The style cannot say something, or a name in a call or a tool spells a control token.
    """
    messages = list(map(style.joined, messages))
    _refuse_controls(tokenizer, messages, tools)
    eos = tokenizer.eos
    if not isinstance(style, JinjaStyle):
        bos = tokenizer.bos_token if begins(tokenizer, style) else ""
        return Told(style.render(messages, bos=bos, eos=eos, answer=answer, tools=tools))
    told = style.tell(messages, bos=tokenizer.bos_token, eos=eos, answer=answer, tools=tools, keep=keep, more=more)
    usual = _usual_end(style, tokenizer.bos_token, eos, tuple(tokenizer.control)) if _calls(messages) else None
    segments = trained_ends(told.segments, tokenizer.control, usual)
    last = next((segment for segment in reversed(segments) if segment.text), None)
    if last and last.trained and not last.template:
        end = _usual_end(style, tokenizer.bos_token, eos, tuple(tokenizer.control))
        segments += [Segment(end, trained=True, template=True, muted=last.muted)] if end else []
    return replace(told, segments=segments)


@lru_cache(16)  # of the same style for every row
def _usual_end(style: PromptStyle, bos: str, eos: str, control: tuple[str, ...]) -> str | None:
    return answer_end(style, bos, eos, control)


def _calls(messages: Sequence[Message]) -> bool:
    return any("tool_calls" in message for message in messages)


def _refuse_controls(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if what a template writes unseen spells a control token: tools, and names within calls."""
    if not tools and not _calls(messages):
        return
    pattern = any_of(tokenizer.control)

    def check(value: Any, what: str, values: bool) -> None:
        if isinstance(value, str) and values and (found := pattern.search(value)):
            raise UserError(f"{what} spell the control token {found.group()}, which would end or open a turn")
        if isinstance(value, Mapping):
            for key, inner in value.items():
                check(key, what, True)
                check(inner, what, values)
        elif isinstance(value, list | tuple):
            for inner in value:
                check(inner, what, values)

    check(list(tools), "the tools", True)
    for message in messages:
        check(message.get("tool_calls"), "names in tool_calls", False)
        for called in message.get("tool_calls") or ():
            check({key: inner for key, inner in called.items() if key != "function"}, "names in tool_calls", True)
        check([message.get("name"), message.get("tool_call_id")], "names of messages", True)


def prompt_ids(
    tokenizer: Tokenizer,
    style: PromptStyle,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    more: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
    """Return the ids of a conversation up to where the assistant has to begin; arguments as for `rendered`.

    Raises:
        CheckpointError: The tokenizer has not the tokens of the style.
        UserError: The style cannot say something.
    """
    tokenizer = for_style(tokenizer, style)
    told = rendered(tokenizer, style, messages, answer=True, tools=tools, more=more)
    return ids_of(tokenizer, Cutter(tokenizer).runs(told.segments))


def ids_of(tokenizer: Tokenizer, runs: Sequence[Run]) -> list[int]:
    """Return the ids of runs."""
    return [i for run in runs for i in ([run.control] if run.control is not None else _ids(tokenizer, run))]


def _ids(tokenizer: Tokenizer, run: Run) -> list[int]:
    return tokenizer.encode(run.text, run.place)


def end_id(tokenizer: Tokenizer, style: PromptStyle) -> int | None:
    """Return the token that ends an answer in this style, which need not be the model's own end; None if it does not
    say.
    """
    end = answer_end(style, tokenizer.bos_token, tokenizer.eos, tokenizer.control)
    return None if end is None else tokenizer.control[end]


def place_behind(tokenizer: Tokenizer, prompt: Sequence[int]) -> Place:
    """Return the place of an answer: behind the text of its prompt, or behind an added token."""
    return Place.AFTER if prompt and prompt[-1] in tokenizer.added.values() else Place.MORE


def answer_opening(tokenizer: Tokenizer, style: PromptStyle) -> str:
    """Return the text that a decoded answer begins with and that is of the style, not of the answer: mostly a blank."""
    question, reply = ({"role": role, "content": "."} for role in ("user", "assistant"))
    try:
        segments = rendered(for_style(tokenizer, style), style, [question, reply]).segments
    except UserError:
        return ""
    first = next((segment for segment in segments if segment.trained), None)
    if first is None or not first.template or (isinstance(style, JinjaStyle) and first.text.strip()):
        return ""
    return first.text


class Cutter:
    """Cutter of segments into runs: what a tokenizer encodes as one text, and control tokens between them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._control, self._strips = tokenizer.control, tokenizer.strips
        self._pattern = any_of(tokenizer.control)
        self._pieces = lru_cache(4096)(self._cut)  # templates come again and again

    def runs(self, segments: Iterable[Segment]) -> list[Run]:
        """Split template text at control tokens, and join what stands between them.

        A text that goes on after another is marked as such: both together have the ids that they have as one text, as
        far as the tokenizer does not join the end of a prompt to the beginning of its answer.
        """
        runs: list[Run] = []
        for segment in segments:
            pieces: Iterable[tuple[str, int | None]] = [(segment.text, None)]
            for piece, control in self._pieces(segment.text) if segment.template else pieces:
                if control is None:
                    self._add(runs, piece, segment)
                    continue
                if self._strips.get(piece, _NEITHER)[0]:
                    self._trim(runs)
                runs.append(Run(piece, segment.trained, control, muted=segment.muted))
        return runs

    def _cut(self, template: str) -> list[tuple[str, int | None]]:
        """Texts and control tokens of a template, in their order."""
        pieces = enumerate(self._pattern.split(template))
        return [(piece, self._control[piece] if index % 2 else None) for index, piece in pieces if piece]

    def _add(self, runs: list[Run], text: str, segment: Segment) -> None:
        last = runs[-1] if runs else None
        if last and last.control is not None and self._strips.get(last.text, _NEITHER)[1]:
            text = LEADING.sub("", text, count=1)
        if not text:
            return
        if last and last.control is None and (last.trained, last.muted) == (segment.trained, segment.muted):
            runs[-1] = Run(last.text + text, last.trained, None, last.place, last.muted)
            return
        place = Place.START if not last else Place.MORE if last.control is None else Place.AFTER
        runs.append(Run(text, segment.trained, place=place, muted=segment.muted))

    def _trim(self, runs: list[Run]) -> None:
        """Take the blanks away from the end of a text."""
        while runs and runs[-1].control is None:
            text = TRAILING.sub("", runs[-1].text)
            if text:
                runs[-1] = replace(runs[-1], text=text)
                return
            runs.pop()


_NEITHER = (False, False)


def carried(tokenizer: Tokenizer) -> list[str]:
    """Return the names of the built-in prompt styles whose tokens a tokenizer has."""
    return [name for name in get_args(StyleName) if set(named_style(name).tokens) <= tokenizer.control.keys()]


def required_style(style: PromptStyle | None, tokenizer: Tokenizer) -> PromptStyle:
    """Return the style of a folder; raise CheckpointError if it has none, so that nobody knows how to ask."""
    if style is None:
        raise CheckpointError(
            "the folder has no chat template, so it does not say how to put an instruction; name the style the model "
            f"was trained with (its tokenizer could carry {param('prompt_style')} {', '.join(carried(tokenizer))}), or "
            "continue "
            f"raw text with {call('load', raw=True)}"
        )
    return style
