"""Constraint of an answer: JSON of a schema, a regular expression, one of some texts, or a grammar.

llguidance (MIT) says after each token which may follow. What it cannot keep to, a keyword of a schema, say, it refuses
beforehand. It is an extra, imported where a constraint is made.

Shapes: V vocabulary.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_llama.errors import ResourceError, UserError

MAX_GRAMMAR = 1 << 20
"""Characters of a schema or grammar, at most."""
_BLANKS = r"[ ]{0,2}|\r?\n[ \t]{0,32}"
"""White space at one place in JSON: models that may write more of it are known never to stop."""


class TokenTable:
    """The bytes of every token, as constraints read them; made once for a tokenizer.

    Args:
        tokens: Bytes of each id; of control tokens, their name.
        controls: Ids that stand for no text.
        ends: Ids that end an answer.
        encode: Ids of a text, without beginning and end.

    Raises:
        ResourceError: llguidance is not installed.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        controls: Collection[int],
        ends: Collection[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        library = _library()

        class Described:
            eos_token_id, bos_token_id = min(ends), None
            special_token_ids = sorted({*controls, *ends})

            def __call__(self, text: str | bytes) -> list[int]:
                return encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))

        Described.tokens = list(tokens)  # type: ignore[attr-defined]
        wrapper = library.TokenizerWrapper(Described())
        self.ends = frozenset(ends)
        self.table = library.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=sorted(ends))


class Constraint:
    """A grammar, compiled for a tokenizer.

    Args:
        grammar: As llguidance has it; see the class methods.
        tokens: Of the tokenizer.
        what: It is called in errors.

    Raises:
        UserError: It is faulty, or has parts that could not be kept to.
    """

    def __init__(self, grammar: str, tokens: TokenTable, what: str) -> None:
        if len(grammar) > MAX_GRAMMAR:
            raise UserError(f"the {what} has {len(grammar):,} characters, expected at most {MAX_GRAMMAR:,}")
        self._ends = tokens.ends
        self._matcher = _library().LLMatcher(tokens.table, grammar, log_level=0)
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines()
            raise UserError(f"the {what} cannot be kept to: {' '.join(line.strip() for line in reason[:5])[:300]}")

    @classmethod
    def of(
        cls,
        tokens: Callable[[], TokenTable],
        *,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
    ) -> "Constraint":
        """Return one of the constraints below.

        Args:
            tokens: Gives those of the tokenizer.
            json_schema: JSON that this schema describes; the empty schema is any JSON.
            regex: Text that this regular expression matches as a whole.
            choice: One of these texts.
            grammar: Text of this grammar, in llguidance's variant of Lark.

        Raises:
            UserError: It is faulty, has parts that could not be kept to, or not exactly one of the four is given.
            ResourceError: llguidance is not installed.
        """
        makers: dict[str, tuple[Any, Callable[[Any, TokenTable], Constraint]]] = {
            "json_schema": (json_schema, cls.json_schema),
            "regex": (regex, cls.regex),
            "choice": (choice, cls.choice),
            "grammar": (grammar, cls.lark),
        }
        given = [(value, make) for value, make in makers.values() if value is not None]
        if len(given) != 1:
            raise UserError(f"a constraint is one of {', '.join(makers)}, found {len(given)} of them")
        value, make = given[0]
        return make(value, tokens())

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str, tokens: TokenTable) -> "Constraint":
        """Constrain to JSON that a schema describes; the empty schema is any JSON. White space is at most a line end
        and an indent.

        Raises:
            UserError: The schema is no JSON, or has parts that could not be kept to.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(dict(schema))
            if len(text) > MAX_GRAMMAR:
                raise UserError(f"the JSON schema has {len(text):,} characters, expected at most {MAX_GRAMMAR:,}")
            grammar = _library().LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": _BLANKS})
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the JSON schema is faulty: {error}") from error
        return cls(grammar, tokens, "JSON schema")

    @classmethod
    def regex(cls, pattern: str, tokens: TokenTable) -> "Constraint":
        """Constrain to text that a regular expression matches as a whole; it has no look-around and no references.

        Raises:
            UserError: It is faulty.
        """
        return cls(_library().LLMatcher.grammar_from_regex(pattern), tokens, "regular expression")

    @classmethod
    def choice(cls, texts: Sequence[str], tokens: TokenTable) -> "Constraint":
        """Constrain to one of some texts.

        Raises:
            UserError: There are none, or one is empty.
        """
        if not texts or not all(texts):
            raise UserError("a choice needs texts, none of them empty")
        grammar = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return cls(_library().LLMatcher.grammar_from_lark(grammar), tokens, "choice")

    @classmethod
    def lark(cls, grammar: str, tokens: TokenTable) -> "Constraint":
        """Constrain to text of a grammar in llguidance's variant of Lark.

        Raises:
            UserError: It is faulty.
        """
        return cls(_library().LLMatcher.grammar_from_lark(grammar), tokens, "grammar")

    def matcher(self) -> "GrammarMatcher":
        """Return the state at the beginning of an answer."""
        return GrammarMatcher(self._matcher.deep_copy(), self._ends)


class GrammarMatcher:
    """Progress of an answer in its grammar, see engine.Matcher."""

    def __init__(self, matcher: Any, ends: Collection[int]) -> None:
        self._matcher, self._ends = matcher, ends
        self._consumed: list[bool] = []  # of each id; the end of what is complete is not

    def allow(self, row: Tensor) -> None:
        """Write into (V,) of booleans which ids may follow."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()[: len(row)]
        row[: len(allowed)] = allowed
        row[len(allowed) :] = False

    def accept(self, token: int) -> bool:
        """Go on by an id; False, and no change, if it may not follow."""
        complete = self._matcher.is_stopped() and token in self._ends
        consumed = not complete and self._matcher.try_consume_tokens([token]) == 1
        if complete or consumed:
            self._consumed.append(consumed)
        return complete or consumed

    def rollback(self, count: int) -> None:
        """Take the last ids back."""
        if count:
            self._matcher.rollback(sum(self._consumed[-count:]))
            del self._consumed[-count:]

    def forced(self) -> list[int]:
        """Return the ids that have to follow, none where there is a choice."""
        return list(self._matcher.compute_ff_tokens())


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ResourceError("llguidance is needed for constraints: pip install 'lit_llama[constraints]'") from error
    return llguidance
