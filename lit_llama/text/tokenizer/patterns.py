"""Regular expressions of foreign tokenizers, proven to end: how often the engine may go back in a text is counted.

Oniguruma, which `tokenizers` searches with, tries every way in which a part can match before it gives up. Where nothing
behind a part can fail, none of these ways is ever tried; where something can, a repetition costs a factor of the text's
length, and a repetition of what itself matches in several ways a power of it. The patterns in use cut a text in time
that at worst grows with its square.
"""

import re
from dataclasses import dataclass
from functools import cache

from lit_llama.errors import CheckpointError

_LONGEST, _WAYS = 20_000, 10_000
_DEEPEST = 20
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_OPENING = re.compile(r"\((?:\?(?P<kind>:|=|!|<=|<!|>|<\w+>|'\w+'|#[^)]*\)|[imsadu-]*(?P<end>[:)])))?")
_ESCAPE = re.compile(
    r"\\(?:[pPxo]\{[^}]*\}|x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{4}|[cC]-?.|M-.|0[0-7]*|.)",
    re.DOTALL,
)


@dataclass(frozen=True)
class _Node:
    """A part of a pattern.

    Args:
        kind: "one" character, an "edge" such as $ or a look around, "all" of the parts, or "any" of them.
        parts: What it is made of.
        least: Repetitions at least.
        most: At most; None for any number.
        atomic: The engine never goes back into it.
    """

    kind: str
    parts: tuple["_Node", ...] = ()
    least: int = 1
    most: int | None = 1
    atomic: bool = False

    @property
    def sure(self) -> bool:
        """It cannot fail."""
        if self.least == 0:
            return True
        if self.kind == "all":
            return all(part.sure for part in self.parts)
        return self.kind == "any" and any(part.sure for part in self.parts)

    @property
    def varies(self) -> bool:
        """It may match in several ways at one place."""
        if self.atomic or self.kind == "edge":
            return False
        return self.least != self.most or self.bare_varies

    @property
    def bare_varies(self) -> bool:
        """A single repetition of it may."""
        return len(self.parts) > 1 if self.kind == "any" else any(part.varies for part in self.parts)

    @property
    def loops(self) -> bool:
        """Something in it is repeated any number of times."""
        return self.most is None or any(part.loops for part in self.parts)

    @property
    def size(self) -> int:
        """Characters of the shortest text that it matches."""
        if self.kind in ("one", "edge"):
            return self.least if self.kind == "one" else 0
        sizes = [part.size for part in self.parts]
        return self.least * (sum(sizes) if self.kind == "all" else min(sizes, default=0))


def check_pattern(pattern: str) -> None:
    """Check that a search with a pattern ends in good time.

    Raises:
        CheckpointError: It may not, or it uses what is not understood here.
    """
    power, ways = _cost(_parse(pattern), False, pattern)
    if power > 1 or ways > _WAYS:
        raise _refused(pattern, "may try far more ways to match than a text has characters")


def shortest(pattern: str) -> int:
    """Count the characters of the shortest text that a pattern matches."""
    return _parse(pattern).size


def _refused(pattern: str, why: str) -> CheckpointError:
    shown = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
    return CheckpointError(f"the regular expression {shown!r} {why}: it is not run, as no tokenizer needs that")


def _cost(node: _Node, fails: bool, pattern: str) -> tuple[int, int]:
    """The power of a text's length, and the factor beside it, that trying out all ways at one place takes.

    Args:
        node: The part.
        fails: What stands behind it may fail.
        pattern: The whole, for messages.
    """
    back = fails and not node.atomic
    if node.kind == "edge":
        power, ways = _cost(node.parts[0], False, pattern) if node.parts else (0, 1)
        return max(power, int(any(part.loops for part in node.parts))), ways
    again = node.most is None or node.most > 1
    if again and node.bare_varies and (back or node.least > 1):
        raise _refused(pattern, "repeats what matches in several ways, and so may never end")
    power, ways = 0, 1
    if node.kind == "any":
        costs = [_cost(part, back, pattern) for part in node.parts]
        power, ways = max(cost[0] for cost in costs), sum(cost[1] for cost in costs)
    elif node.kind == "all":
        behind = back
        for part in reversed(node.parts):
            cost = _cost(part, behind, pattern)
            power, ways = power + cost[0], min(ways * cost[1], _WAYS + 1)
            behind = behind or not part.sure
    if back and node.most is None:
        power += 1
    elif fails and node.atomic and node.loops:
        power = max(power, 1)  # it is run through again for each way in which what stands before it matches
    elif back and node.most is not None:
        ways = min(ways * (node.most - node.least + 1), _WAYS + 1)
    return power, ways


@cache
def _parse(pattern: str) -> _Node:
    """The parts of a pattern.

    Raises:
        CheckpointError: It is too long, or refers back, recurs or branches.
    """
    if len(pattern) > _LONGEST:
        raise CheckpointError(f"a regular expression has {len(pattern):,} characters, expected at most {_LONGEST:,}")
    parser = _Parser(pattern)
    node = parser.alternatives(0)
    if parser.position < len(pattern):
        raise _refused(pattern, "closes a bracket that it has not opened")
    return node


class _Parser:
    """Reads Oniguruma's syntax, as far as it tells what is repeated."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.position = pattern, 0

    def alternatives(self, depth: int) -> _Node:
        """Up to the end, or the bracket that closes this group."""
        if depth > _DEEPEST:
            raise _refused(self.pattern, f"is nested more than {_DEEPEST} deep")
        branches: list[_Node] = []
        parts: list[_Node] = []
        start = self.position
        while self.position < len(self.pattern) and self.pattern[self.position] != ")":
            if self.pattern[self.position] == "|":
                self.position += 1
                branches.append(_Node("all", tuple(parts)))
                parts = []
            elif (part := self._part(depth)) is not None:
                parts.append(self._repeated(part))
        last = _Node("all", tuple(parts))
        if not branches:
            return last
        words = self.pattern[start : self.position].split("|")
        if all(len(word) == 1 and word.isalnum() for word in words) and len({*map(str.casefold, words)}) == len(words):
            return _Node("one")  # different letters, of which one fits at most
        return _Node("any", (*branches, last))

    def _part(self, depth: int) -> _Node | None:
        """One character, class, edge or group; None for a comment."""
        c = self.pattern[self.position]
        if c == "(":
            return self._group(depth)
        if c == "[":
            self._skip_class()
            return _Node("one")
        if c == "\\":
            return self._escape()
        self.position += 1
        return _Node("edge" if c in "^$" else "one")

    def _escape(self) -> _Node:
        found = _ESCAPE.match(self.pattern, self.position)
        if not found:
            raise _refused(self.pattern, "ends in a backslash")
        self.position = found.end()
        c = found[0][1]
        if c in "123456789kg":
            raise _refused(self.pattern, "refers back to a group")
        return _Node("edge" if c in "bBAzZGKyY" else "one")

    def _group(self, depth: int) -> _Node | None:
        found = _OPENING.match(self.pattern, self.position)
        kind = found["kind"] if found else None
        if not found or (kind is None and self.pattern.startswith("(?", self.position)) or kind == "-:":
            raise _refused(self.pattern, "has a group of a kind that is not known here")
        self.position = found.end()
        if kind and kind.startswith("#"):
            return None
        if found["end"] == ")":  # options from here to the end of the group around
            rest = self.alternatives(depth + 1)
            return rest
        body = self.alternatives(depth + 1)
        if self.position >= len(self.pattern):
            raise _refused(self.pattern, "opens a group that it does not close")
        self.position += 1
        if kind in ("=", "!", "<=", "<!"):
            return _Node("edge", (body,))
        return _Node("all", (body,), atomic=kind == ">")

    def _skip_class(self) -> None:
        depth, position, first = 0, self.position, -1
        while position < len(self.pattern):
            c = self.pattern[position]
            if c == "\\":
                position += 1
            elif c == "[":
                depth, first = depth + 1, position + 1
                if self.pattern.startswith("^", first):
                    position, first = position + 1, first + 1
            elif c == "]" and position != first:  # one that comes first stands for itself
                depth -= 1
                if not depth:
                    self.position = position + 1
                    return
            position += 1
        raise _refused(self.pattern, "opens a class that it does not close")

    def _repeated(self, node: _Node) -> _Node:
        """The part with all its repetitions, such as + and ++ and {1,3}."""
        while self.position < len(self.pattern):
            c = self.pattern[self.position]
            counted = _COUNT.match(self.pattern, self.position) if c == "{" else None
            if c in "*+?":
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[c]
                self.position += 1
            elif counted and (counted[1] or counted[3]):
                least = int(counted[1] or 0)
                most = int(counted[3]) if counted[3] else None if counted[2] else least
                self.position = counted.end()
            else:
                return node
            follows = self.pattern[self.position : self.position + 1]
            atomic = follows == "+" and counted is None
            self.position += follows == "?" or atomic
            plain = node.kind in ("one", "all", "any") and node.least == node.most == 1 and not node.atomic
            inner = (node.kind, node.parts) if plain else ("all", (node,))
            node = _Node(*inner, least=least, most=most, atomic=atomic)
        return node
