"""The bytes that each token adds to a text, which need not be whole characters."""

import re

from lit_llama.text.places import Place
from lit_llama.text.quick.byte_level import CHARACTERS
from lit_llama.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every id where it goes on with a text.

    Control tokens, the token for what is unknown, and ids that stand for nothing add none. The blank that
    sentencepiece encodes behind an added word, and leaves out of the text again, counts.
    """
    silent = {*tokenizer.control.values(), *([] if tokenizer.unknown is None else [tokenizer.unknown])}
    added = set(tokenizer.words.values())
    return [
        b"" if spelling is None or index in silent else _bytes(tokenizer, index, spelling, index in added)
        for index, spelling in enumerate(tokenizer.vocabulary)
    ]


def _bytes(tokenizer: Tokenizer, index: int, spelling: str, added: bool) -> bytes:
    text = tokenizer.decode([index], Place.MORE)
    if added or "\ufffd" not in text:
        return text.encode()
    # Part of a character: decoding alone cannot tell which.
    if found := _BYTE.fullmatch(spelling):
        return bytes([int(found[1], 16)])
    if set(spelling) <= _BYTES.keys():
        return bytes(_BYTES[character] for character in spelling)
    return text.encode()
