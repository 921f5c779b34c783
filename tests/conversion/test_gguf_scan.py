"""Heads of GGUF files: real ones as the gguf package reads them, hostile ones refused in few steps and bytes."""

import random
import statistics
import struct
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import tiny_model, write_tokenizer
from gguf_files import SHAPE, write_gguf

from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.gguf.scan import scan
from lit_llama.conversion.source import check_shapes
from lit_llama.errors import CheckpointError

U64 = 2**64 - 1
STRING, ARRAY, UINT32 = 8, 9, 4


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file with every kind of value."""
    folder = tmp_path_factory.mktemp("scan")
    write_tokenizer(folder)

    def more(keys: dict[str, Any]) -> None:
        keys |= {"a.bool": True, "a.float": -0.5, "a.text": "é", "a.floats": [0.5, -2.0], "a.bools": [True, False]}

    model = tiny_model(**SHAPE)
    return write_gguf(folder / "model.gguf", model, folder, "Q8_0", change_keys=more).read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str = "a", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    head = text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return head + struct.pack("<IQ", kind, offset)


def file(
    keys: list[bytes] = [],  # noqa: B006
    tensors: list[bytes] = [],  # noqa: B006
    *,
    data: int = 4096,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32 + data)


def bounded(path: Path, calls: int = 20_000, megabytes: float = 8.0) -> CheckpointError | None:
    """Read it, while calls and bytes are counted; whatever else is raised passes through."""
    made, caught = 0, None

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        scan(path)
    except CheckpointError as error:
        caught = error
    finally:
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert made < calls and peak < megabytes * 1e6, (made, peak, caught)
    return caught


def test_a_file_is_read_as_the_package_reads_it(path: Path, good: bytes) -> None:
    """Catches a value of the wrong type, an offset that is off, a shape in the wrong order."""
    path.write_bytes(good)
    header, theirs = scan(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    assert {name: type(value) for name, value in header.metadata.items()} == {n: type(v) for n, v in fields.items()}
    assert len(header.tensors) == len(theirs.tensors)
    for found in theirs.tensors:
        extent = header.tensors[found.name]
        assert (extent.kind, extent.offset, extent.size) == (found.tensor_type, found.data_offset, found.n_bytes)
        assert extent.shape == tuple(found.shape.tolist()[::-1])


def test_version_2_is_read(path: Path) -> None:
    """Catches a reader for the newest files alone."""
    path.write_bytes(file([key("a", UINT32, struct.pack("<I", 7))], [tensor()], version=2))
    assert scan(path).metadata == {"a": 7}


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is not a GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it starts with b'version https"),
    "a page": (b"<!DOCTYPE html><html>" + bytes(999), "it starts with b'<!DOCTYPE html>"),
    "an older format": (b"GGML" * 9, "is not a GGUF file"),
    "version 1": (file(version=1), "of version 1"),
    "version 99": (file(version=99), "of version 99"),
    "big-endian": (file(version=3 << 24), "is big-endian"),
    "too many tensors": (file(counts=(U64, 0)), f"{U64} tensors are announced"),
    "more tensors than bytes": (file(counts=(1000, 0)), "1000 tensors are announced"),
    "too many keys": (file(counts=(0, U64)), f"{U64} keys are announced"),
    "more keys than bytes": (file(counts=(0, 1000)), "1000 keys are announced"),
    "a long key": (file([struct.pack("<Q", U64) + bytes(64)]), f"{U64} bytes of text"),
    "a key of 70000 bytes": (file([key("k" * 70000, 0, b"0")]), "70000 bytes of text"),
    "a long text": (file([key("a", STRING, struct.pack("<Q", 2**40))]), f"{2**40} bytes of text"),
    "text in another encoding": (file([key("a", STRING, text(b"\xff\xfe"))]), "text is not UTF-8"),
    "a key twice": (file([key("a", 0, b"0"), key("a", 0, b"0")]), "'a' is there twice"),
    "an unknown type": (file([key("a", 13, b"0")]), "of type 13"),
    "a long array": (file([key("a", ARRAY, struct.pack("<IQ", 0, U64))]), f"{U64} items of an array"),
    "a million texts": (file([key("a", ARRAY, struct.pack("<IQ", STRING, 10**6))]), "1000000 items of an array"),
    "an array of arrays": (file([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 2000)]), "an array is of arrays"),
    "an array of what": (file([key("a", ARRAY, struct.pack("<IQ", 99, 1))]), "an array is of type 99"),
    "alignment 0": (file([key("general.alignment", UINT32, struct.pack("<I", 0))], [tensor()]), "alignment is 0"),
    "alignment 48": (file([key("general.alignment", UINT32, struct.pack("<I", 48))], [tensor()]), "alignment is 48"),
    "alignment 2 MiB": (file([key("general.alignment", UINT32, struct.pack("<I", 2**21))]), "alignment is 2097152"),
    "alignment in words": (file([key("general.alignment", STRING, text("32"))]), "alignment is '32'"),
    "a tensor twice": (file([], [tensor("a"), tensor("a", offset=32)]), "tensor 'a' is there twice"),
    "a long name": (file([], [tensor("n" * 65)]), "65 bytes of text"),
    "no dimension": (file([], [tensor(shape=())]), "has 0 dimensions"),
    "five dimensions": (file([], [tensor(shape=(1,) * 5)]), "has 5 dimensions"),
    "four billion dimensions": (file([], [text("a") + struct.pack("<I", 2**32 - 1)]), "dimensions"),
    "a dimension of 0": (file([], [tensor(shape=(8, 0))]), "has no values: (8, 0)"),
    "a shape beyond 64 bits": (file([], [tensor(shape=(2**32, 2**32))]), "after the end of the file"),
    "a shape far beyond": (file([], [tensor(shape=(U64,) * 4)]), "after the end of the file"),
    "an unknown packing": (file([], [tensor(kind=4)]), "of type 4"),
    "half a block": (file([], [tensor(shape=(33,), kind=8)]), "rows of 33 values, Q8_0 packs 32"),
    "an odd offset": (file([], [tensor(offset=8)]), "starts at 8, which is no multiple of 32"),
    "an offset beyond": (file([], [tensor(offset=2**63)]), "after the end of the file"),
    "an offset far beyond": (file([], [tensor(offset=2**64 - 32)]), "after the end of the file"),
    "tensors that overlap": (file([], [tensor("a", (16,)), tensor("b", offset=32)]), "'a' and 'b' overlap"),
    "a tensor in another": (file([], [tensor("a", (99,)), tensor("b", (1,), offset=64)]), "'a' and 'b' overlap"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_at_once(path: Path, content: bytes, message: str) -> None:
    """Catches an allocation of what a file announces, a loop as long as it says, and a traceback."""
    path.write_bytes(content)
    error = bounded(path, megabytes=1)
    assert error is not None and message in str(error) and str(path) in str(error)


def test_a_large_file_does_not_unlock_a_large_header(path: Path) -> None:
    """Catches limits that follow the size of a file alone: a sparse one of a terabyte costs nobody anything."""
    head = file([key("a", ARRAY, struct.pack("<IQ", STRING, 2**32))], data=0)
    with path.open("wb") as sparse:
        sparse.write(head)
        sparse.truncate(2**40)
    assert "items of an array" in str(bounded(path))
    arrays = [key(f"a{i}", ARRAY, struct.pack("<IQ", 0, 2**20) + bytes(2**20)) for i in range(4)]
    path.write_bytes(file(arrays))
    assert "items of an array" in str(bounded(path, megabytes=64))


def test_a_cut_file_is_refused_wherever_it_is_cut(path: Path, good: bytes) -> None:
    """Catches a model whose last tensor is missing, and an index past the end."""
    start = scan_start(path, good)
    sizes = [*range(0, 400), *range(400, start, 97), *range(start, len(good), 4099), len(good) - 1]
    for size in sizes:
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            scan(path)


def scan_start(path: Path, good: bytes) -> int:
    """Where the weights begin."""
    path.write_bytes(good)
    return min(extent.offset for extent in scan(path).tensors.values())


def mutations(good: bytes, start: int, count: int) -> Iterator[bytes]:
    """Files with bytes changed, numbers made huge, parts cut out or doubled, all in the head."""
    source = random.Random(0)
    huge = [U64, 2**63, 2**63 - 1, 2**32, 2**32 - 1, 2**31, 2**16, 0, 1]
    for _ in range(count):
        data = bytearray(good)
        for _ in range(source.choice((1, 1, 2, 8))):
            # Half of the changes go where the structure is densest: the first keys and the tensors.
            at = source.choice(
                (source.randrange(4, 2000), source.randrange(start - 2000, start), source.randrange(start))
            )
            match source.randrange(4):
                case 0:
                    data[at] = source.randrange(256)
                case 1:
                    data[at : at + 8] = struct.pack("<Q", source.choice(huge))
                case 2:
                    del data[at : at + source.randrange(1, 64)]
                case 3:
                    data[at:at] = data[at : at + source.randrange(1, 64)]
        yield bytes(data)


def test_no_change_of_a_header_does_more_than_be_refused(path: Path, good: bytes) -> None:
    """4000 files; catches every other exception, a hang, and memory for what is not there."""
    start, refused, times = scan_start(path, good), 0, []
    for number, data in enumerate(mutations(good, start, 4000)):
        path.write_bytes(data)
        if number % 100 == 0:  # the scale itself takes time
            bounded(path)
        begin = time.process_time()
        try:
            check_shapes(open_gguf(path))
        except CheckpointError:
            refused += 1
        times.append(time.process_time() - begin)
    assert 2000 < refused < 4000, "the changes must do something, but not everything"
    # Collecting garbage takes up to a second of the processor in a process that holds all of torch.
    assert max(times) < max(1, 200 * statistics.median(times)), "a file against the others"
