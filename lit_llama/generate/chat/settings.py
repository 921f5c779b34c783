"""Settings of a conversation out of words."""

import json
import types
from typing import Any, get_args, get_origin, get_type_hints

from lit_llama.errors import UserError
from lit_llama.generate.chat.session import SETTINGS
from lit_llama.generate.engine.request import Sampling


def parse_setting(name: str, text: str) -> Any:
    """The value of a setting as it is kept; None where there is no text.

    `stop` is a list in JSON, or one text.

    Raises:
        UserError: There is no such setting, or the text is none of its values.
    """
    if name not in SETTINGS:
        raise UserError(f"there is no setting {name!r}; there are: {', '.join(SETTINGS)}")
    if not text:
        return None
    kind = get_type_hints(Sampling)[name]
    if get_origin(kind) is types.UnionType:
        kind = get_args(kind)[0]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            expected = "an integer" if kind is int else "a number"
            raise UserError(f"{name} is {text!r}, expected {expected}") from error
    try:
        value = json.loads(text)
    except ValueError:
        return [text]
    return value if isinstance(value, list) else [text]
