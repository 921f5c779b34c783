"""Pages of the documentation as their readers find them: code blocks, code spans, links and headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conftest import ROOT
from markdown_it import MarkdownIt
from markdown_it.token import Token

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@dataclass(frozen=True)
class Block:
    """A fenced block with its language and the number of its first line."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line with what a page shows as its output, which is empty in a block of commands alone."""

    place: str
    words: tuple[str, ...]
    output: str = ""


@cache
def tokens(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text("utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[Block]:
    return [
        Block(name(path), (token.map or [0])[0] + 1, token.info.strip(), token.content)
        for token in tokens(path)
        if token.type in ("fence", "code_block")
    ]


def inline(path: Path, kind: str) -> Iterator[Token]:
    """The inline tokens of one type, such as code_inline."""
    for token in tokens(path):
        yield from (child for child in token.children or [] if child.type == kind)


def spans(path: Path) -> list[str]:
    """The texts of code spans; a bar that a table needs escaped is one again."""
    return [token.content.replace("\\|", "|") for token in inline(path, "code_inline")]


def links(path: Path) -> list[str]:
    return [str(token.attrs["href"]) for token in inline(path, "link_open")]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub, and the rendered site, give to headings."""
    found = tokens(path)
    titles = [found[i + 1] for i, token in enumerate(found) if token.type == "heading_open"]
    texts = ["".join(child.content for child in title.children or []) for title in titles]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def commands(path: Path) -> list[Command]:
    """The command lines of the blocks whose language is bash or console."""
    found = []
    for block in blocks(path):
        if block.language == "bash":
            lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
            found += [Command(block.place, tuple(words)) for line in lines if (words := _split(line))]
        elif block.language == "console":
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                line, _, output = re.sub(r"\\\n\s*", "", part).partition("\n")
                found.append(Command(block.place, tuple(_split(line)), output))
    return found


def _split(line: str) -> list[str]:
    """Words of a line as bash has them, `$'...'` and comments included."""
    line = re.sub(r"\$'([^']*)'", lambda found: shlex.quote(found[1].encode().decode("unicode_escape")), line)
    return shlex.split(line, comments=True)
