"""Tensors in files: where each one lies, and reading all of it or some rows; shards.py writes them.

Files are read by offset, so memory holds what was asked for and nothing else.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_llama.errors import CheckpointError, WeightsNotFiniteError
from lit_llama.model.files.names import tidy
from lit_llama.model.files.stacked import Part, unstacked
from lit_llama.objects import as_object, read_text
from lit_llama.wording import call

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of the dtypes in a safetensors header."""

Spec = tuple[str, tuple[int, ...]]
"""Name of a dtype and a shape."""

SPANS, SPAN = 32, 128
"""Of a large tensor, so many spans of so many values are looked at whenever it is read, evenly over all of it."""
_PART = 1 << 22
"""Values that are looked at at a time where all are."""


def check_finite(tensor: Tensor, name: str, path: Path, *, whole: bool = False) -> None:
    """Refuse a tensor whose values are not finite, before it spoils whatever is computed with it.

    Args:
        tensor: Of any dtype, as it was read; small ones are looked at whole, of others a sample that costs next to
            nothing beside reading them.
        name: Its name in the file.
        path: The file.
        whole: Look at all of it.

    Raises:
        WeightsNotFiniteError: A value is infinite or not a number.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    flat = tensor.detach().reshape(-1)
    if whole or len(flat) <= SPANS * SPAN:
        parts: Iterable[Tensor] = flat.split(_PART)
    else:
        parts = [flat.as_strided((SPANS, SPAN), ((len(flat) - SPAN) // (SPANS - 1), 1), flat.storage_offset())]
    # A sum is finite where all values are, in numbers of more range than theirs; it is quicker than a look at each.
    wide = torch.float64 if tensor.dtype in (torch.float32, torch.float64, torch.bfloat16) else torch.float32
    if all(math.isfinite(part.sum(dtype=wide).item()) for part in parts):
        return
    bad = int((~flat.float().isfinite()).sum())
    raise WeightsNotFiniteError(
        f"{path}: {bad:,} of the {len(flat):,} values of {name} are not finite (NaN or infinite), so nothing that is "
        "computed with them is; download or convert it again, or take the save before it"
    )


@dataclass(frozen=True)
class Stored:
    """Place of a tensor in a file.

    Args:
        path: The file.
        offset: Of its first element, in bytes.
        dtype: Of its elements, little-endian.
        shape: Its shape.
        stride: In elements per dimension; None if row follows row.
        name: In the file, where values are to be refused that are not finite; else it is read bit by bit.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    name: str = field(default="", compare=False)

    @property
    def size(self) -> int:
        """Bytes from the first element to the last."""
        if not math.prod(self.shape):
            return 0
        steps = zip(self.shape, self.stride or _contiguous(self.shape), strict=True)
        return self.dtype.itemsize * (1 + sum((size - 1) * step for size, step in steps))

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Copy rows start to stop (of the first dimension), or the whole tensor, into memory.

        Raises:
            CheckpointError: The file ends before them, or they are not finite, see `check_finite`.
        """
        shape, offset = self.shape, self.offset
        stride = self.stride or _contiguous(shape)
        if shape:
            stop = shape[0] if stop is None else stop
            assert 0 <= start <= stop <= shape[0], (start, stop, shape)
            shape, offset = (stop - start, *shape[1:]), offset + start * stride[0] * self.dtype.itemsize
        if not math.prod(shape):
            return torch.empty(shape, dtype=self.dtype)
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        storage = torch.empty(extent, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            view = storage.view(torch.uint8).numpy().data
            while view and (count := file.readinto(view)):
                view = view[count:]
        if view:
            raise CheckpointError(f"{self.path} is cut off: it ends {len(view)} bytes before the end of a tensor")
        if self.name:
            check_finite(storage, self.name, self.path)
        return storage.as_strided(shape, stride).contiguous()


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name, read from the mapped files when asked for.

    Names are those of the model: what wrappers put before them is taken off, old buffers are left out, and stacked
    matrices of experts are told apart.

    Attributes:
        files: The file that holds each tensor.
        remarks: What was passed over or renamed, for people.

    Raises:
        CheckpointError: Files are missing, unreadable, or do not hold what the index says.
    """

    def __init__(self, folder: Path) -> None:
        files = weight_files(folder)
        self._open = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        for path in sorted(set(files.values())):
            try:
                self._open[path] = safe_open(path, framework="pt")  # the package checks the whole header
            except (SafetensorError, OSError) as error:
                raise _unreadable(path, error) from error
            listed = {name for name, file in files.items() if file == path}
            check_names(path, listed, dict.fromkeys(self._open[path].keys()))
        tidied = tidy(folder, files)

        def shape(name: str) -> tuple[int, ...]:
            stored = tidied.names[name]
            return tuple(self._open[files[stored]].get_slice(stored).get_shape())

        found = unstacked(folder, tidied.names, shape)
        self._stored = {name: tidied.names[whole] for name, (whole, _) in found.items()}
        self._parts: dict[str, Part] = {name: part for name, (_, part) in found.items() if part}
        self.files = {name: files[stored] for name, stored in self._stored.items()}
        self.remarks = (*_about_index(folder), *tidied.remarks)

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._open[self.files[name]], self._stored[name]
        if part := self._parts.get(name):
            found: Tensor = file.get_slice(stored)[part.expert, part.start : part.stop]
        else:
            found = file.get_tensor(stored)
        check_finite(found, name, self.files[name])
        return found

    def read(self, name: str) -> Tensor:
        """Read the tensor into memory of its own: pages of a mapped file count as memory of the process, too, for as
        long as anything of the file is held.
        """
        path, stored = self.files[name], self._stored[name]
        if path not in self._headers:
            self._headers[path] = read_header(path)
        start, header = self._headers[path]
        entry = header[stored]
        if entry["dtype"] not in DTYPES:
            return self[name]
        return self._place(name, start, entry).read()

    def _place(self, name: str, start: int, entry: Mapping[str, Any]) -> Stored:
        """Where a tensor lies, of which a header has an entry."""
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        offset = start + entry["data_offsets"][0]
        if part := self._parts.get(name):
            _, rows, columns = shape
            offset += (part.expert * rows + part.start) * columns * dtype.itemsize
            shape = part.stop - part.start, columns
        return Stored(self.files[name], offset, dtype, shape, name=name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def spec(self, name: str) -> Spec:
        """Return the name of the dtype, and the shape, without reading the tensor."""
        whole = self._open[self.files[name]].get_slice(self._stored[name])
        shape = tuple(whole.get_shape())
        part = self._parts.get(name)
        return whole.get_dtype(), (part.stop - part.start, shape[2]) if part else shape

    def locate(self) -> dict[str, Stored]:
        """Locate every tensor, for reading without mapping.

        Raises:
            CheckpointError: A tensor is of another dtype than F32, F16 or BF16.
        """
        names: dict[str, list[str]] = {}
        for name, stored in self._stored.items():
            names.setdefault(stored, []).append(name)
        places = {}
        for path in sorted(set(self.files.values())):
            start, header = read_header(path)
            for stored, entry in header.items():
                for name in names.get(stored, []):
                    if entry["dtype"] not in DTYPES:
                        wanted = ", ".join(DTYPES)
                        raise CheckpointError(f"{path}: {name} is stored as {entry['dtype']}, expected {wanted}")
                    places[name] = self._place(name, start, entry)
        return places


def weight_files(folder: Path) -> dict[str, Path]:
    """Find the file of each tensor. Of a single file and an index the file counts, as in transformers: a save into a
    folder leaves an older index behind.

    Raises:
        CheckpointError: There are no weights, or the index names files that are not there.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file() and not single.is_file():
        return read_index(index)
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise _unreadable(single, error) from error
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["no such folder"]
    hint = ""
    if any(name.endswith((".bin", ".pth")) for name in names):
        hint = (
            "; bring the weights into this layout: "
            f"{call('convert', source=folder, destination_path=f'{folder}-converted')}. A delta is added to its base "
            "as it "
            f"is, with {call('add_delta')}"
        )
    found = ", ".join(names[:8]) or "nothing"
    raise CheckpointError(f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE} (found: {found}){hint}")


def _about_index(folder: Path) -> list[str]:
    """What to say where an index stands beside the single file that counts."""
    index = folder / INDEX_FILE
    if not index.is_file() or not (folder / SINGLE_FILE).is_file():
        return []
    try:
        others = sorted({path.name for path in read_index(index).values()} - {SINGLE_FILE})
        what = f"{', '.join(others[:2])}{' ...' if others[2:] else ''}, which are there as well" if others else ""
    except CheckpointError:
        what = "files that are not all there"
    if not what:
        return []
    way = f"remove {INDEX_FILE} and its files, or {SINGLE_FILE} if it is the older save"
    return [f"{folder}: {SINGLE_FILE} is used, as transformers does; {INDEX_FILE} beside it names {what}: {way}"]


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is {describe_wrong_file(path) or f'not a readable safetensors file: {error}'}")


def describe_wrong_file(path: Path) -> str | None:
    """Describe what lies where weights should, with the way out; None if it may be weights.

    Nothing but a regular file is opened: reading a pipe would wait for ever.
    """
    if not path.is_file():
        return "a folder or device, expected a file" if path.exists() else "missing: download it again"
    with path.open("rb") as file:
        start = file.read(256)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "empty: download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer and not the weights: fetch them with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page and not the weights: download it again, logged in if the model asks for it"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in start) and start.isascii():
        kind = "JSON" if text[:1] in (b"{", b"[") else "text"
        return f"{kind} and not weights ({start[:60]!r}): download it again"
    return None


def read_index(index: Path) -> dict[str, Path]:
    """Read the file of each tensor from model.safetensors.index.json or pytorch_model.bin.index.json.

    Raises:
        CheckpointError: It is no index, or names something that is no plain file beside it.
    """
    try:
        names = dict(as_object(read_text(index))["weight_map"])
        files = set(names.values())
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of weights: {error!r}") from error
    folder = index.parent
    plain = {name for name in files if isinstance(name, str) and name and Path(name).name == name and "\0" not in name}
    for file in files:
        # The name comes from data: it may only be a plain file beside the index, and stay there.
        if file not in plain or not _lies_in(folder, file):
            missing = sorted(f for f in plain if not _lies_in(folder, f))
            hint = f"; missing are {', '.join(missing)}: download them again" if file in missing else ""
            raise CheckpointError(f"{index} names {file!r}, which is no file in {folder}{hint}")
    return {name: folder / file for name, file in names.items()}


def _lies_in(folder: Path, file: str) -> bool:
    """A regular file, whose target may only leave the folder as the cache of the Hub links it: to a blob of its own."""
    path = folder / file
    if len(file.encode("utf-8", "replace")) > 255 or not path.is_file():  # longer than any name of a file
        return False
    target = path.resolve()
    home = folder.resolve()
    return target.parent == home or (path.is_symlink() and home.parent.parent / "blobs" == target.parent)


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Read where the data of a safetensors file starts, and its table of tensors."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size if size <= 100_000_000 else 0))  # the format's own limit
        except ValueError as error:
            raise _unreadable(path, error) from error
    header.pop("__metadata__", None)
    return 8 + size, header


def byte_size(spec: Spec) -> int:
    """Return the bytes of a tensor."""
    return DTYPES[spec[0]].itemsize * math.prod(spec[1])


def check_names(path: Path, expected: set[str], found: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the tensors found are exactly those expected."""
    missing, unknown = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing or unknown:
        parts = [
            f"{len(names)} {what} ({names[0]} ...)"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{path}: tensors do not fit the model: {', '.join(parts)}")
