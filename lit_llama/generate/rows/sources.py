"""Sources that attempts start from: rows of any file, passages of documents, and rows that were made before."""

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.generate.rows.recipe import Source
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.read.formats.documents import PDF_ENDING, TEXT_ENDINGS, pdf_text, read_documents
from lit_llama.text.read.formats.paths import expand
from lit_llama.text.read.formats.sources import question_of, read_rows
from lit_llama.text.read.raw import RowError

PAGES = (".html", ".htm")
_UNREAD = {"script", "style", "template", "noscript", "svg", "head", "nav", "footer"}
_LINES = {"p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "blockquote", "pre"}


@dataclass(frozen=True)
class Entry:
    """A row or passage: where it stands, and its fields."""

    where: str
    value: Mapping[str, Any]


class Pool:
    """The entries of a source, and which of them an attempt gets.

    Args:
        source: As the recipe has it.
        seed: Of the draws.

    Attributes:
        entries: All of them.
        digest: sha256 of all of them.

    Raises:
        DataError: There are none, or a file cannot be used.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self._seed = source, seed
        rows = _rows(source) if source.rows is not None else _passages(source)
        self.entries = list(rows)
        if not self.entries:
            raise DataError(
                f"{source.rows or ', '.join(source.documents or ())} holds nothing for the source {source.name}"
            )
        text = json.dumps([entry.value for entry in self.entries], sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self._orders: dict[int, list[int]] = {}

    @property
    def attempts(self) -> int | None:
        """Attempts after which it is used up; None if it never is."""
        draw = self.source.draw
        return -(-len(self.entries) // draw) if self.source.order == "once" else None

    def draw(self, attempt: int, accepted: Sequence[Entry]) -> list[Entry]:
        """Draw the entries that an attempt gets: the same whenever it is asked for.

        Args:
            attempt: Its number.
            accepted: Rows that were made before.
        """
        source = self.source
        chance = random.Random(f"{self._seed} {source.name} {attempt}")
        made = chance.sample(range(len(accepted)), min(source.accepted, len(accepted)))
        count = source.draw - len(made)
        if source.order == "random":
            indices = chance.sample(range(len(self.entries)), min(count, len(self.entries)))
        else:
            first = attempt * source.draw
            indices = [self._in_turn(first + offset) for offset in range(count)]
            if source.order == "once":
                indices = [index for offset, index in enumerate(indices) if first + offset < len(self.entries)]
        drawn = [self.entries[index] for index in indices] + [accepted[index] for index in made]
        if made:
            chance.shuffle(drawn)
        return drawn

    def _in_turn(self, position: int) -> int:
        """The entry at a position of passes that each have all of them, in the order of the file."""
        return position % len(self.entries)


def _rows(source: Source) -> Iterator[Entry]:
    assert source.rows is not None
    for number, raw in enumerate(read_rows(Path(source.rows))):
        if raw.value is None:
            assert raw.error
            raise raw.error
        yield Entry(raw.where, {**raw.value, **named(raw.value, number)})


def named(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a row of instructions under the names of Alpaca and of chats; nothing of one that is something else."""
    try:
        question = question_of(row, number)
    except RowError:
        return {}
    last = question.prompt[-1]
    asked = {"instruction": last["content"], "input": last.get("input", ""), "output": question.response}
    return asked | {"messages": list(map(PromptStyle().joined, question.prompt))}


def _passages(source: Source) -> Iterator[Entry]:
    for path in expand(source.documents or (), (*TEXT_ENDINGS, *PAGES, PDF_ENDING)):
        if path.suffix.lower() in PAGES:
            text = page_text(_page(path))
        elif path.suffix.lower() == PDF_ENDING:
            text = pdf_text(path)
        else:
            text = "".join(raw.value["text"] for raw in read_documents(path, "file") if raw.value is not None)
        for number, passage in enumerate(cut(text, source.length), 1):
            yield Entry(f"{path}:passage {number}", {"text": passage, "file": path.name, "number": number})


def _page(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; save the page as UTF-8") from error


def cut(text: str, length: int) -> Iterator[str]:
    """Cut a text into passages that end where a paragraph does, a sentence or word where those are too long."""
    begun = ""
    for paragraph in (part.strip() for part in text.split("\n\n")):
        while paragraph:
            joined = f"{begun}\n\n{paragraph}" if begun else paragraph
            if len(joined) <= length:
                begun, paragraph = joined, ""
            elif begun:
                yield begun
                begun = ""
            else:
                window = paragraph[:length]
                end = max(window.rfind(mark) + 1 for mark in (". ", "! ", "? ", "。", "\n"))
                end = end or window.rfind(" ") or length
                end = end if end > 0 else length
                yield paragraph[:end].strip()
                paragraph = paragraph[end:].strip()
    if begun:
        yield begun


class _Page(HTMLParser):
    """Collects the words of a page that a reader sees, a paragraph for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _UNREAD:
            self._hidden.append(tag)
        if tag in _LINES:
            self.parts.append("\n" if tag in ("br", "li", "tr") else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self._hidden and tag == self._hidden[-1]:
            self._hidden.pop()
        if tag in _LINES:
            self.parts.append("\n\n" if tag not in ("li", "tr") else "\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(re.sub(r"\s+", " ", data))


def page_text(html: str) -> str:
    """Return the words of an HTML page, without its scripts, styles and navigation."""
    page = _Page()
    page.feed(html)
    page.close()
    lines = [" ".join(line.split()) for line in "".join(page.parts).split("\n")]
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip()
