"""A Modelfile beside a GGUF file, from which `ollama create` makes a model.

Ollama writes prompts with templates of Go, not with the chat template in the file. The built-in styles are translated;
of any other template nobody knows that the translation says the same, so Ollama is left to look for one it knows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_llama.conversion.gguf.scan import scan
from lit_llama.errors import UserError
from lit_llama.folder.place import aside
from lit_llama.progress import stderr
from lit_llama.text.prompts.encode import style_of
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.prompts.template import JinjaStyle

_BOS, _USER, _ANSWER, _AGAIN, _SYSTEM = (chr(0xE000 + index) for index in range(5))  # no style writes these
_ENDS = ("eos", "eot", "eom")


def modelfile_of(path: Path) -> Path:
    """Return the name of the Modelfile of a GGUF file."""
    return path.with_suffix(".Modelfile")


def check_modelfile(path: Path) -> None:
    """Refuse to write over a Modelfile that is there already."""
    if modelfile_of(path).exists():
        raise UserError(f"{modelfile_of(path)} already exists; name another file or remove this one")


def write_modelfile(path: Path) -> None:
    """Write the Modelfile of a GGUF file beside it, and say on stderr what to do with it."""
    metadata, made = scan(path).metadata, modelfile_of(path)
    with aside(made) as part:
        part.write_text(modelfile(path.name, metadata), "utf-8")
    stderr().print(f"{made}: ollama create {path.stem} -f {made}")


def modelfile(name: str, metadata: dict[str, Any]) -> str:
    """Return the contents of a Modelfile.

    Args:
        name: Of the GGUF file, which lies beside it.
        metadata: Of that file.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    ids = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    ends = [tokens[index] for index in ids if index is not None]
    template = metadata.get("tokenizer.chat_template")
    style = style_of(template) if template else None
    lines = [f"FROM ./{name}"]
    translated = go_template(style, ends[0]) if style is not None else None
    if translated is not None and style is not None:
        lines += [*_limits(style), f'TEMPLATE """{translated}"""']
        ends += style.tokens
    else:
        why = "the file has none" if style is None else "that of the file is not one of the built-in styles"
        lines.append(f"# No TEMPLATE: {why}. Ollama looks for one it knows, see `ollama show --template`.")
    lines += [f'PARAMETER stop "{token}"' for token in dict.fromkeys(ends)]
    return "\n".join(lines) + "\n"


def go_template(style: PromptStyle, eos: str) -> str | None:
    """Return the template of Ollama that renders conversations as a style does; None if it cannot.

    What stands around the words is taken from conversations that the style renders. The token that begins a text is
    left to Ollama, as GGUF says whether there is one, so it may stand nowhere else.

    Args:
        style: The style.
        eos: Spelling of the token that ends a text.
    """
    if isinstance(style, JinjaStyle):
        return None
    say = _renderer(style, eos)
    opening, user_tail = say(_USER).split(_USER)
    answered = say(_USER, _ANSWER, _AGAIN).split(_USER)[1]
    lead, rest = answered.removeprefix(user_tail).split(_ANSWER)
    again = rest.removesuffix(user_tail).removesuffix(_AGAIN)
    answer_tail = say(_USER, _ANSWER).split(_ANSWER)[1]
    again = again.removeprefix(answer_tail)
    prompt = say(_USER, prompt=True).split(_USER)[1].removeprefix(user_tail)
    first = opening.removeprefix(_BOS)
    if (system := _system(say)) is not None:
        before, after = system
        first = "{{ if $.System }}" + before + "{{ $.System }}" + after + "{{ else }}" + first + "{{ end }}"
    made = (
        '{{ $first := true }}{{ range .Messages }}{{ if eq .Role "user" }}{{ if $first }}' + first
        + "{{ $first = false }}{{ else }}" + again + "{{ end }}{{ .Content }}" + user_tail
        + '{{ else if eq .Role "assistant" }}' + lead + "{{ .Content }}" + answer_tail
        + "{{ end }}{{ end }}" + prompt
    )  # fmt: skip
    return None if _BOS in made else made


def _renderer(style: PromptStyle, eos: str) -> Callable[..., str]:
    roles = {_USER: "user", _AGAIN: "user", _ANSWER: "assistant", _SYSTEM: "system"}

    def say(*contents: str, prompt: bool = False) -> str:
        messages = [{"role": roles[content.strip()], "content": content} for content in contents]
        return "".join(segment.text for segment in style.render(messages, bos=_BOS, eos=eos, answer=prompt))

    return say


def _system(say: Callable[..., str]) -> tuple[str, str] | None:
    """What stands before a system message, and between it and the first user's words."""
    try:
        before, rest = say(_SYSTEM, _USER).split(_SYSTEM)
    except UserError:
        return None
    return before.removeprefix(_BOS), rest.split(_USER)[0]


def _limits(style: PromptStyle) -> list[str]:
    """What a template of Ollama does otherwise, as comments."""
    say = _renderer(style, "")
    limits = [f"# The prompt style {style.name}, translated."]
    if _system(say) is None:
        limits.append("# It has no system message: SYSTEM and messages of that role are left out.")
    if say(f" {_USER} ") == say(_USER):
        limits.append("# Blanks around a message are kept, where the style takes them off.")
    if style.name == "alpaca":
        limits.append("# A message with a part `### Input:` is introduced as one without.")
    return limits
