"""Parquet files, folders that the datasets library has saved, and data sets of the Hub: Arrow tables as rows."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_llama.console import is_heard
from lit_llama.errors import DataError, ResourceError, UserError
from lit_llama.text.read.formats.files import most_unpacked
from lit_llama.text.read.formats.parquet import BATCH, batches, check_parquet, open_parquet
from lit_llama.text.read.formats.paths import ENDINGS, plain_suffix
from lit_llama.text.read.raw import LONGEST, RawRow, shown

MAGIC = b"PAR1"
_CALLS = {"tool_calls", "function_call", "tools", "function", "arguments", "parameters"}
_REPO = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?(?:#[\w.\[\]:%+-]+)?", re.ASCII)


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Read the rows of a Parquet file.

    Raises:
        DataError: It is none, damaged, or of a kind that Arrow cannot read.
    """
    with _explained(path):
        check_parquet(path, LONGEST, most_unpacked(path))
        with open_parquet(path) as file:
            yield from _rows(batches(file), file.schema_arrow.names, str(path))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A DataError for what Arrow says about a damaged file."""
    import pyarrow as pa

    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(-min(4, path.stat().st_size), 2)
            end = file.read()
        if start[:2] == b"\x1f\x8b" or start == b"\x28\xb5\x2f\xfd":
            problem = "is Parquet and packed once more: unpack it, since Parquet packs its columns itself"
        elif start != MAGIC:
            problem = f"is no Parquet file: it begins with {start!r}, expected {MAGIC!r}"
        elif end != MAGIC:
            problem = f"is cut off: it ends with {end!r}, expected {MAGIC!r}; fetch it again"
        else:
            problem = f"cannot be read as Parquet: {_first_line(error)}; fetch it again"
        raise DataError(f"{path} {problem}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _rows(tables: Iterator[Any], names: list[str], name: str) -> Iterator[RawRow]:
    """Rows of record batches or tables."""
    if twice := next((column for column in names if names.count(column) > 1), None):
        raise DataError(f"{name}: the column {shown(twice)} stands there twice; rename one")
    row = 0
    for batch in tables:
        for value in _values(batch):
            where = f"{name}:row {row}"
            yield RawRow(where, value) if isinstance(value, dict) else RawRow.bad(where, value)
            row += 1
    if not row:
        raise DataError(f"{name} holds no rows")


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; instead of one that Python has no value for, what is wrong with it."""
    padded = [field.name for field in batch.schema if _has_padding(field.type)]
    try:
        for found in batch.to_pylist():
            yield found | {name: _without_padding(found[name]) for name in padded} if padded else found
        return
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond the year 9999
        pass
    for index in range(batch.num_rows):
        row: dict[str, Any] = {}
        for name in batch.column_names if hasattr(batch, "column_names") else batch.schema.names:
            try:
                value = batch.column(name)[index].as_py()
                row[name] = _without_padding(value) if name in padded else value
            except UnicodeDecodeError as error:
                yield f"field {name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
                break
            except (ValueError, OverflowError) as error:
                yield f"field {name} is of type {batch.schema.field(name).type}, which cannot be read: {error}"
                break
        else:
            yield row


def _has_padding(kind: Any) -> bool:
    """Whether a column holds tools or calls: objects that each have the arguments of all in Arrow."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    return not _CALLS.isdisjoint(field.name for field in kind.value_type)


def _without_padding(value: Any) -> Any:
    """A value without the fields of objects that are null, as no other program can tell those from missing ones."""
    if isinstance(value, dict):
        return {name: _without_padding(inner) for name, inner in value.items() if inner is not None}
    return [_without_padding(inner) for inner in value] if isinstance(value, list) else value


def open_saved(path: Path) -> Mapping[str | None, Any]:
    """Open the splits of a folder that the datasets library has saved; a folder without splits has the one named None.

    Raises:
        DataError: The library cannot open it.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library comes across in damaged files
        raise DataError(f"{path} cannot be opened as a folder of the datasets library: {_first_line(error)}") from error
    return dict(saved) if isinstance(saved, dict) else {None: saved}


def is_hub_id(source: str) -> bool:
    """Whether a source that is no path reads as OWNER/NAME, with :CONFIGURATION and #SPLIT where they are wanted."""
    if plain_suffix(Path(source)) in (*ENDINGS, ".txt") or os.path.lexists(source.partition("/")[0]):
        return False
    return bool(_REPO.fullmatch(source))


@contextlib.contextmanager
def _bars(datasets: Any) -> Iterator[None]:
    """Bars of the datasets library, only where anybody hears what goes on."""
    silenced = not is_heard() and not datasets.are_progress_bars_disabled()
    if silenced:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            datasets.enable_progress_bars()


def open_hub(source: str) -> Mapping[str | None, Any]:
    """Open the splits of a data set of the Hub, downloaded or from the cache.

    Raises:
        UserError: There is no such data set, configuration or split.
        ResourceError: It cannot be downloaded.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from httpx2 import HTTPError

    address, _, split = source.partition("#")
    repo, _, configuration = address.partition(":")
    try:
        with _bars(datasets):
            loaded = datasets.load_dataset(repo, configuration or None, split=split or None)
    except DatasetNotFoundError as error:
        raise UserError(
            f"{source} is neither a file or folder here (working folder: {Path.cwd()}) nor a data set of the Hub that "
            f"can be read: {_first_line(error)}; check the spelling, and `hf auth login` if it is private"
        ) from error
    except (ValueError, RuntimeError, DatasetsError) as error:  # no such configuration or split, a script, odd files
        raise UserError(
            f"{source}: {' '.join(str(error).split())[:400]}; name a configuration as {repo}:NAME, a split as "
            f"{repo}#NAME"
        ) from error
    except (OSError, HTTPError) as error:  # ConnectionError, too
        raise ResourceError(
            f"{source} is no file or folder here (working folder: {Path.cwd()}), and cannot be fetched from the Hub: "
            f"{_first_line(error)}; connect, unset HF_HUB_OFFLINE, or fetch its files elsewhere and name their folder"
        ) from error
    return {split: loaded} if split else dict(loaded)


def read_dataset(dataset: Any, name: str, split: str | None = None) -> Iterator[RawRow]:
    """Read the rows of one split.

    Args:
        dataset: The split.
        name: Where it comes from, for messages.
        split: Its name.
    """
    name = f"{name}/{split}" if split else name
    try:
        tables = map(_proven, dataset.with_format("arrow").iter(BATCH))
        yield from _rows(tables, dataset.column_names, name)
    except DataError:
        raise
    except (OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise DataError(f"{name} cannot be read: {_first_line(error)}; fetch it again") from error


def _proven(table: Any) -> Any:
    """A table whose offsets lie within it: a damaged file may say otherwise, and Arrow believes it."""
    table.validate(full=True)
    return table


def hash_dataset(dataset: Any) -> str:
    """Hash the bytes of the files behind one split with SHA-256."""
    digest = hashlib.sha256()
    for file in dataset.cache_files:
        with open(file["filename"], "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
