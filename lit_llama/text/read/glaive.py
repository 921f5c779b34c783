"""Chats of Glaive's function calling data: one text with USER and ASSISTANT, and functions in the system text.

A system text that introduces functions becomes the functions and what it says before them; calls, which have their
arguments as JSON text between single quotes, become calls as every other form has them.
"""

import re
from typing import Any

from lit_llama.text.read.messages import Turns, Words
from lit_llama.text.read.raw import STRICTEST, RowError
from lit_llama.text.read.tools import read_calls, read_tools

GLAIVE = re.compile(r"\s*USER: ")
"""Begins such a chat."""
_TURN = re.compile(r"(?:\A|\n\s*\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE): ?")
_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_END, _CALL = "<|endoftext|>", "<functioncall>"
_SYSTEM = re.compile(r"\A\s*SYSTEM: ?")
_OFFER = re.compile(r"(?P<who>.*?),? with access to the following functions\b[^{]*(?=\{)", re.DOTALL)
_CALLED = re.compile(
    r'\{\s*"name"\s*:\s*"(?P<name>[^"]*)"\s*(?:,\s*"arguments"\s*:\s*(?P<arguments>.*?)\s*)?\}\Z', re.DOTALL
)


def glaive_turns(system: str, chat: str) -> Turns:
    """Read the messages and tools of a row.

    Raises:
        RowError: A function or a call is none.
    """
    turns = _system(_SYSTEM.sub("", system).strip())
    parts = _TURN.split(chat)
    for index, (who, said) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        text = said.strip().removesuffix(_END).strip()
        turns.messages.append(_message(_ROLES[who], text, f"chat[{index}]"))
    return turns


def _system(text: str) -> Turns:
    """The system message, and the functions behind it."""
    if not (offer := _OFFER.match(text)):
        return Turns([{"role": "system", "content": text}] if text else [])
    tools: list[Any] = []
    position = offer.end()
    while position < len(text):
        try:
            found, position = STRICTEST.raw_decode(text, position)
        except ValueError as error:
            raise RowError("field system holds a function that is not JSON", hint=str(error)) from error
        tools += read_tools(found, "system")
        position += len(text[position:]) - len(text[position:].lstrip(" \n\r\t,"))
    return Turns([{"role": "system", "content": offer["who"].strip() + "."}], tools)


def _message(role: str, text: str, at: str) -> Words:
    """A message; an answer with a call in it has what stands before that as its content."""
    before, mark, behind = text.partition(_CALL)
    if role != "assistant" or not mark:
        return {"role": role, "content": text}
    behind = behind.strip().removesuffix(_END).strip()
    if not (called := _CALLED.match(behind)):
        raise RowError("a call is no object with a name and arguments", at, f"found {behind[:60]!r}")
    arguments = called["arguments"] or "{}"
    if len(arguments) > 1 and arguments[0] == arguments[-1] == "'":
        arguments = arguments[1:-1].replace("\\'", "'")
    call = {"name": called["name"], "arguments": arguments}
    return {"role": role, "content": before.strip(), "tool_calls": read_calls(call, "chat", at)}
