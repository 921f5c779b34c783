"""What a user may have meant by the name of a field."""

import difflib
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lit_llama.text.read.raw import listed, missing

_MEANT = {
    "instruction": ("question", "query", "problem", "prompt", "user", "request", "input", "source", "human"),
    "output": ("answer", "response", "completion", "solution", "reply", "target", "chosen", "assistant", "label"),
    "completion": ("chosen",),
    "messages": ("chat", "dialog", "dialogue", "turns"),
    "text": ("content", "body", "document", "article", "passage"),
    "input": (
        *("context", "choices", "options", "passage", "background", "document", "article", "evidence", "paragraph"),
        *("reference", "references", "documents", "schema", "code", "sentence"),
    ),
    "system": ("system_prompt", "system_message", "system_instruction", "persona"),
    "reasoning_content": ("reasoning", "thinking", "thought", "thoughts", "cot", "complex_cot", "chain_of_thought"),
    "tools": ("functions", "available_tools"),
}


def suggest(
    row: Mapping[str, Any], schemas: Iterable[tuple[str, ...]], beside: Mapping[tuple[str, ...], Sequence[str]]
) -> str:
    """The `--fields` that make one of the schemas fit, and what is odd about a name; "" if nothing is close.

    Of several schemas it is the one that uses most fields.

    Args:
        row: That fits none.
        schemas: Fields that the rows of each have.
        beside: Fields that they may have.
    """
    found = [placed for keys in schemas if (placed := _placed(list(row), keys, beside[keys]))]
    if not found:
        return ""
    pairs = max(found, key=len)  # the first of those that are as good
    given = {key: name for key, name in pairs.items() if key != name}
    odd = "".join(_odd(key, name) for key, name in given.items())
    names = ",".join(f"{key}={listed([name])}" for key, name in given.items())
    names = shlex.quote(names) if _FOR_A_SHELL.search(names) else names
    as_text = any(
        not isinstance(row[name], str) and not missing(row[name]) for key, name in pairs.items() if key not in _LISTS
    )
    return f"{odd}; try --fields {names}{' --as_text true' if as_text else ''}"


_FOR_A_SHELL = re.compile(r"[^\w=,.:/+-]")
_LISTS = ("messages", "conversations", "tools", "history")


def _placed(found: Sequence[str], keys: Sequence[str], beside: Sequence[str]) -> dict[str, str]:
    """A place for as many fields as have one; nothing if a key of the schema would have none."""
    pairs = {key: key for key in keys if key in found}
    for key in (*keys, *(key for key in _MEANT if key in beside)):
        if key in found and key in (*keys, *beside):
            pairs[key] = key
        elif name := _closest(key, [name for name in found if name not in pairs.values() and name not in keys]):
            pairs[key] = name
        elif key in keys:
            return {}
    return pairs


def _closest(key: str, names: Sequence[str]) -> str | None:
    for name in names:
        if _plain(name) == key or _looks_like(name, key):
            return name
    if close := difflib.get_close_matches(key, names, 1, 0.8):
        return close[0]
    return next((name for meant in _MEANT.get(key, ()) for name in names if _plain(name) == meant), None)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().strip("\ufeff").lower()


def _looks_like(name: str, key: str) -> bool:
    """Equal but for letters of other alphabets, as in Cyrillic о for Latin o."""
    return len(name) == len(key) and all(a == b or not a.isascii() for a, b in zip(name, key, strict=True))


def _odd(key: str, name: str) -> str:
    strange = [letter for letter in name if not letter.isascii()] if _looks_like(name, key) else []
    if not strange:
        return ""
    code = f"U+{ord(strange[0]):04X} {unicodedata.name(strange[0], '')}".strip()
    return f"; a field only looks like {key}: it holds {code}"
