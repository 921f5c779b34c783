"""What a user may have meant by the name of a field."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence

from lit_llama.text.read.raw import listed

_MEANT = {
    "instruction": ("question", "query", "problem", "prompt", "user", "request", "input", "source", "human"),
    "output": ("answer", "response", "completion", "solution", "reply", "target", "chosen", "assistant", "label"),
    "completion": ("chosen",),
    "messages": ("chat", "dialog", "dialogue", "turns"),
    "text": ("content", "body", "document", "article", "passage"),
}


def suggest(found: Sequence[str], schemas: Iterable[Sequence[str]]) -> str:
    """The `--fields` that would make one of the schemas fit, and what is odd about a name; "" if nothing is close."""
    for keys in schemas:
        free = [name for name in found if name not in keys]
        pairs: dict[str, str] = {}
        for key in keys:
            if key not in found and (name := _closest(key, [name for name in free if name not in pairs.values()])):
                pairs[key] = name
        if all(key in found or key in pairs for key in keys):
            odd = "".join(_odd(key, name) for key, name in pairs.items())
            return f"{odd}; try --fields {','.join(f'{key}={listed([name])}' for key, name in pairs.items())}"
    return ""


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
