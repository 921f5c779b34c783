"""Paths of sources: patterns and folders -> files and saved folders, each looked at before it is opened."""

import contextlib
import difflib
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lit_llama.errors import DataError

PACKED = (".gz", ".zst")
WORKBOOKS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", *WORKBOOKS)
FORMATS = (
    "JSON (.json, .jsonl, .ndjson), CSV (.csv, .tsv), Parquet (.parquet), each also as .gz or .zst, or a workbook "
    "(.xlsx, .xls, .ods)"
)
Remark = Callable[[str], None]
"""Takes a sentence about what was read otherwise than it stands; the same one may come several times."""

_DESCRIPTIONS = {
    *(
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "croissant.json",
        "croissant.jsonl",
    ),
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "package.json", "package-lock.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "trainer_state.json", "dataset-metadata.json"),
}
"""Files that stand beside data in repositories and hold none; one that is named itself is read."""


def expand(sources: Sequence[str], endings: Sequence[str] = ENDINGS, remark: Remark = lambda _: None) -> list[Path]:
    """Expand paths, patterns and folders into files and folders saved by the datasets library, each once.

    Sources stay in the order given; what one pattern or folder comes to is sorted. Of a folder, all files are taken
    whose names end in one of `endings`, those in its subfolders too; hidden and linked ones are not. Files that only
    describe a repository are left out, and remarked.

    Raises:
        DataError: A source names nothing.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        for path in _expand_one(source, endings, remark):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _expand_one(source: str, endings: Sequence[str], remark: Remark) -> list[Path]:
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
        if not (inside := _data_in(path, endings, remark)):
            names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            formats = FORMATS if endings == ENDINGS else ", ".join(endings)
            raise DataError(f"{path} is a folder without data files (it holds {names}); expected {formats}")
        return inside
    if glob.has_magic(source):
        found = sorted(glob.glob(_literal(path), recursive=True))
        if matches := [match for match in found if is_data(Path(match), remark)]:
            return [entry for match in matches for entry in _expand_one(match, endings, remark)]
        if found:
            raise DataError(f"{source} matches only {Path(found[0])} and the like, which describe a repository")
        if set("*?") & set(source):
            raise DataError(f"{source} matches no file (working folder: {Path.cwd()})")
    raise missing(path)


def _literal(pattern: Path) -> str:
    """The pattern, in which brackets in the names of folders that are there stand for themselves."""
    there = next((parent for parent in pattern.parents if parent.is_dir()), Path())
    return os.path.join(glob.escape(str(there)), pattern.relative_to(there))


def is_data(path: Path, remark: Remark) -> bool:
    """Whether a file is taken where a folder or a pattern is read: not if it describes a repository; remarked then."""
    if path.name.lower() not in _DESCRIPTIONS or path.is_dir():
        return True
    remark(f"{path} is left out: files of this name describe a repository; name it as a source if it holds rows")
    return False


def _data_in(folder: Path, endings: Sequence[str], remark: Remark) -> list[Path]:
    """Data files below a folder, and saved folders in place of their files; linked folders might lead in a circle."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or (entry.is_dir() and entry.is_symlink()):
            continue
        if entry.is_dir():
            found += [entry] if is_saved(entry) else _data_in(entry, endings, remark)
        elif plain_suffix(entry) in endings and is_data(entry, remark):
            found.append(entry)
    return found


def plain_suffix(path: Path) -> str:
    """Return the ending of a name in small letters, without that of a packer: "a.JSONL.gz" -> ".jsonl"."""
    name = Path(path.name.lower())
    return name.with_suffix("").suffix if name.suffix in PACKED else name.suffix


def is_saved(path: Path) -> bool:
    """Whether the datasets library has saved this folder."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def missing(path: Path) -> DataError:
    """Build the error for a path that is not there, with the closest name that is."""
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
