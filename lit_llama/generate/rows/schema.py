"""JSON answers held against their schema, by the library that also keeps a model to it."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from lit_llama.generate.engine.constraint import Constraint, TokenTable
from lit_llama.text.read.raw import STRICTEST, explain

_END = 256


class Validator:
    """A JSON schema.

    Args:
        schema: It.

    Raises:
        UserError: It is faulty, nothing satisfies it, or it has parts that a model could not be kept to.
        ResourceError: llguidance is not installed.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.schema = schema
        self._constraint = Constraint.json_schema(schema, _bytes())

    def read(self, text: str) -> tuple[Any, str]:
        """The value of an answer, and why it is none; "" if it is one.

        The order in which an object has its properties is that of the schema: endpoints are free in it.
        """
        try:
            value = STRICTEST.decode(text.strip())
        except (ValueError, RecursionError) as error:
            return None, f"no JSON: {explain(error)}"
        value = _ordered(value, self.schema)
        matcher = self._constraint.matcher()
        for position, byte in enumerate(data := json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")):
            if not matcher.accept(byte):
                found = data[max(0, position - 20) : position + 20].decode("utf-8", "replace")
                return None, f"not of the schema near {found!r}"
        return (value, "") if matcher.accept(_END) else (None, "not of the schema at its end")


@cache
def _bytes() -> TokenTable:
    """A vocabulary of single bytes and an end."""
    tokens = [bytes([byte]) for byte in range(256)]
    return TokenTable([*tokens, b"<end>"], [_END], {_END}, lambda text: list(text.encode()))


def _ordered(value: Any, schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, list):
        return [_ordered(entry, schema.get("items")) for entry in value]
    properties = schema.get("properties")
    if not isinstance(value, dict) or not isinstance(properties, Mapping):
        return value
    names = [*(name for name in properties if name in value), *(name for name in value if name not in properties)]
    return {name: _ordered(value[name], properties.get(name)) for name in names}
