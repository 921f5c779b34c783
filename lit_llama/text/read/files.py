"""Sources -> files -> bytes -> text: what stands at a path, unpacked, and proved to be the UTF-8 of data."""

import codecs
import contextlib
import difflib
import glob
import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lit_llama.errors import DataError

BLOCK = 1 << 20  # bytes read at a time
PACKED = (".gz", ".zst")
ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
FORMATS = "JSON (.json, .jsonl, .ndjson), CSV (.csv, .tsv), Parquet (.parquet), each also as .gz or .zst"

NOT_DATA = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch the file itself (git lfs pull)",
    b"<!doctype html": "an HTML page, not the data; download the raw file",
    b"<html": "an HTML page, not the data; download the raw file",
    b"404: not found": "the text of a failed download; download the file again",
    b"invalid username or password": "the text of a failed download; log in and download the file again",
}
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHER_MAGIC = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"BZh": "packed by bzip2; unpack it (bunzip2), or pack it as .gz or .zst",
    b"\xfd7zXZ\x00": "packed by xz; unpack it (unxz), or pack it as .gz or .zst",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"ARROW1": "an Arrow file; name the folder that the datasets library saved it in, or write it as Parquet",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"%PDF": "a PDF, not data",
}


def expand(sources: Sequence[str], endings: Sequence[str] = ENDINGS) -> list[Path]:
    """Paths, patterns and folders -> files and folders saved by the datasets library, each once.

    Sources stay in the order given; what one pattern or folder comes to is sorted. Of a folder, all files are taken
    whose names end in one of `endings`, those in its subfolders too; hidden and linked ones are not.

    Raises:
        DataError: A source names nothing.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        for path in _expand_one(source, endings):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _expand_one(source: str, endings: Sequence[str]) -> list[Path]:
    path = Path(source)
    if not source.strip():
        raise DataError("a source is empty, expected a file, a folder or a pattern")
    if source == "-" or "\0" in source:
        raise DataError(f"{source!r} is no source: save the data to a file, since it is read more than once")
    if os.path.lexists(path):
        if not stat.S_ISDIR(_status(path).st_mode):
            check_file(path)
            return [path]
        if is_saved(path):
            return [path]
        if not (inside := _data_in(path, endings)):
            names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            formats = FORMATS if endings == ENDINGS else ", ".join(endings)
            raise DataError(f"{path} is a folder without data files (it holds {names}); expected {formats}")
        return inside
    if glob.has_magic(source):
        if matches := sorted(glob.glob(source, recursive=True)):
            return [entry for match in matches for entry in _expand_one(match, endings)]
        raise DataError(f"{source} matches no file (working folder: {Path.cwd()})")
    raise missing(path)


def _data_in(folder: Path, endings: Sequence[str]) -> list[Path]:
    """Data files below a folder, and saved folders in place of their files; linked folders might lead in a circle."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or (entry.is_dir() and entry.is_symlink()):
            continue
        if entry.is_dir():
            found += [entry] if is_saved(entry) else _data_in(entry, endings)
        elif plain_suffix(entry) in endings:
            found.append(entry)
    return found


def plain_suffix(path: Path) -> str:
    """The ending of a name in small letters, without that of a packer: "a.JSONL.gz" -> ".jsonl"."""
    name = Path(path.name.lower())
    return name.with_suffix("").suffix if name.suffix in PACKED else name.suffix


def is_saved(path: Path) -> bool:
    """Whether the datasets library has saved this folder."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def missing(path: Path) -> DataError:
    """The error for a path that is not there, with the closest name that is."""
    name, folder, hint = path.name, path.parent, ""
    while not os.path.isdir(folder) and folder != folder.parent:
        name, folder = folder.name, folder.parent
    with contextlib.suppress(OSError):
        if close := difflib.get_close_matches(name, [entry.name for entry in folder.iterdir()], 1):
            hint = f"; the closest name is {folder / close[0]}"
    return DataError(f"{path} does not exist (working folder: {Path.cwd()}){hint}")


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise DataError(f"{path} is a link to {os.readlink(path)}, which does not exist") from error
        raise missing(path) from error
    except (OSError, ValueError) as error:  # a circle of links, no leave, a name too long
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def check_file(path: Path) -> os.stat_result:
    """Refuse what is no regular file or has no bytes, before it is opened: opening a pipe would wait for ever."""
    status = _status(path)
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path} is a folder, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is a pipe or a device, expected a file: save the data, since it is read twice")
    if not status.st_size:
        raise DataError(f"{path} is empty")
    return status


@contextlib.contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Raise DataError if a file becomes another one while the body reads it."""
    before = check_file(path)
    yield
    after = _status(path)
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise DataError(
            f"{path} changed while it was read ({before.st_size} bytes before, {after.st_size} now): wait until it is "
            "complete, then run the same command again"
        )


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked as they are read; gzip and zstd are recognised by their first bytes.

    Raises:
        DataError: There is no such file, it holds something else than data, or its packing is damaged.
    """
    check_file(path)
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("rb", buffering=0))
            stream: io.BufferedReader = io.BufferedReader(file, BLOCK)
            if packed := stream.peek(4).startswith((_GZIP, _ZSTD)):
                stream = stack.enter_context(_unpacked(stream))
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


def _unpacked(stream: io.BufferedReader) -> io.BufferedReader:
    if stream.peek(4).startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=stream), BLOCK)
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(stream, "zstd"), BLOCK)


def _sniff(path: Path, start: bytes) -> None:
    for magic, what in _OTHER_MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{path} is {what}")
    for words, what in NOT_DATA.items():
        if start.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(words):
            raise DataError(f"{path} is {what}")


def decoded(stream: io.BufferedReader, path: Path) -> Iterator[str]:
    """Blocks of text, without a byte order mark.

    Raises:
        DataError: The bytes are not UTF-8; what stands before the first wrong byte is given first.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = stream.read(64)
    if _is_utf16(start):
        raise not_utf8(start, start.find(0) if start[0] < 128 else 0, 0, path)
    offset = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    block = start[offset:] + stream.read(BLOCK)
    while True:
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            if error.start:
                yield error.object[: error.start].decode()
            raise not_utf8(error.object, error.start, offset - pending, path) from error
        if text:
            yield text
        if not block:
            return
        offset += len(block)
        block = stream.read(BLOCK)


def not_utf8(raw: bytes, position: int, offset: int, path: Path) -> DataError:
    """The error for bytes that are no UTF-8.

    Args:
        raw: Some of them.
        position: Of the wrong byte in `raw`.
        offset: Of `raw` in the file.
        path: Of the file.
    """
    encoding = "UTF-16" if _is_utf16(raw) else "GBK" if _is_paired(raw[position : position + 4096]) else "CP1252"
    return DataError(
        f"{path} is not UTF-8: byte 0x{raw[position]:02x} at offset {offset + position}; it may be {encoding}, so "
        f"convert it first, for example: iconv -f {encoding} -t UTF-8 {path.name}"
    )


def _is_utf16(raw: bytes) -> bool:
    """By its mark; without one, Latin letters have a zero in every second byte."""
    start = raw[:64]
    return start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start.count(0) > len(start) / 4


def _is_paired(raw: bytes) -> bool:
    """Whether bytes above 127 mostly come in pairs, as in Chinese text and not in accented Latin."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", raw)]
    return sum(length for length in runs if length % 2 == 0) > sum(runs) / 2
