"""Plain text files -> documents: a whole file, paragraphs between blank lines, or lines."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from lit_llama.errors import DataError
from lit_llama.text.config import Documents
from lit_llama.text.read.files import UTF8, Dialect, Remark, decoded, open_bytes
from lit_llama.text.read.raw import LONGEST, RawRow

TEXT_ENDINGS = (".txt", ".text", ".md")


def read_documents(
    path: Path, documents: Documents, dialect: Dialect = UTF8, remark: Remark = lambda _: None
) -> Iterator[RawRow]:
    """Documents of a file one after another, each as a row with a field `text`.

    A line ends at LF or CRLF, which is not part of it; a paragraph ends at a line of white space.

    Raises:
        DataError: The file cannot be read, is of another encoding, or a document has more than LONGEST characters.
    """
    with open_bytes(path) as stream:
        text = decoded(stream, path, dialect, remark)
        blocks = _bounded(text, path) if documents == "file" else text
        if documents == "file":
            yield RawRow(str(path), {"text": "".join(blocks).replace("\r\n", "\n")})
            return
        begun: list[str] = []
        first = 1
        for number, line in enumerate(_lines(blocks, path), 1):
            if documents == "line":
                if line.strip():
                    yield RawRow(f"{path}:line {number}", {"text": line})
            elif line.strip():
                first = first if begun else number
                begun.append(line)
            elif begun:
                yield RawRow(f"{path}:line {first}", {"text": "\n".join(begun)})
                begun = []
        if begun:
            yield RawRow(f"{path}:line {first}", {"text": "\n".join(begun)})


def _lines(blocks: Iterable[str], path: Path) -> Iterator[str]:
    """Lines without their ends; other characters that Python calls line ends stand within."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            yield line.removesuffix("\r")
        if len(rest) > LONGEST:
            raise _too_long(path)
    if rest:
        yield rest.removesuffix("\r")


def _bounded(blocks: Iterable[str], path: Path) -> Iterator[str]:
    size = 0
    for block in blocks:
        size += len(block)
        if size > LONGEST:
            raise _too_long(path)
        yield block


def _too_long(path: Path) -> DataError:
    return DataError(
        f"{path}: a document has more than {LONGEST:,} characters; cut the file, or use --documents paragraph or line"
    )
