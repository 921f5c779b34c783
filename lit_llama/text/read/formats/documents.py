"""Documents: plain text files and the words of PDF files."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_llama.errors import DataError, UserError
from lit_llama.text.config import Documents
from lit_llama.text.read.formats.files import UTF8, Dialect, decoded, open_bytes
from lit_llama.text.read.formats.paths import Remark, check_file
from lit_llama.text.read.raw import LONGEST, RawRow
from lit_llama.wording import param

PDF_ENDING = ".pdf"
_ENDS = re.compile(r"[.!?:。！？][\"'”’)]?$")


def pdf_text(path: Path) -> str:
    """Return the text of a PDF file, its lines joined to paragraphs with a blank line between them.

    Raises:
        UserError: The package that reads PDF files is not installed.
        DataError: The file is damaged or protected by a password, has no text, or more than LONGEST characters.
    """
    check_file(path)
    try:
        import pypdf
        from pypdf.errors import DependencyError, PdfReadError
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: PDF files are read by a package that is not installed: pip install 'lit_llama[pdf]', or save "
            "the document as text"
        ) from error
    pages, size = list[str](), 0
    with _quiet(), path.open("rb") as file:
        try:
            reader = pypdf.PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):  # some have a password only for who changes them
                raise _protected(path)
            for page in reader.pages:
                pages.append(page.extract_text())
                if (size := size + len(pages[-1])) > LONGEST:
                    raise DataError(f"{path} has more than {LONGEST:,} characters; cut the file")
        except DataError:
            raise
        except DependencyError as error:  # a cipher that needs one more package
            raise _protected(path) from error
        except Exception as error:  # a damaged file makes pypdf stumble anywhere
            what = str(error) if isinstance(error, PdfReadError) else f"{type(error).__name__}: {error}"
            raise DataError(
                f"{path} cannot be read as PDF: {' '.join(what.split()) or 'it is damaged'}; save it again, or as text"
            ) from error
    text = "\n\n".join(paragraph for page in pages for paragraph in _paragraphs(page))
    if not text:
        raise DataError(f"{path} holds no text, its pages may be pictures: make text of it by OCR, or leave it out")
    return text.encode("utf-8", "replace").decode()  # a damaged font gives halves of characters


def _protected(path: Path) -> DataError:
    return DataError(f"{path} is protected by a password: save it without one, or as text")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what pypdf says of oddities that it copes with."""
    logger = logging.getLogger("pypdf")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _paragraphs(page: str) -> Iterator[str]:
    """Paragraphs of a page, whose lines end where its column does.

    One ends at a blank line, or at a line that is shorter than the others and ends a sentence, as the last of a
    paragraph does, or is much shorter, as a heading is. A word that a hyphen divides is whole again.
    """
    lines = [" ".join(line.split()) for line in page.splitlines()]
    width, begun = max(map(len, lines), default=0), ""
    for line in lines:
        if begun.endswith("-") and line[:1].islower():
            begun = begun[:-1] + line
        else:
            begun = f"{begun} {line}".strip()
        if begun and (not line or len(line) < (3 / 4 if _ENDS.search(line) else 1 / 2) * width):
            yield begun
            begun = ""
    if begun:
        yield begun


TEXT_ENDINGS = (".txt", ".text", ".md")


def read_documents(
    path: Path, documents: Documents, dialect: Dialect = UTF8, remark: Remark = lambda _: None
) -> Iterator[RawRow]:
    """Read the documents of a file one after another, each as a row with a field `text`.

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
        f"{path}: a document has more than {LONGEST:,} characters; cut the file, or use "
        f"{param('documents', 'paragraph')} or line"
    )
