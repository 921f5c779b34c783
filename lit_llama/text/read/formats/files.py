"""Files -> bytes -> text: unpacked, and proved to be the UTF-8 of data."""

import codecs
import contextlib
import gzip
import io
import re
import shlex
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, UserError
from lit_llama.text.config import Quoting
from lit_llama.text.read.formats.paths import Remark, check_file
from lit_llama.wording import param

BLOCK = 1 << 20  # bytes read at a time
FREE, RATIO = 256 << 20, 500
"""Bytes that any file may unpack to, and how many times its own size a larger one may: text is packed to a tenth, and
what is all alike to a hundredth."""

NOT_DATA = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch the file itself (git lfs pull)",
    b"<!doctype html": "an HTML page, not the data; download the raw file",
    b"<html": "an HTML page, not the data; download the raw file",
    b"404: not found": "the text of a failed download; download the file again",
    b"invalid username or password": "the text of a failed download; log in and download the file again",
}
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHER_MAGIC = {
    b"PK\x03\x04": "a ZIP archive, or a workbook under a wrong name; unpack it, or call it .xlsx or .ods",
    b"\xd0\xcf\x11\xe0": "a document of old Office programs; if it is a workbook, call it .xls",
    b"BZh": "packed by bzip2; unpack it (bunzip2), or pack it as .gz or .zst",
    b"\xfd7zXZ\x00": "packed by xz; unpack it (unxz), or pack it as .gz or .zst",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"ARROW1": "an Arrow file; name the folder that the datasets library saved it in, or write it as Parquet",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"%PDF": "a PDF, not data",
}


@dataclass(frozen=True)
class Dialect:
    """Spelling of the text in files.

    Args:
        encoding: Of files that are neither UTF-8 nor begin with the mark of another Unicode form.
        quoting: Whether quotes around a field of CSV are no part of it, or stand for themselves.
        escape: The character before a quote that does not end a field of CSV, where quotes are not doubled.
    """

    encoding: str | None = None
    quoting: Quoting = "double"
    escape: str | None = None

    def __post_init__(self) -> None:
        if self.encoding is not None:
            try:
                "".encode(self.encoding).decode(self.encoding)  # not one that is of bytes, such as base64
            except (LookupError, ValueError) as error:
                raise UserError(
                    parameter="encoding",
                    value=self.encoding,
                    expected="the name of an encoding such as cp1252, utf-16 or gbk",
                ) from error
        if self.escape is not None and (len(self.escape) != 1 or self.escape in '\r\n\0"'):
            raise UserError(parameter="escape", value=self.escape, expected="one character, such as \\")

    @property
    def is_of_csv(self) -> bool:
        """Whether it says something of CSV."""
        return self.quoting != "double" or self.escape is not None


UTF8 = Dialect()


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """Open the bytes of a file, unpacked as they are read; gzip and zstd are recognised by their first bytes.

    Raises:
        DataError: There is no such file, it holds something else than data, or its packing is damaged.
    """
    check_file(path)
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("rb", buffering=0))
            stream: io.BufferedReader = io.BufferedReader(file, BLOCK)
            if packed := stream.peek(4).startswith((_GZIP, _ZSTD)):
                stream = stack.enter_context(io.BufferedReader(_Unpacked(_unpacking(stream), path), BLOCK))
            start = stream.peek(64)[:64]
            if packed and start.startswith((_GZIP, _ZSTD)):
                raise DataError(f"{path} is packed twice; unpack it once")
            if not start:
                raise DataError(f"{path} is empty")
            _sniff(path, start)
            yield stream
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None):
            raise DataError(f"{path} cannot be read: {error.args[1]}") from error
        raise DataError(f"{path} is packed, and damaged or cut off: {error}; fetch it again") from error


def _unpacking(stream: io.BufferedReader) -> Any:
    if stream.peek(4).startswith(_GZIP):
        return gzip.GzipFile(fileobj=stream)
    import pyarrow as pa

    return pa.CompressedInputStream(stream, "zstd")


class _Unpacked(io.RawIOBase):
    """The bytes of a packed file, as far as they are in proportion to it."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path = stream, path
        self._most, self._size = most_unpacked(path), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._size += len(data)
        if self._size > self._most:
            raise DataError(
                f"{self._path} unpacks to more than {self._most:,} bytes, and has {self._path.stat().st_size:,}: it is "
                "packed to fill memory or disk, and no text; if it is meant so, unpack it yourself"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def most_unpacked(path: Path) -> int:
    """Return the bytes that a packed file may unpack to."""
    return max(FREE, RATIO * path.stat().st_size)


def _sniff(path: Path, start: bytes) -> None:
    for magic, what in _OTHER_MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{path} is {what}")
    for words, what in NOT_DATA.items():
        if start.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(words):
            raise DataError(f"{path} is {what}")


def decoded(
    stream: io.BufferedReader, path: Path, dialect: Dialect = UTF8, remark: Remark = lambda _: None
) -> Iterator[str]:
    """Decode blocks of text, without a byte order mark.

    Raises:
        DataError: The bytes are of another encoding; what stands before the first wrong byte is given first.
    """
    start = stream.read(64)
    mark, encoding = _marked(start) or (b"", dialect.encoding or "utf-8")
    if not mark and dialect.encoding and _is_utf8(path):
        encoding = "utf-8"
        remark(f"{path} is read as UTF-8, which it is, and not as {dialect.encoding}")
    elif encoding != "utf-8":
        remark(f"{path} is read as {encoding}")
    elif not mark and _is_utf16(start):
        raise not_utf8(start, start.find(0) if start[0] < 128 else 0, 0, path)
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = len(mark)
    block = start[offset:] + stream.read(BLOCK)
    while True:
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raw = pending + block
            if encoding != "utf-8":
                byte, place = raw[error.start : error.start + 1], offset - len(pending) + error.start
                raise DataError(
                    f"{path} is not {encoding}: byte 0x{byte.hex()} at offset {place}; see {param('encoding')}"
                ) from error
            if error.start:
                yield raw[: error.start].decode()
            raise not_utf8(raw, error.start, offset - len(pending), path) from error
        if text:
            yield text
        if not block:
            return
        offset += len(block)
        block = stream.read(BLOCK)


def beginning(start: bytes) -> str:
    """Read the first characters of a file, for finding out what it holds."""
    mark, encoding = _marked(start) or (b"", "latin-1")
    return start.removeprefix(mark).decode("latin-1" if encoding == "utf-8" else encoding, "replace").lstrip()


_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def _marked(start: bytes) -> tuple[bytes, str] | None:
    """The byte order mark that a file begins with, and the encoding that it stands for."""
    return next(((mark, encoding) for mark, encoding in _MARKS.items() if start.startswith(mark)), None)


def _is_utf8(path: Path) -> bool:
    """Whether a file holds characters beyond ASCII, all of them in UTF-8: that is no other encoding by accident."""
    decoder, beyond = codecs.getincrementaldecoder("utf-8")(), False
    with open_bytes(path) as stream:
        try:
            while block := stream.read(BLOCK):
                beyond = beyond or not block.isascii()
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return beyond


def not_utf8(raw: bytes, position: int, offset: int, path: Path) -> DataError:
    """Build the error for bytes that are no UTF-8.

    Args:
        raw: Some of them.
        position: Of the wrong byte in `raw`.
        offset: Of `raw` in the file.
        path: Of the file.
    """
    encoding = "UTF-16" if _is_utf16(raw) else "GBK" if _is_paired(raw[position : position + 4096]) else "CP1252"
    return DataError(
        f"{path} is not UTF-8: byte 0x{raw[position]:02x} at offset {offset + position}; it may be {encoding}: prepare "
        f"it with {param('encoding', encoding.lower())}, or convert it, for example: iconv -f {encoding} -t UTF-8 "
        f"{shlex.quote(path.name)}"
    )


def _is_utf16(raw: bytes) -> bool:
    """Whether every second byte is a zero, as Latin letters have it there."""
    start = raw[:64]
    return start.count(0) > len(start) / 4


def _is_paired(raw: bytes) -> bool:
    """Whether bytes above 127 mostly come in pairs of pairs, as in Chinese text and not in accented Latin."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", raw)]
    return sum(length for length in runs if length % 2 == 0 and length > 2) > sum(runs) / 2
