"""Regular expressions of foreign files, such as those in an adapter's settings.

All of them are compiled and matched here, so that what bounds them stands in one place.
"""

import re


def check_pattern(pattern: str) -> None:
    """Raise ValueError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def matches_whole(pattern: str, text: str) -> bool:
    """Whether a regular expression describes all of `text`."""
    return re.fullmatch(pattern, text) is not None


def matches_start(pattern: str, text: str) -> bool:
    """Whether `text` begins with what a regular expression describes."""
    return re.match(pattern, text) is not None
