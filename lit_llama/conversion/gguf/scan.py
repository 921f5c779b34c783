"""The head of a GGUF file: its metadata, and where each tensor lies. No byte of it is believed before it is checked.

Layout: the GGUF specification of ggml. A count or a length from the file is used only once it is known to fit into the
bytes that are left, so that a hostile file costs neither time nor memory. A model may lie in parts, as llama-gguf-split
writes them (NAME-00001-of-00003.gguf).
"""

import math
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lit_llama.errors import CheckpointError
from lit_llama.wording import param

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 20
_MAX_ENTRIES = 1 << 16  # keys, or tensors: the largest LLaMA has 1138 tensors
_MAX_ITEMS = 1 << 21  # of all arrays together: Llama 3 has 128256 tokens, as many types, and 280147 merges
_MAX_HEADER = 1 << 27  # bytes
_MAX_KEY, _MAX_NAME, _MAX_DIMENSIONS = 65535, 64, 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Extent:
    """Place of a tensor in the file.

    Args:
        kind: How its values are stored.
        shape: In rows first, as torch counts.
        offset: Of its first byte in the file.
        size: In bytes.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """Everything that stands before the weights.

    Args:
        metadata: Values by key; arrays are lists.
        tensors: By the names of the file.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Extent]


def scan(path: Path) -> Header:
    """Read the head of a GGUF file.

    Raises:
        CheckpointError: It is none, of another version, cut off, or says what cannot be.
    """
    with path.open("rb") as file:
        start = file.read(64)
        if start[:4] != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it starts with {start[:16]!r}, expected {MAGIC!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            try:
                return cursor.header()
            except UnicodeDecodeError as error:
                raise cursor.wrong(f"text is not UTF-8: {error.reason}") from error


class _Cursor:
    """Walks through a file and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.at, self.end = len(MAGIC), min(len(data), _MAX_HEADER)
        self.items = 0

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be read: {what} (at byte {self.at} of {len(self.data)})")

    def skip(self, count: int) -> int:
        """Step over `count` bytes; gives where they start."""
        if count > self.end - self.at:
            raise self.wrong(f"the file is cut off or damaged, {count} more bytes are announced")
        self.at += count
        return self.at - count

    def number(self, kind: str) -> Any:
        return struct.unpack_from("<" + kind, self.data, self.skip(struct.calcsize("<" + kind)))[0]

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """A number of things that take up `least_bytes` each or more."""
        number: int = self.number("Q")
        if number > most or number * least_bytes > self.end - self.at:
            raise self.wrong(f"{number} {what} are announced, which cannot be")
        return number

    def text(self, most: int = _MAX_HEADER) -> str:
        length = self.count("bytes of text", most, 1)
        start = self.skip(length)
        return self.data[start : start + length].decode()

    def header(self) -> Header:
        version = self.number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "is big-endian" if swapped in _VERSIONS else f"is of version {version}"
            raise self.wrong(f"it {what}, expected version 2 or 3 in little-endian")
        tensors = self.count("tensors", _MAX_ENTRIES, 24)
        keys = self.count("keys", _MAX_ENTRIES, 13)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text(_MAX_KEY)
            if key in metadata:
                raise self.wrong(f"{key!r} is there twice")
            metadata[key] = self.value(self.number("I"))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self.text(_MAX_NAME)
            if name in infos:
                raise self.wrong(f"tensor {name!r} is there twice")
            infos[name] = self.shape(name), self.number("I"), self.number("Q")
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.wrong(f"general.alignment is {alignment!r}, expected a power of two up to {_MAX_ALIGNMENT}")
        return Header(metadata, self.extents(infos, alignment))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array(self.number("I"))
        if kind not in _SCALARS:
            raise self.wrong(f"a value is of type {kind}, which is unknown")
        value = self.number(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def array(self, kind: int) -> list[Any]:
        if kind != _STRING and kind not in _SCALARS:
            what = "arrays" if kind == _ARRAY else f"type {kind}"
            raise self.wrong(f"an array is of {what}, which is not implemented")
        item = np.dtype(_SCALARS.get(kind, "Q")).newbyteorder("<")  # a text is at least its length
        count = self.count("items of an array", _MAX_ITEMS - self.items, item.itemsize)
        self.items += count
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        start = self.skip(count * item.itemsize)
        values = np.frombuffer(self.data[start : self.at], item)
        return list((values != 0).tolist() if kind == _BOOL else values.tolist())

    def shape(self, name: str) -> tuple[int, ...]:
        dimensions = self.number("I")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise self.wrong(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        if not all(shape):
            raise self.wrong(f"tensor {name!r} has no values: {shape}")
        return shape[::-1]  # the file counts the contiguous one first

    def extents(self, infos: dict[str, tuple[tuple[int, ...], int, int]], alignment: int) -> dict[str, Extent]:
        """Where the tensors lie: aligned, inside the file, none in another."""
        base = math.ceil(self.at / alignment) * alignment
        extents = {}
        for name, (shape, number, offset) in infos.items():
            if number not in GGML_QUANT_SIZES:
                raise self.wrong(f"tensor {name!r} is of type {number}, which is unknown")
            kind = GGMLQuantizationType(number)
            values, size = GGML_QUANT_SIZES[kind]
            if shape[-1] % values:
                raise self.wrong(f"tensor {name!r} has rows of {shape[-1]} values, {kind.name} packs {values}")
            if offset % alignment:
                raise self.wrong(f"tensor {name!r} starts at {offset}, which is no multiple of {alignment}")
            extents[name] = Extent(kind, shape, base + offset, math.prod(shape) // values * size)
        last, end = "", base
        for name, extent in sorted(extents.items(), key=lambda item: item[1].offset):
            if extent.offset < end and last:
                raise self.wrong(f"tensors {last!r} and {name!r} overlap")
            last, end = name, extent.offset + extent.size
            if end > len(self.data):
                raise self.wrong(f"tensor {name!r} ends {end - len(self.data)} bytes after the end of the file")
        return extents


PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SHOWN = 8  # most names in a message


@dataclass(frozen=True)
class Files:
    """Contents of all parts together.

    Args:
        metadata: Of the first part.
        tensors: File and extent of each tensor, by the names of the files.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[Path, Extent]]


def model_name(name: str) -> str:
    """Return the name of a model's file without number and suffix."""
    match = PART.fullmatch(name)
    return match["stem"] if match else name.removesuffix(".gguf")


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a model by that of one; a file that is no part is its only one."""
    match = PART.fullmatch(name)
    if not match:
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def first_parts(names: Iterable[str]) -> list[str]:
    """Return the only or first part of each model among the names of GGUF files."""
    return sorted(name for name in names if part_names(name)[:1] == [name])


def only_model(folder: Path) -> Path | None:
    """Return the GGUF model in a folder; None if it holds no GGUF file.

    Raises:
        CheckpointError: There are several models.
    """
    found = [path.name for path in folder.iterdir() if path.suffix == ".gguf" and path.is_file()]
    models = sorted({part_names(name)[0] for name in found if part_names(name)})
    if len(models) > 1:
        shown = ", ".join(models[:_SHOWN]) + (" ..." if len(models) > _SHOWN else "")
        raise CheckpointError(f"{param('source')}: {folder} holds several GGUF models, name one of its files: {shown}")
    return folder / next(name for name in sorted(found)) if models else None


def read_parts(path: Path) -> Files:
    """Read the heads of all parts of a model.

    Args:
        path: Its file, or any of its parts.

    Raises:
        CheckpointError: A part is missing, of another model, or holds what another holds, too.
    """
    header = scan(path)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return Files(header.metadata, {name: (path, extent) for name, extent in header.tensors.items()})
    names = part_names(path.name)
    if len(names) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, so its name should end in -NNNNN-of-{count:05}.gguf, as those of the "
            "others beside it: give all parts the names that they were published under"
        )
    if lost := [name for name in names if not (path.parent / name).is_file()]:
        shown = ", ".join(lost[:_SHOWN]) + (" ..." if len(lost) > _SHOWN else "")
        raise CheckpointError(f"{path}: {len(lost)} of {count} parts are not beside it: {shown}; download them, too")
    metadata: dict[str, Any] = {}
    tensors: dict[str, tuple[Path, Extent]] = {}
    for index, part in enumerate(path.parent / name for name in names):
        header = scan(part)
        _check_part(part, header.metadata, index, count)
        metadata = metadata or header.metadata
        for name, extent in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{part}: tensor {name} is in {tensors[name][0].name}, too")
            tensors[name] = part, extent
    announced = metadata.get("split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise CheckpointError(f"{path}: its {count} parts hold {len(tensors)} tensors, expected {announced}")
    return Files(metadata, tensors)


def _check_part(path: Path, metadata: Mapping[str, Any], index: int, count: int) -> None:
    for key, wanted in {"split.no": index, "split.count": count}.items():
        if metadata.get(key) != wanted:
            raise CheckpointError(
                f"{path}: {key} is {metadata.get(key)!r}, expected {wanted} by its name: it is a part of another "
                "model, or was renamed; download it again"
            )
