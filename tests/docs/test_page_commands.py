"""Commands of the README and of docs/: each script exists, and its own parser takes every flag and value."""

import dataclasses
import functools
import inspect
import json
import re
import runpy
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from markdown_pages import PAGES, Command, blocks, commands, name, spans

import lit_llama.cli
from lit_llama.commands import SPELLED

OTHERS = {".", "curl", "hf", "llama-cli", "lm_eval", "ollama", "openssl", "pre-commit"}
"""Programs of others, whose flags are their own."""
FOREIGN = {"--lr", "--train.lr"}
"""Flags that a page names because scripts do not know them."""
OF_OTHERS = {"--check", "--model_args"}
"""Flags that a page names as those of sha256sum and of lm_eval."""
THEIR_SCRIPTS = {"generate/lora.py"}
"""Scripts that a page names as those of lit-llama."""
SCRIPT = re.compile(r"(?<![\w/])(?:prepare|finetune|generate|demo|benchmarks)/\w+\.py")
FLAG = re.compile(r"(?<!\S)--[A-Za-z][\w.]*")


@functools.cache
def mains(script: str) -> tuple[Callable[..., Any], ...]:
    """The functions that a script hands to `CLI`."""
    taken: list[Callable[..., Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lit_llama.cli, "CLI", lambda *functions: taken.extend(functions))
        patch.setattr("sys.argv", [script])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return tuple(taken)


def keys(function: Callable[..., Any], prefix: str = "") -> Iterator[str]:
    """The parameters of a function, and the fields of those that are groups, such as train.epochs."""
    for parameter in inspect.signature(function).parameters.values():
        yield prefix + parameter.name
        if dataclasses.is_dataclass(kind := parameter.annotation):
            yield from keys(kind, f"{prefix}{parameter.name}.")


@functools.cache
def flags(script: str) -> frozenset[str]:
    """The flags of a script, those of groups and of all its commands included."""
    names = [key for main in mains(script) for key in keys(main)]
    names += [SPELLED[key] for key in names if key in SPELLED]
    return frozenset(f"--{key}" for key in [*names, "help", "config", "print_config"])


def refusal(words: tuple[str, ...], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    """What the parser of a script says against a command line; nothing if the script would begin its work."""
    begun = []
    recorded = [functools.wraps(main)(lambda **given: begun.append(given)) for main in mains(words[0])]
    patch.setattr("sys.argv", list(words))
    try:
        lit_llama.cli.CLI(*recorded)
    except SystemExit as end:
        if end.code:
            return capsys.readouterr().err
    return "" if begun or {"--help", "--print_config"} & set(words) else "the script did not begin"


def stripped(words: tuple[str, ...]) -> tuple[str, ...]:
    """A command line without redirections, without settings of the environment before it, and without configuration
    files that only a user has."""
    kept = [word for word in words]
    while kept and re.fullmatch(r"\w+=.*", kept[0]):
        del kept[0]
    if ">" in kept:
        kept = kept[: kept.index(">")]
    if "--config" in kept and not (ROOT / kept[kept.index("--config") + 1]).is_file():
        at = kept.index("--config")
        del kept[at : at + 2]
    return tuple(kept)


def parts(command: Command) -> list[tuple[str, ...]]:
    """The commands of a pipe."""
    whole: list[list[str]] = [[]]
    for word in command.words:
        if word == "|":
            whole.append([])
        else:
            whole[-1].append(word)
    return [stripped(tuple(words)) for words in whole]


def python_commands(path: Path) -> list[tuple[Command, tuple[str, ...]]]:
    """The commands of a page that start a script, with the words behind `python`."""
    return [
        (command, words[1:])
        for command in commands(path)
        for words in parts(command)
        if words[0] == "python" and words[1].endswith(".py")
    ]


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_are_taken_by_their_scripts(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a flag that was renamed, a value that is not allowed any more, and a required flag that is missing.

    Where a page shows that a command is refused, the script says these very words.
    """
    monkeypatch.chdir(ROOT)
    wrong = []
    for command, words in python_commands(path):
        if not (ROOT / words[0]).is_file():
            wrong.append(f"{command.place}: {words[0]} is not there")
        elif (said := refusal(words, capsys, monkeypatch)).split() != expected(command).split():
            wrong.append(f"{command.place}: {' '.join(words)}: {said}")
    assert wrong == []


def expected(command: Command) -> str:
    return command.output if command.output.startswith("error: ") else ""


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_other_commands_are_known(path: Path) -> None:
    """Catches a block of flags that no script has, a target that the Makefile has not, an extra that is not declared,
    and a program that nobody checks."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    every = frozenset().union(*(flags(name(door)) for door in doors()))
    for command in commands(path):
        for words in parts(command):
            first = words[0].rpartition("/")[2]
            if first.startswith("--"):
                assert {word.partition("=")[0] for word in words if FLAG.match(word)} <= every, command
            elif first == "make":
                assert words[1] in targets, command
            elif first == "pip":
                assert words[1] == "install", command
                found = re.fullmatch(r"lit_llama\[(\w+)\]", words[2])
                assert words[2] == "lm_eval[api]" or (found and found[1] in EXTRAS), command
            elif first == "python" and words[1] == "-m":
                assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), command
            else:
                assert first in {"python", "printf", "pytest", *OTHERS}, command


def doors() -> list[Path]:
    return [path for room in ("prepare", "finetune", "generate") for path in sorted(ROOT.glob(f"{room}/*.py"))]


def measurements() -> list[Path]:
    return [path for path in sorted(ROOT.glob("benchmarks/*.py")) if "CLI(" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CONTRIBUTING.md"], ids=name)
def test_flags_in_sentences_exist(path: Path) -> None:
    """Catches a flag in a sentence or table that no script has, or that the script named beside it has not."""
    every = frozenset().union(*(flags(name(script)) for script in [*doors(), *measurements()]))
    wrong = []
    for span in spans(path):
        known = every | FOREIGN | OF_OTHERS
        if (script := SCRIPT.search(span)) and script[0] not in THEIR_SCRIPTS:
            assert (ROOT / script[0]).is_file(), span
            known = flags(script[0])
        elif bare := re.match(r"(?:python )?(\w+)\.py ", span):
            (door,) = [door for door in doors() if door.stem == bare[1]]
            known = flags(name(door))
        elif re.match(r"[\w-]+ ", span) and not span.startswith("delta.py"):
            continue  # a command of another program
        wrong += [f"{span}: {flag}" for flag in FLAG.findall(span) if flag not in known]
    assert wrong == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_files_that_pages_name_are_there(path: Path) -> None:
    """Catches a file of the library that was moved or renamed."""
    named = {
        found[0]
        for text in [*spans(path), *(block.text for block in blocks(path) if block.language == "bash")]
        for found in re.finditer(r"(?<![\w/.-])(?:lit_llama|tests|docs|benchmarks|demo)/[\w/.-]+\.\w+", text)
    }
    assert sorted(file for file in named if not (ROOT / file).exists()) == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_blocks_have_a_language_and_can_be_read(path: Path) -> None:
    """Catches a block that no check looks into, and data that is not in the format it is said to have."""
    readers = {"json": json.loads, "yaml": yaml.safe_load}
    for block in blocks(path):
        assert block.language in {"bash", "console", "text", "python", "json", "yaml", "{eval-rst}"}, block
        readers.get(block.language, str)(block.text)


def test_the_readme_is_short_and_shows_what_the_demo_runs() -> None:
    """Catches a README that grows again, and a command in it that `make demo` does not execute."""
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.split()) <= 900
    shown = [words[0] for command, words in python_commands(ROOT / "README.md") if command.output]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    executed = set(re.findall(r"\$\(PY\) ((?:prepare|finetune|generate)/\w+\.py)", makefile))
    assert len(shown) == 6
    assert set(shown) == executed - {"generate/evaluate.py"}


@pytest.mark.parametrize(
    "path", [page for page in PAGES if page.parent.name == "docs" and page.name != "api.md"], ids=name
)
def test_pages_begin_with_the_command_that_most_readers_came_for(path: Path) -> None:
    """Catches a page that explains before it shows."""
    first = next(block for block in blocks(path))
    assert first.language in ("bash", "python") and first.line <= 12, first.place
