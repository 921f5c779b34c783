"""The command `lit-llama STAGE DOOR ...`: the scripts of prepare/, finetune/ and generate/, wherever they lie.

    lit-llama prepare records --source rows.jsonl --destination_path data/mine --tokenizer_path checkpoints/NAME

Imports nothing of the package but the wording of commands, so that a list of doors is there at once.
"""

import ast
import difflib
import runpy
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn

from lit_llama.commands import call_as_command, spoken

NAME = "lit-llama"
STAGES = {
    "prepare": "Make data folders and bring models here",
    "finetune": "Train on a data folder, and merge what was trained",
    "generate": "Answer, chat, serve, evaluate, make rows",
}
_HELP = ("-h", "--help", "help")


def main() -> None:
    """Run the door that the command line names, or list what there is."""
    call_as_command()
    words = sys.argv[1:]
    if not words or words[0] in _HELP:
        stages = {stage: f"{text}: {', '.join(doors(stage))}" for stage, text in STAGES.items()}
        return _show(f"usage: {NAME} STAGE DOOR [--help | flags]", stages)
    if words[0] == "--version":
        from importlib.metadata import version

        return print(version("lit_llama"))
    stage, *rest = words
    if stage not in STAGES:
        _refuse(stage, "stage", STAGES)
    found = doors(stage)
    if not rest or rest[0] in _HELP:
        return _show(f"usage: {NAME} {stage} DOOR [--help | flags]", {name: _line(found[name]) for name in found})
    if rest[0] not in found:
        _refuse(rest[0], f"door of {stage}", found)
    sys.argv = [f"{NAME} {stage} {rest[0]}", *rest[1:]]
    runpy.run_path(str(found[rest[0]]), run_name="__main__")


def doors(stage: str) -> Mapping[str, Path]:
    """Return scripts of a stage by their names: within the package, or beside it in a clone."""
    package = Path(__file__).resolve().parent
    folder = next(place for place in (package / "doors" / stage, package.parent / stage) if place.is_dir())
    return {path.stem: path for path in sorted(folder.glob("[a-z]*.py"))}


def _line(script: Path) -> str:
    """The first line of what a script says of itself; it is not run."""
    text = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""
    return spoken().typed(text.partition("\n")[0])


def _show(usage: str, entries: Mapping[str, str]) -> None:
    width = max(map(len, entries))
    print("\n".join([usage, "", *(f"  {name:{width}}  {text}" for name, text in entries.items())]))


def _refuse(word: str, what: str, known: Collection[str]) -> NoReturn:
    """End with the nearest name."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    print(f"error: {word!r} is no {what}; {hint}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
