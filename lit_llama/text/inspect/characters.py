"""Characters of many texts: their scripts, and traces of a wrong encoding.

One table holds a class for every code point, so that a batch of texts is looked up at once.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_BLOCKS = {
    "Latin": "0041-005A 0061-007A 00AA 00BA 00C0-02B8 1D00-1D25 1D62-1D65 1D6B-1D77 1D79-1D9A 1E00-1EFF 2090-209C 2184 "
    "2C60-2C7F A722-A7FF AB30-AB64 AB66-AB68 FB00-FB06 FF21-FF5A",
    "Greek": "0370-0374 0376-03E1 03F0-03FF 1D26-1D2A 1D66-1D6A 1F00-1FFF AB65",
    "Cyrillic": "0400-052F 1C80-1C8F 1D2B 2DE0-2DFF A640-A69F",
    "Armenian": "0531-058A FB13-FB17",
    "Hebrew": "0591-05F4 FB1D-FB4F",
    "Arabic": "0600-06FF 0750-077F 0870-08FF FB50-FDFF FE70-FEFC",
    "Devanagari": "0900-097F A8E0-A8FF",
    "Bengali": "0980-09FF",
    "Gurmukhi": "0A00-0A7F",
    "Gujarati": "0A80-0AFF",
    "Oriya": "0B00-0B7F",
    "Tamil": "0B80-0BFF",
    "Telugu": "0C00-0C7F",
    "Kannada": "0C80-0CFF",
    "Malayalam": "0D00-0D7F",
    "Sinhala": "0D80-0DFF",
    "Thai": "0E00-0E7F",
    "Lao": "0E80-0EFF",
    "Tibetan": "0F00-0FFF",
    "Myanmar": "1000-109F A9E0-A9FF AA60-AA7F",
    "Georgian": "10A0-10FF 1C90-1CBF 2D00-2D2F",
    "Hangul": "1100-11FF 3131-318E A960-A97F AC00-D7FF FFA1-FFDC",
    "Ethiopic": "1200-139F 2D80-2DDF AB01-AB2F",
    "Khmer": "1780-17FF",
    "Mongolian": "1820-18AA",
    "Hiragana": "3041-309F",
    "Katakana": "30A1-30FA 30FC-30FF 31F0-31FF FF66-FF9D",
    "Han": "3005-3007 3400-4DBF 4E00-9FFF F900-FAD9 20000-323AF",
}
"""Unicode blocks by script; only the letters in them count."""

_TROUBLE = {
    "NUL": "0000",
    "control character": "0001-0008 000B-000C 000E-001F 007F-009F",
    "replacement character": "FFFD",
    "byte order mark": "FEFF",
    "zero-width character": "200B 2060-2064",  # U+200C and U+200D are letters' business in Persian, Hindi and emoji
    "lone surrogate": "D800-DFFF",
    "private use": "E000-F8FF F0000-FFFFD 100000-10FFFD",
}

SCRIPTS = (*_BLOCKS, "other")
TROUBLE = (*_TROUBLE, "mojibake")
_CLASSES = 1 + len(SCRIPTS) + len(_TROUBLE)  # class 0 is everything else: digits, marks, spaces

_HIGH = "".join(sorted({chr(c) for c in range(0x80, 0xC0)} | set(bytes(range(0x80, 0xC0)).decode("cp1252", "ignore"))))
_MOJIBAKE = re.compile(
    # UTF-8 read as Windows-1252 or Latin-1: accented letters, punctuation, Greek and Cyrillic, emoji, East Asian, BOM
    f"[ÂÃ][{_HIGH}]|â[€„†‚ˆ][{_HIGH}]|(?:[ÎÏÐÑ][{_HIGH}]){{2,}}|ðŸ[{_HIGH}]{{2}}|(?:[ã-í][{_HIGH}]{{2}}){{2,}}|ï»¿|ï¿½"
)

_SUSPECT = re.compile("[ÂÃâÎÏÐÑðã-íï]")  # what all of these begin with; most texts are done with this


@functools.cache
def _table() -> npt.NDArray[np.uint8]:
    table = np.zeros(0x110000, np.uint8)
    other = [code for code in range(0x80, 0x20000) if chr(code).isalpha()]
    table[other] = len(SCRIPTS)
    for number, ranges in enumerate(_BLOCKS.values(), 1):
        for start, end in _ranges(ranges):
            table[[code for code in range(start, end) if chr(code).isalpha()]] = number
    for number, ranges in enumerate(_TROUBLE.values(), 1 + len(SCRIPTS)):
        for start, end in _ranges(ranges):
            table[start:end] = number
    return table


def _ranges(text: str) -> list[tuple[int, int]]:
    """Start and end, exclusive, of each range."""
    pairs = [part.partition("-") for part in text.split()]
    return [(int(start, 16), int(end or start, 16) + 1) for start, _, end in pairs]


def code_points(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """Return all characters of the texts, one after the other."""
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)


def count_characters(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Count letters by script, and what is wrong.

    Returns:
        (texts, SCRIPTS) number of letters, and (texts, TROUBLE) whether there is any.
    """
    classes = _table()[code_points(texts)]
    text_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    counts = np.bincount(text_of * _CLASSES + classes, minlength=len(texts) * _CLASSES).reshape(len(texts), _CLASSES)
    letters, trouble = counts[:, 1 : 1 + len(SCRIPTS)], counts[:, 1 + len(SCRIPTS) :] > 0
    mojibake = [bool(not text.isascii() and _SUSPECT.search(text) and _MOJIBAKE.search(text)) for text in texts]
    return letters, np.column_stack([trouble, mojibake])
