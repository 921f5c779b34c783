"""The head of a GGUF file: its metadata, and where each tensor lies. No byte of it is believed before it is checked.

Layout: the GGUF specification of ggml. A count or a length from the file is used only once it is known to fit into the
bytes that are left, so that a hostile file costs neither time nor memory.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lit_llama.errors import CheckpointError

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
