"""The flags of other programs: what is to be said here in place of them, and which flag a misspelled one means.

The words and their answers stand in habits.toml, from which docs/coming-from.md is made as well. Imports no torch.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

TABLE = "habits.toml"
MOST = 8
"""Words that one message explains."""
_ALIKE = 0.75  # similarity from which on a word is a misspelled flag; `lr` and `lora` are less alike


@cache
def _table() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    return tomllib.loads((files("lit_llama") / TABLE).read_text("utf-8"))


def entries() -> Sequence[Mapping[str, Any]]:
    """Return the flags: doors, the answer, and words by program."""
    return _table()["flag"]


def programs() -> Mapping[str, str]:
    """Return other programs, with a few words on what is different here."""
    return {program["name"]: program["text"].strip() for program in _table()["program"]}


def answer(door: str, word: str) -> str | None:
    """Answer for a flag or key of another program at a door, such as finetune/lora.py.

    A group before the word, such as `train.`, need not be that of the other program.
    """
    parts = plain(word).split(".")
    for start in range(len(parts)):
        wanted = ".".join(parts[start:])
        for entry in entries():
            if door in entry["doors"] and any(wanted in (known, _last(known)) for known in words(entry)):
                return str(entry["here"])
    return None


def words(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield all words of an entry."""
    return (word for name, known in entry.items() if name not in ("doors", "here") for word in known)


def plain(word: str) -> str:
    """Return a flag without its dashes, as people write one in several ways."""
    return word.lstrip("-").replace("-", "_").lower()


def explain(
    door: str,
    unknown: Sequence[str],
    known: Collection[str],
    where: str = "",
    *,
    typed: Callable[[str], str] = str,
) -> str:
    """Explain flags or keys that a door does not have.

    Args:
        door: Such as finetune/lora.py.
        unknown: As they were typed.
        known: Names of its parameters, such as train.epochs.
        where: What they stand in, if it is not the command line.
        typed: Spells scripts in a text of ours as the user has called this one.
    """
    said = [_explained(door, word, known, where, typed) for word in unknown[:MOST]]
    if len(unknown) > MOST:
        said.append(f"and {len(unknown) - MOST} more: docs/coming-from.md answers for all of them")
    return ". ".join(said)


def _explained(door: str, word: str, known: Collection[str], where: str, typed: Callable[[str], str]) -> str:
    spelled = f"{word} in {where}" if where else word
    if found := answer(door, word):
        return f"{spelled}: {typed(found)}"
    if same := [name for name in known if _last(name) == _last(word)]:
        return f"{spelled}: here {' or '.join(f'--{name}' for name in same)}"
    hint = f"did you mean --{meant}?" if (meant := nearest(word, known)) else "--help lists what there is"
    return f"{spelled} is nothing that {typed(door)} knows; {hint}"


def nearest(word: str, known: Collection[str]) -> str | None:
    """Return the parameter whose own name is most like a misspelled one's; of several, the one of the group that was
    typed.
    """
    known = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]  # no group
    names = {_last(name) for name in known}
    close = difflib.get_close_matches(_last(word), sorted(names), n=1, cutoff=_ALIKE)
    group = plain(word).rpartition(".")[0]
    found = sorted((name for name in known if close and _last(name) == close[0]), key=lambda n: _group(n) != group)
    return found[0] if found else None


def _last(name: str) -> str:
    return plain(name).rpartition(".")[2]


def _group(name: str) -> str:
    return name.rpartition(".")[0]


def page() -> str:
    """Render docs/coming-from.md."""
    parts = [_INTRODUCTION]
    for program, text in programs().items():
        parts.append(f"## Coming from {program}\n\n{text}\n")
        parts.append("| there | script | here |\n|---|---|---|\n" + "".join(_rows(program)))
    return "\n".join(parts)


def _rows(program: str) -> Iterator[str]:
    for entry in entries():
        if theirs := entry.get(program):
            there = ", ".join(f"`{word}`" for word in theirs)
            here = re.sub(r"(?<!`)(--[\w.]+)", r"`\1`", entry["here"]).removeprefix("here ").replace("|", "\\|")
            doors = ", ".join(f"`{door}`" for door in entry["doors"])
            yield f"| {there} | {doors} | {here} |\n"


_INTRODUCTION = """\
# Coming from another program

```bash
python finetune/lora.py --config YOURS.yaml
```

answers for every key that it does not know with what to say here, and so does each script for each flag:

```console
$ python finetune/lora.py --micro_batch_size 4
error: --micro_batch_size: here --train.micro_batch_tokens, tokens per forward pass; the batch is --train.batch_size
```

Dashes or underscores make no difference, nor does a group before the name (`--train.lr`, `--lr`). Below is all of
it, program by program.
"""
