"""JSON of a request: every field is read with its kind and range, and one that nobody reads is refused by its name.

Refusals are as OpenAI's API has them: a status, and a body that names the field.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

_KINDS = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("timeout_error", "timeout"),
}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: What was found against what is expected.
        param: The field, as in `messages[2].content`.
        code: A word for programs; None for the usual one of the status.
        headers: Of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind, usual = _KINDS.get(status, ("invalid_request_error", None))
        self.status, self.headers = status, dict(headers or {})
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code or usual},
        }


def refusal(param: str, message: str, code: str | None = None) -> ApiError:
    """Return the error for a field that is wrong."""
    return ApiError(400, f"{param}: {message}" if param else message, param or None, code)


_DEEPEST = 100
_SHOWN = 60


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse the object that a body holds; there are no two fields of a name, and no NaN or infinity.

    Raises:
        ApiError: It is something else.
    """
    try:
        value = json.loads(body, parse_constant=_not_json, object_pairs_hook=once, parse_float=_finite)
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        why = str(error).split("; use sys.")[0]  # Python's limit on digits
        raise ApiError(400, f"the body is not JSON: {why[:200]}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {kind(value)}, expected a JSON object", code="invalid_json")
    _check_depth(value)
    return value


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object whose fields have each a name of their own.

    Raises:
        ValueError: Two have one name.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"field {twice[:_SHOWN]!r} stands twice in an object")
    return found


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ApiError(400, f"the body is nested deeper than {_DEEPEST} levels", code="invalid_json")
        inner = (v for part in level for v in (part.values() if isinstance(part, dict) else part))
        level = [v for v in inner if isinstance(v, dict | list)]


def kind(value: Any) -> str:
    """Name the kind of a JSON value, for people."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value)) or f"the number {str(value)[:_SHOWN]}"


class Fields:
    """An object of a request, whose fields are taken one by one; null is as good as left out.

    Args:
        value: The object.
        at: Where it stands, "" for the body.

    Raises:
        ApiError: It is no object.
    """

    def __init__(self, value: Any, at: str = "") -> None:
        if not isinstance(value, dict):
            raise refusal(at, f"is {kind(value)}, expected an object")
        self._left = {name: inner for name, inner in value.items() if inner is not None}
        self._nulls = set(value) - set(self._left)
        self._at = at

    def name(self, name: str) -> str:
        """Return the name of a field with its place."""
        return f"{self._at}.{name}" if self._at else name

    def any(self, name: str) -> Any:
        """Read a value of any kind; None where there is none."""
        self._nulls.discard(name)
        return self._left.pop(name, None)

    def _typed(self, name: str, types: type | tuple[type, ...], expected: str) -> Any:
        value = self.any(name)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and types is not bool)):
            raise refusal(self.name(name), f"is {kind(value)}, expected {expected}")
        return value

    def text(self, name: str) -> str | None:
        """Read a text."""
        value: str | None = self._typed(name, str, "text")
        return None if value is None else check_text(value, self.name(name))

    def choice(self, name: str, among: Sequence[str], default: str) -> str:
        """Read one of some words."""
        value = self.text(name)
        if value is not None and value not in among:
            raise refusal(self.name(name), f"is {value[:_SHOWN]!r}, expected one of {', '.join(among)}")
        return default if value is None else value

    def flag(self, name: str, default: bool = False) -> bool:
        """Read a field that is true or false."""
        value: bool | None = self._typed(name, bool, "true or false")
        return default if value is None else value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """Read a whole number of a range."""
        value = self._typed(name, (int, float), f"a whole number from {low} to {high}")
        if isinstance(value, float) and not value.is_integer():
            raise refusal(self.name(name), f"is {value}, expected a whole number from {low} to {high}")
        return self._within(name, None if value is None else int(value), low, high)

    def real(self, name: str, low: float, high: float) -> float | None:
        """Read a number of a range."""
        value = self._typed(name, (int, float), f"a number from {low:g} to {high:g}")
        return self._within(name, value, low, high)

    def _within(self, name: str, value: Any, low: float, high: float) -> Any:
        if value is not None and not low <= value <= high:
            raise refusal(self.name(name), f"is {str(value)[:_SHOWN]}, expected {low:g} to {high:g}")
        return value

    def texts(self, name: str, most: int, longest: int) -> list[str]:
        """Read a text, or a list of them; none is empty."""
        value = self._typed(name, (str, list), "text or a list of texts")
        found = [] if value is None else [value] if isinstance(value, str) else value
        if len(found) > most:
            raise refusal(self.name(name), f"holds {len(found)} texts, expected at most {most}")
        for text in found:
            if not isinstance(text, str) or not 0 < len(text) <= longest:
                shown = repr(text[:_SHOWN]) if isinstance(text, str) else kind(text)
                raise refusal(self.name(name), f"holds {shown}, expected texts of 1 to {longest} characters")
            check_text(text, self.name(name))
        return list(found)

    def list(self, name: str) -> "list[Any] | None":
        """Read a list of anything."""
        value: list[Any] | None = self._typed(name, list, "a list")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        """Read an object of anything."""
        value: dict[str, Any] | None = self._typed(name, dict, "an object")
        return value

    def inner(self, name: str) -> "Fields | None":
        """Read an object of which all fields are to be read."""
        value = self.any(name)
        return None if value is None else Fields(value, self.name(name))

    def only(self, name: str, *values: Any, why: str) -> None:
        """Check a field of which only some values, that change nothing, are taken."""
        value = self.any(name)
        if value is not None and not any(value == only and type(value) is type(only) for only in values):
            shown = json.dumps(value)[:_SHOWN]
            raise refusal(self.name(name), f"{shown} is not supported: {why}", "unsupported_value")

    def ignore(self, *names: str) -> None:
        """Ignore fields that say nothing of the answer."""
        for name in names:
            self.any(name)

    def end(self) -> None:
        """Refuse what was not read."""
        if left := sorted([*self._left, *self._nulls]):
            raise refusal(self.name(left[0][:_SHOWN]), "is not a field that is known here", "unknown_field")


def check_text(text: str, param: str) -> str:
    """Check that a text has no lone surrogates, which no encoding has, and return it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refusal(param, "holds a lone surrogate, which is no character") from error
    return text


def token_ids(value: Sequence[Any], param: str, size: int) -> list[int]:
    """Read the ids of a tokenizer of `size` tokens."""
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
            shown = kind(token) if not isinstance(token, int) else str(token)[:_SHOWN]
            raise refusal(param, f"holds {shown}, expected token ids from 0 to {size - 1}")
    return list(value)


def biases(value: Mapping[str, Any], param: str, size: int) -> dict[int, float]:
    """Read the biases that are added to the logits of ids."""
    found = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit()) or len(name) > 9 or int(name) >= size:
            raise refusal(param, f"names {name[:_SHOWN]!r}, expected token ids from 0 to {size - 1}")
        if not isinstance(bias, int | float) or isinstance(bias, bool) or not -100 <= bias <= 100:
            raise refusal(param, f"{name} is {kind(bias)}, expected a number from -100 to 100")
        found[int(name)] = float(bias)
    return found
