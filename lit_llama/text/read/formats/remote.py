"""Sources that a URL names, in object stores or on servers: copied, and read as files of this machine are."""

import contextlib
import glob
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lit_llama.errors import DataError, ResourceError, UserError
from lit_llama.folder.place import check_space
from lit_llama.progress import reading
from lit_llama.text.read.formats.paths import FORMATS, Remark, is_data, plain_suffix
from lit_llama.text.read.raw import RawRow

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SERVERS = ("http", "https")


def is_url(source: str) -> bool:
    """Whether a source is a URL, as of s3://, gs://, hf:// or https://."""
    return bool(_URL.match(source))


@dataclass(frozen=True)
class Copy:
    """A file out of an object store or from a server.

    Args:
        name: Its URL, without what is secret in it.
        path: Where the copy is.
        folder: Holds the copies, and is removed with the last object that has it.
    """

    name: str
    path: Path
    folder: "tempfile.TemporaryDirectory[str]"

    def named(self, text: str) -> str:
        """Name the URL in a text, in place of the copy."""
        return text.replace(str(self.path), self.name)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Name the URL in errors of the body, in place of the copy."""
        try:
            yield
        except UserError as error:
            error.args = tuple(self.named(part) if isinstance(part, str) else part for part in error.args)
            raise

    def rows(self, read: Callable[[], Iterator[RawRow]]) -> Iterator[RawRow]:
        """Read rows of the copy; places and errors are those of the URL."""
        with self.naming():
            for row in read():
                if row.error:
                    row.error.args = tuple(self.named(str(part)) for part in row.error.args)
                yield replace(row, where=self.named(row.where))


def fetch(url: str, endings: Sequence[str], remark: Remark) -> list[Copy]:
    """Copy the file, the files of a folder or those of a pattern that a URL names, into a folder of their own.

    Args:
        url: Of any kind that fsspec knows; of a folder, files whose names end in one of `endings` are taken.
        endings: See above.
        remark: Takes what is left out.

    Raises:
        UserError: A part of a file is named that is no workbook.
        DataError: There is nothing, or not what can be read.
        ResourceError: The store or server gives no answer or refuses, a package for it is missing, or the disk is full.
    """
    shown = _shown(url)
    if urlsplit(shown).scheme in _SERVERS and (part := urlsplit(url).fragment):
        raise UserError(f"{shown} has no part #{part}: a sheet is named behind a workbook; leave it out")
    with _explained(shown):
        import fsspec

        options = {"client_kwargs": {"trust_env": True}} if urlsplit(url).scheme in _SERVERS else {}
        store, place = fsspec.url_to_fs(url, **options)
        places = _places(store, place, shown, endings, remark)
        infos = [store.info(one) for one in places]
        folder = tempfile.TemporaryDirectory(prefix="lit-llama-")
        check_space(Path(folder.name), sum(info.get("size") or 0 for info in infos))
        copies = []
        for number, (one, info) in enumerate(zip(places, infos, strict=True)):
            name = _shown(store.unstrip_protocol(one))
            path = PurePosixPath(urlsplit(name).path)
            # Beneath its folder's name, which can tell a split.
            copy = Path(folder.name, str(number), path.parent.name or "files", path.name)
            copy.parent.mkdir(parents=True)
            _copy(store, one, info.get("size"), copy, name)
            copies.append(Copy(name, copy, folder))
        return copies


def _places(store: Any, place: str, shown: str, endings: Sequence[str], remark: Remark) -> list[str]:
    """Paths of files within a store."""
    if glob.has_magic(place) and urlsplit(shown).scheme not in _SERVERS:
        found = sorted(one for one in store.glob(place) if store.isfile(one) and is_data(Path(one), remark))
        if not found:
            raise DataError(f"{shown} matches no file")
        return found
    if store.info(place)["type"] != "directory":
        return [place]
    inside = sorted(one for one in store.find(place) if "/." not in one.removeprefix(place))
    if found := [one for one in inside if plain_suffix(Path(one)) in endings and is_data(Path(one), remark)]:
        return found
    names = ", ".join(Path(one).name for one in inside[:8]) or "nothing"
    raise DataError(f"{shown} is a folder without data files (it holds {names}); expected {FORMATS}")


def _copy(store: Any, place: str, size: int | None, to: Path, name: str) -> None:
    with store.open(place, "rb") as remote, to.open("wb") as local, reading(remote, size or 0, name) as source:
        shutil.copyfileobj(source, local, 1 << 20)
        came = local.tell()
    if size is not None and came != size:
        raise ResourceError(f"{name}: {came} bytes came, expected {size}; try again")
    if not came:
        raise DataError(f"{name} is empty")


def _shown(url: str) -> str:
    """A URL without user, password and what follows the path of a server's, which can hold a key."""
    parts = urlsplit(url)
    if parts.scheme not in _SERVERS:
        # Without a password, what stands before @ can be the container of a store: abfs://container@account.
        account, _, host = parts.netloc.rpartition("@")
        return url.replace(f"{account}@{host}", host, 1) if ":" in account else url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@contextlib.contextmanager
def _explained(shown: str) -> Iterator[None]:
    """Errors of stores, which are of any kind, as one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        # Of a server that cannot be reached fsspec says so, too; the reason behind it does not come from its answer.
        cause = error.__cause__
        why = "" if cause is None or getattr(cause, "status", None) == 404 else f", or cannot be reached: {cause}"
        raise DataError(f"{shown} does not exist{why}") from error
    except ImportError as error:
        raise ResourceError(f"{shown} needs a package that is not installed: {error}") from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ResourceError(f"{shown} cannot be read: {reason}") from error
