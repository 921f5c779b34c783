"""Fields of raw rows: each is used, known to say nothing to a model, counted, or an error."""

import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from lit_llama.text.config import Tree
from lit_llama.text.read.raw import RowError, check_text, kind, listed, missing
from lit_llama.wording import param, params

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
    """Suggest the `fields` that make one of the schemas fit, and what is odd about a name; "" if nothing is close.

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
    settings: dict[str, object] = {"fields": {key: listed([name]) for key, name in given.items()}}
    if any(
        not isinstance(row[name], str) and not missing(row[name]) for key, name in pairs.items() if key not in _LISTS
    ):
        settings["as_text"] = True
    return f"{odd}; try {params(**settings)}"


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


Row = Mapping[str, Any]

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought")
TOOLS = ("tools", "functions")
INPUTS = ("input", "context")
YES, NO = (1, "1", "1.0", "true"), (0, "0", "0.0", "false")  # true and false are numbers in Python
_UNWANTED = ("label", "kto_tag")  # a false one marks an answer that is not wanted (KTO)

_MEDIA = {"image", "images", "video", "videos", "audio", "audios"}
_PLACED = {*SYSTEM, *THOUGHTS, *INPUTS}  # by --fields
_PREFERENCES = {"chosen", "rejected"}
_LOSS = {"train", "loss_mask", "weight", "weights", "loss_weight", "sample_weight", "train_detail", "training_detail"}
_CONTENT = _MEDIA | _PREFERENCES | _PLACED | _LOSS | {*TOOLS, "history", "documents", "chat_template_kwargs"}
_CONTENT |= {"reasoning_details", "systeminstruction"}
"""What a model would have to see, or to learn, in small letters: left out only on request."""


def names_of(text: str) -> frozenset[str]:
    """Split a text into its words, as names of fields."""
    return frozenset(text.split())


_IDENTITY = names_of(
    "id idx index uid uuid guid hash source dataset dataset_name origin url link license date created created_at "
    "created_date create_time updated_at timestamp split version meta metadata __index_level_0__ num_tokens n_tokens "
    "token_count num_turns num_messages length parallel_tool_calls"
)
METADATA = names_of(
    "category subcategory task task_type task_name type domain topic topics tags keywords lang language author model "
    "model_name generator redacted toxic openai_moderation detoxify difficulty quality score rating score_chosen "
    "score_rejected"
)
_SPOKEN = METADATA | {"parent_id", "turn", "turn_id", "markdown", "cache_control", "annotations", "toxicity"}
_ENDING = re.compile(r"(?i)(?:_id|_uuid|_hash|_url)$|^unnamed: \d+$")  # the last is what pandas calls an index


class FieldLog:
    """Reader of the fields of rows, which counts what becomes of those that are not simply used.

    Args:
        tree: Of a tree of messages, the best replies or every branch.
        as_text: Numbers, objects and lists in place of a text become JSON text.
        ignored: Names of fields that are left out, of rows and of messages.

    Attributes:
        unused: Rows with a field of this name that nothing uses; those of messages are called messages[].NAME.
        written: Rows in which a field was no text and became one.
        left_out: Rows with a field that was to be left out.
    """

    def __init__(self, *, tree: Tree = "best", as_text: bool = False, ignored: Iterable[str] = ()) -> None:
        self.tree = tree
        self._as_text, self._ignored = as_text, dict.fromkeys(ignored, 0)
        self.unused: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter(self._ignored)
        self._row: set[tuple[int, str]] = set()

    def wanted(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row, or an object in it, without the fields that are to be left out."""
        if not self._ignored or self._ignored.keys().isdisjoint(row):
            return row
        for name in self._ignored.keys() & row.keys():
            self._count(self.left_out, name)
        return {name: value for name, value in row.items() if name not in self._ignored}

    def text(self, row: Mapping[str, Any], name: str, at: str = "") -> str:
        """Read a field that has to be text, or that becomes JSON text where that was asked for.

        Raises:
            RowError: It is neither.
        """
        value = row[name]
        if not isinstance(value, str):
            if missing(value) or isinstance(value, bytes) or not self._as_text:
                raise _no_text(name, value, at)
            value = _json_text(name, value, at)
            self._count(self.written, f"messages[].{name}" if at else name)
        check_text(value, name, at)
        return value

    def unused_in_message(self, message: Mapping[str, Any], used: frozenset[str], at: str) -> None:
        """Count what nothing uses in a message.

        Raises:
            RowError: It is what a model would have to see.
        """
        for name in message.keys() - used:
            if missing(message[name]) or message[name] in ("", [], {}) or says_nothing(name, _SPOKEN):
                continue
            if name.lower() in _CONTENT:
                raise RowError(f"a message has {name}, for which there is no place", at, _way_out(name))
            self.count_unused(f"messages[].{name}")

    def unused_in_row(self, row: Row, names: Iterable[str], schema: str, contents: Sequence[str], text: bool) -> None:
        """Count what nothing uses in a row, but for copies of what its messages say.

        Args:
            row: The row.
            names: Fields that its schema does not use, and that may say something.
            schema: Name of that.
            contents: Contents of its messages.
            text: The row is a text without a prompt.

        Raises:
            RowError: A field says what a model would have to see, or that the answer is not wanted.
        """
        for name in names:
            value = row[name]
            if missing(value) or (not value and value is not False and value != 0) or value == "[]":
                continue
            if name in _UNWANTED and isinstance(value, bool) and not text:
                if not value:
                    hint = f"see {param('data_kind', 'preference')} and {param('data_kind', 'sft-chosen')}"
                    raise RowError(f"field {name} is false: the answer is not wanted (KTO)", hint=hint)
                continue
            if isinstance(value, str) and _is_copy(value, contents):
                continue
            if name in _LOSS and value in YES:
                continue
            if name.lower() in _CONTENT:
                raise RowError(f"field {name} has no place in a row of the kind {schema}", hint=_way_out(name))
            self.count_unused(name)

    def count_unused(self, name: str) -> None:
        """Count a row with a field that nothing uses."""
        self._count(self.unused, name)

    def _count(self, counter: Counter[str], name: str) -> None:
        if (id(counter), name) not in self._row:
            self._row.add((id(counter), name))
            counter[name] += 1

    def meta(self) -> dict[str, dict[str, int]]:
        """Return the counts for meta.json: rows by the names of fields."""
        named = {"unused": self.unused, "written_as_text": self.written, "left_out": self.left_out}
        return {name: dict(counter.most_common()) for name, counter in named.items()}

    def begin_row(self) -> None:
        """Count fields anew, each once in a row."""
        if self._row:
            self._row.clear()


def _way_out(name: str) -> str:
    leave = f"leave it out with {param('ignore_fields', [name])}"
    known = name.lower()
    if known in _LOSS:
        return f"mark the messages themselves with train true or false, or {leave}"
    if known in _PREFERENCES:
        return f"preferences need chosen and rejected answers; {leave}"
    if known in _MEDIA:
        field = param("ignore_fields", [name])
        return f"leave such rows out with {param('on_error', 'skip')}, or the field with {field}"
    return (
        f"give it one with {param('fields')}, such as input={name} or system={name}, or {leave}"
        if known in _PLACED
        else leave
    )


def says_nothing(name: str, besides: Set[str]) -> bool:
    """Whether a field is known by its name to hold nothing for a model; `besides`, names that hold nothing either."""
    lower = name.lower()
    return not name or lower in _IDENTITY or lower in besides or bool(_ENDING.search(name))


def _is_copy(value: str, contents: Sequence[str]) -> bool:
    """Whether a text says what the messages say: one of them, or all of them in a prompt."""
    value = value.strip()
    spoken = [content.strip() for content in contents]
    return value in spoken or all(content in value for content in spoken)


def _no_text(name: str, value: Any, at: str) -> RowError:
    hint = f"{param('as_text')} makes it JSON text"
    if isinstance(value, bytes):
        hint = "write the column as text"
    elif missing(value):
        hint = ""
    return RowError(f"field {name} is {kind(value)}, expected text", at, hint)


def _json_text(name: str, value: Any, at: str) -> str:
    if isinstance(value, _PRINTED):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_printed)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"field {name} cannot be written as JSON", at, str(error)) from error


_PRINTED = (Decimal, date, time, timedelta)  # of Parquet


def _printed(value: Any) -> str:
    if isinstance(value, _PRINTED):
        return str(value)
    raise TypeError(f"it holds {kind(value)}")
