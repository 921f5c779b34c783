"""torch's zip files (.pth, .bin): where their tensors lie, and writing one tensor by tensor.

torch.load is never called: zipfile opens the archive, pickled.py reads its pickle, and tensors are read by offset,
since every entry is stored uncompressed.
"""

import io
import json
import math
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lit_llama.errors import CheckpointError
from lit_llama.model.files.pth.pickled import MAX_BYTES, STORAGES, Items, View, kind_of, read_pickle
from lit_llama.model.files.weights import DTYPES, Spec, Stored, describe_wrong_file
from lit_llama.progress import track

WRAPPERS = ("model", "state_dict", "module")
"""Keys under which Fabric, Lightning and litgpt, DeepSpeed put the state dict."""

_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x2041
_MAX_DIRECTORY = 4 * 2**20
"""Bytes of the archive's table of contents; 16,000 tensors take less than half of it."""
_MAX_EXPANDED = 64 * 2**20
"""Bytes that a tensor of repeated numbers may always have."""
_MAX_DIMENSIONS = 64
_BLOCK = 16 * 2**20
_ALIGNMENT = 64
_ZIP64 = 2**30
"""Entries above this size are written with the long header; the format needs it from 4 GB."""


def read_pth(path: Path, *, verify: bool = True) -> dict[str, Stored]:
    """Read where the tensors of a torch file lie, without running or loading anything.

    Args:
        path: A file as torch.save writes it: a dict of tensors, bare or under "model", "state_dict" or "module". Other
            values beside the tensors are passed over.
        verify: Compare the checksums of the tensors, which reads the whole file.

    Raises:
        CheckpointError: It is anything else.
    """
    with _explained(path):
        if wrong := describe_wrong_file(path):
            raise CheckpointError(f"{path} is {wrong}")
        with path.open("rb") as file:
            return _read(path, file, verify)


def _read(path: Path, file: BinaryIO, verify: bool) -> dict[str, Stored]:
    _check_container(path, file)
    root, entries = _entries(path, file)
    small = [entry for name, entry in entries.items() if not name.startswith("data/")]
    _verify(path, file, small if not verify else list(entries.values()))
    if "byteorder" in entries and (order := _content(file, entries["byteorder"], 16)) != b"little":
        raise _unusable(path, f"its byteorder is {order!r}, only 'little' is supported")
    content = read_pickle(_content(file, entries["data.pkl"], MAX_BYTES), f"{path}: {root}/data.pkl")
    return {name: _stored(path, name, view, entries) for name, view in _state_dict(path, content).items()}


def _unusable(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no torch file that can be used: {what}; expected one as torch.save writes it: download it again, "
        "or get the weights as .safetensors"
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """zipfile raises whatever its parsing runs into; a user is told which file."""
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, EOFError, struct.error) as error:
        raise _unusable(path, f"it is cut off or damaged ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _check_container(path: Path, file: BinaryIO) -> None:
    start = file.read(512)
    if start.startswith(_MAGIC):
        return
    if start[257:262] == b"ustar":  # torch reads these only by running their pickles
        raise _unusable(path, "it is in the tar format of torch before 0.4")
    if start.startswith(b"\x80"):
        new = path.with_name(f"{path.stem}.new{path.suffix}")
        code = f"import torch; torch.save(torch.load({_quoted(path)}, weights_only=True), {_quoted(new)})"
        raise CheckpointError(
            f"{path} is in the format of torch before 1.6, expected its zip format; write it anew with: "
            f"python -c {shlex.quote(code)}"
        )
    raise _unusable(path, f"it starts with {start[:8]!r}")


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


@dataclass(frozen=True)
class _Entry:
    """A file in the archive: where its bytes lie; a checksum of 0 was not computed."""

    name: str
    offset: int
    size: int
    crc: int


class _Directory(io.BufferedReader):
    """The file as zipfile sees it, which reads a table of contents of any size that the file names."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its table of contents has {size} bytes, at most {_MAX_DIRECTORY} are read")
        return super().read(_MAX_DIRECTORY if size is None or size < 0 else size)


def _entries(path: Path, file: BinaryIO) -> tuple[str, dict[str, _Entry]]:
    """Name of the root folder, and what lies in it by name."""
    try:
        with _Directory(io.FileIO(path)) as handle, zipfile.ZipFile(handle) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except (OSError, ValueError) as error:  # a seek to before the start, a name that is no text
        raise zipfile.BadZipFile(str(error)) from error
    roots = {info.filename.split("/")[0] for info in infos}
    if len(roots) != 1:
        raise _unusable(path, f"it has {len(roots)} root folders, expected one")
    root = roots.pop()
    entries: dict[str, _Entry] = {}
    end = 0
    for info in infos:
        entry = _entry(path, file, info)
        name = entry.name.removeprefix(f"{root}/")
        if name in entries or info.header_offset < end:
            raise _unusable(path, f"two entries {entry.name!r}" if name in entries else "its entries overlap")
        entries[name] = entry
        end = entry.offset + entry.size
    if end > path.stat().st_size:
        raise _unusable(path, "it is cut off")
    if "data.pkl" not in entries:
        raise _unusable(path, f"it has no {root}/data.pkl")
    return root, entries


def _entry(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> _Entry:
    named = f"its entry {info.orig_filename[:100]!r}"
    if info.filename != info.orig_filename or {"", ".", ".."} & set(info.filename.split("/")) or "\\" in info.filename:
        raise _unusable(path, f"{named} has no plain name")
    if info.flag_bits & _ENCRYPTED:
        raise _unusable(path, f"{named} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _unusable(path, f"{named} is compressed")
    file.seek(info.header_offset)
    magic, _, flags, method, *_, name_size, extra_size = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    same = file.read(name_size) == info.filename.encode()
    if magic != _MAGIC or not same or method != zipfile.ZIP_STORED or flags & _ENCRYPTED:
        raise _unusable(path, f"{named} is another one where it lies")
    offset = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    return _Entry(info.filename, offset, info.file_size, info.CRC)


def _content(file: BinaryIO, entry: _Entry, limit: int) -> bytes:
    if entry.size > limit:
        raise zipfile.BadZipFile(f"{entry.name} has {entry.size} bytes, at most {limit} are read")
    file.seek(entry.offset)
    return file.read(entry.size)


def _verify(path: Path, file: BinaryIO, entries: list[_Entry]) -> None:
    blocks = [(entry, start) for entry in entries if entry.crc for start in range(0, entry.size, _BLOCK)]
    crc = 0
    for entry, start in track(blocks, f"checking {path.name}"):
        file.seek(entry.offset + start)
        crc = zlib.crc32(file.read(min(_BLOCK, entry.size - start)), crc if start else 0)
        if start + _BLOCK >= entry.size and crc != entry.crc:
            raise _unusable(path, f"the checksum of {entry.name} is {crc:08x}, expected {entry.crc:08x}")


def _state_dict(path: Path, content: Any) -> dict[str, View]:
    """The tensors by name, at the top or one dict below."""
    top = _named(path, content)
    found = {key: _named(path, top[key]) for key in WRAPPERS if isinstance(top.get(key), Items)}
    states = {key: state for key, state in {"": top, **found}.items() if _views(state)}
    if len(states) != 1:
        places = " and ".join(repr(key) if key else "the top" for key in states) or "nowhere"
        keys = ", ".join(repr(key)[:50] for key in list(top)[:8])
        expected = ", ".join(map(repr, WRAPPERS))
        raise _unusable(path, f"its tensors are at {places} (keys: {keys}), expected at the top or one of {expected}")
    return _views(*states.values())


def _named(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, Items):
        raise _unusable(path, f"it holds a {kind_of(content)} and no dict")
    named: dict[str, Any] = {}
    for key, value in content.pairs:
        if not isinstance(key, str) and isinstance(value, View):
            raise _unusable(path, f"a tensor is named by a {kind_of(key)}")
        if isinstance(key, str):
            if key in named:
                raise _unusable(path, f"two values {key[:100]!r}")
            named[key] = value
    return named


def _views(state: Mapping[str, Any]) -> dict[str, View]:
    return {name: value for name, value in state.items() if isinstance(value, View)}


def _stored(path: Path, name: str, view: View, entries: Mapping[str, _Entry]) -> Stored:
    storage, named = view.storage, f"tensor {name[:100]!r}"
    entry = entries.get(f"data/{storage.key}")
    if entry is None:
        raise _unusable(path, f"{named} lies in the storage {storage.key[:100]!r}, which is missing")
    itemsize = storage.dtype.itemsize
    # torch.save writes a storage to its last byte: another size is never honest.
    if storage.elements * itemsize != entry.size:
        raise _unusable(path, f"{entry.name} has {entry.size} bytes, {named} expects {storage.elements * itemsize}")
    integers = (view.offset, *view.shape, *view.stride)
    proper = all(type(n) is int and 0 <= n < 2**63 for n in integers)
    if not proper or not len(view.shape) == len(view.stride) <= _MAX_DIMENSIONS:
        raise _unusable(path, f"{named} has no proper shape, stride and offset")
    count = math.prod(view.shape)
    last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
    if count and last >= storage.elements:
        raise _unusable(path, f"{named} reaches to element {last} of a storage of {storage.elements}")
    # One number may be repeated (stride 0), but not until it fills the memory.
    if count * itemsize > max(path.stat().st_size, _MAX_EXPANDED):
        raise _unusable(path, f"{named} would unfold to {count * itemsize} bytes")
    return Stored(path, entry.offset + (view.offset * itemsize if count else 0), storage.dtype, view.shape, view.stride)


def write_pth(path: Path, specs: Mapping[str, Spec], produce: Callable[[str], Tensor]) -> None:
    """Write a torch file from tensors made one at a time.

    Args:
        path: The file, written anew; equal tensors give equal bytes.
        specs: Name of the dtype (F32, F16, BF16) and shape of each tensor, in the order to write.
        produce: Makes the tensor of a name.
    """
    with zipfile.ZipFile(path, "w") as archive:
        _write(archive, "data.pkl", _pickled(specs))
        _write(archive, "byteorder", b"little")
        for number, (name, spec) in enumerate(track(list(specs.items()), f"writing {len(specs)} tensors")):
            tensor = produce(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[spec[0]], spec[1]), name
            _write(archive, f"data/{number}", tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        _write(archive, "version", b"3\n")


def _write(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    entry.create_system = 0  # or the bytes would tell Windows from others
    entry.file_size = len(data)
    large = len(data) > _ZIP64  # the header of such an entry is 20 bytes longer
    assert archive.fp is not None
    start = archive.fp.tell() + _LOCAL_HEADER.size + len(entry.filename) + 20 * large + 4
    padding = -start % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=large) as output:
        output.write(data)


def _pickled(specs: Mapping[str, Spec]) -> bytes:
    """What torch.save would write for an OrderedDict of contiguous tensors, without its memo."""
    names = {dtype: name.split(" ")[1] for name, dtype in STORAGES.items()}
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", ordered_dict, b"("]
    for number, (name, (dtype, shape)) in enumerate(specs.items()):
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        storage_type = b"ctorch\n" + names[DTYPES[dtype]].encode() + b"\n"
        storage = b"(" + _text("storage") + storage_type + _text(str(number)) + _text("cpu") + _int(math.prod(shape))
        parts += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, b"tQ", _int(0)]
        parts += [b"(", *map(_int, shape), b"t(", *map(_int, stride), b"t", b"\x89", ordered_dict, b"tR"]
    return b"".join([*parts, b"u."])


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)
