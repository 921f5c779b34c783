"""Places of a piece of text in what is encoded: some tokenizers begin a text, or each piece of it, with a blank.

A rendered conversation is encoded piece by piece, between control tokens and at the border of prompt and answer. Other
programs encode it as one text, in which a tokenizer puts its blank before the first word only, or before what follows
each added token, but never into the middle of a text.
"""

import re
from collections.abc import Collection, Mapping
from enum import IntEnum
from functools import lru_cache
from typing import Any

_LISTS = ("normalizers", "pretokenizers")
BLANKS = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
"""White space as Unicode has it, within the brackets of a regular expression: what an added token may take away."""
LEADING, TRAILING = re.compile(f"[{BLANKS}]*"), re.compile(f"[{BLANKS}]*\\Z")


class Place(IntEnum):
    """Place of a piece of text."""

    START = 0
    """At the beginning of the text."""
    AFTER = 1
    """Behind an added token."""
    MORE = 2
    """Behind other text, which it goes on with."""


def at_place(raw: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return a tokenizer.json that encodes a piece at a place as the whole text would be encoded there."""
    steps = ("normalizer", "pre_tokenizer")
    return {**raw, **{name: _step(raw.get(name), place) for name in steps}}


def _step(step: Any, place: Place) -> Any:
    """A normalizer or pre-tokenizer, None if nothing is left of it."""
    if not isinstance(step, Mapping) or place == Place.START:
        return step
    for name in _LISTS:
        if isinstance(step.get(name), list):
            left = [found for each in step[name] if (found := _step(each, place)) is not None]
            return {**step, name: left} if left else None
    kind, more = step.get("type"), place == Place.MORE
    if kind == "Metaspace" and (more or step.get("prepend_scheme") == "first"):
        plain = {key: value for key, value in step.items() if key != "add_prefix_space"}
        return plain | {"prepend_scheme": "never"}
    if kind == "Prepend" and more:
        return None
    if kind == "ByteLevel" and more:
        return {**step, "add_prefix_space": False}
    return {**step, "strip_left": False} if kind == "Strip" and more and "strip_left" in step else step


def any_of(spellings: Collection[str]) -> re.Pattern[str]:
    """Return a pattern of one group: the longest of the spellings at the first place where there is one."""
    return _any_of(tuple(spellings))


@lru_cache(64)  # of the same few tokenizers for every row
def _any_of(spellings: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(spellings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")
