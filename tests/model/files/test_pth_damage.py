"""Torch files that are damaged or made to harm: our own error, in time, or the very tensors that were saved."""

import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_files import HONEST, archive_of, bits, dict_of, number, refused, text, view

from lit_llama.errors import CheckpointError
from lit_llama.model.files.pth import files as pth
from lit_llama.model.files.pth.files import read_pth

VIEWS: dict[str, tuple[bytes, str]] = {
    "storage too large": (view(elements=5), "archive/data/0 has 16 bytes, tensor 'a' expects 20"),
    "storage too small": (view((1,), elements=3), "has 16 bytes, tensor 'a' expects 12"),
    "huge storage": (view(elements=2**62), "expects"),
    "storage beyond 64 bits": (view(elements=2**64), "no storage"),
    "negative storage": (view(elements=-4), "no storage"),
    "missing storage": (view(key="1"), "'1', which is missing"),
    "storage elsewhere": (view(key="../version"), "'../version', which is missing"),
    "other dtype": (view(storage=b"ctorch\nDoubleStorage\n"), "expects 32"),
    "a function as dtype": (view(storage=b"ctorch\nSize\n"), "no storage"),
    "negative stride": (view((4,), (-1,), 3), "no proper shape"),
    "negative offset": (view(offset=-1), "no proper shape"),
    "negative shape": (view((-1,)), "no proper shape"),
    "more strides": (view((4,), (1, 1)), "no proper shape"),
    "offset beyond": (view(offset=1), "reaches to element 4 of a storage of 4"),
    "shape beyond": (view((5,)), "reaches to element 4"),
    "stride beyond": (view((4,), (2,)), "reaches to element 6"),
    "overflow": (view((2**62,), (4,)), "reaches to element"),
    "overflow of a product": (view((2**32, 2**32), (2**32, 1)), "reaches to element"),
    "unfolded memory": (view((2**40,), (0,)), "would unfold to 4398046511104 bytes"),
    "unfolded overflow": (view((2**62, 2**62), (0, 0)), "would unfold"),
    "shape of text": (view().replace(number(4) + b"t(", text("4") + b"t("), "no proper shape"),
    "shape of truth": (view().replace(number(4) + b"t(", b"\x88t("), "no proper shape"),
    "seven dimensions times ten": (view((1,) * 70, (1,) * 70), "no proper shape"),
    "twice": (view() + text("a") + view(), "two values 'a'"),
}


@pytest.mark.parametrize(("item", "message"), VIEWS.values(), ids=VIEWS)
def test_a_tensor_lies_within_its_storage(tmp_path: Path, item: bytes, message: str) -> None:
    """Catches numbers read from a neighbour or from before the file, and memory that a file asks for."""
    refused(archive_of(tmp_path / "a.pth", dict_of(text("a"), item)), message, loops=12)


def test_an_empty_tensor_may_lie_anywhere(tmp_path: Path) -> None:
    """Catches zero rows at the end of a storage, which torch.save writes, refused or read."""
    path = archive_of(tmp_path / "a.pth", dict_of(text("a"), view((0, 7), (7, 1), 2**40)))
    assert read_pth(path)["a"].read().shape == (0, 7)


CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


def patched(path: Path, magic: bytes, at: int, value: bytes) -> None:
    """Change bytes of the last entry's header, in the table of contents or where it lies."""
    content = bytearray(path.read_bytes())
    start = content.rindex(magic) + at
    content[start : start + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("magic", "at", "value", "message"),
    [
        (CENTRAL, 8, b"\1", "'archive/version' is encrypted"),
        (LOCAL, 6, b"\1", "'archive/version' is another one where it lies"),
        (LOCAL, 8, b"\x08", "'archive/version' is another one where it lies"),
        (LOCAL, 30, b"A", "'archive/version' is another one where it lies"),
        (CENTRAL, 10, b"\x08", "'archive/version' is compressed"),
        (CENTRAL, 20, b"\3", "'archive/version' is compressed"),
        (CENTRAL, 20, b"\0\0\1\0" * 2, "it is cut off;"),
        (CENTRAL, 16, b"\1\2\3\4", "checksum of archive/version"),
        (CENTRAL, 42, b"\xff\xff\0\0", "cut off or damaged"),
    ],
)
def test_headers_that_torch_does_not_write_are_refused(
    tmp_path: Path, magic: bytes, at: int, value: bytes, message: str
) -> None:
    """Catches a header that is believed where the other one or the file says something else."""
    path = archive_of(tmp_path / "a.pth", HONEST)
    patched(path, magic, at, value)
    refused(path, message)


def test_an_archive_with_more_than_torch_writes_is_refused(tmp_path: Path) -> None:
    """Catches bombs, entries that two programs read differently, and names that lead elsewhere."""
    path = tmp_path / "a.pth"
    bomb = {"data/0": bytes(50_000_000)}
    refused(archive_of(path, HONEST, bomb, compression=zipfile.ZIP_DEFLATED), "is compressed", loops=12)
    refused(archive_of(path, HONEST, compression=zipfile.ZIP_LZMA), "is compressed")
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive_of(path, HONEST)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/data/0", bytes(16))
    refused(path, "two entries 'archive/data/0'")
    for name in ("../x", "data//0", "./y", "a/../../b", "folder/", "c\\d", "nul\0x"):
        archive_of(path, HONEST, {"data/0": bytes(16)})
        with zipfile.ZipFile(path, "a") as archive:
            info = zipfile.ZipInfo("archive/x")
            info.filename = f"archive/{name}"
            archive.writestr(info, b"")
        refused(path, "")
    for name in ("other/x", "/etc/passwd", "../x", "x"):
        archive_of(path, HONEST)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"")
        refused(path, "root folders")
    archive_of(path, HONEST, {"byteorder2": b"", "data/0": bytes(16)})
    path.write_bytes(path.read_bytes().replace(b"byteorder2", b"byteorder\0"))
    refused(path, "no plain name")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", b"3")
    refused(path, "no archive/data.pkl")
    with zipfile.ZipFile(path, "w"):
        pass
    refused(path)


def test_entries_that_overlap_or_differ_are_refused(tmp_path: Path) -> None:
    """Catches the overlap by which a small file unfolds to a large one, and names that two programs read apart."""
    path = archive_of(tmp_path / "a.pth", HONEST, {"data/1": b"abcd", "data/0": bytes(16)})
    content = path.read_bytes()
    start = content.index(b"PK\x03\x04", content.index(b"little"))
    inner = content[start : content.index(b"abcd") + 4]
    path.write_bytes(content.replace(b"archive/data/1", b"archive/data/2", 1))
    refused(path, "is another one where it lies")
    archive_of(path, HONEST, {"data/0": inner, "data/1": b"abcd"})
    changed = bytearray(path.read_bytes())
    entry = changed.rindex(b"archive/data/1") - 46  # of the table of contents
    assert changed[entry : entry + 4] == b"PK\x01\x02"
    changed[entry + 42 : entry + 46] = struct.pack("<I", changed.index(inner))
    path.write_bytes(changed)
    refused(path, "its entries overlap")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "a.pth"
    torch.save({"w": torch.randn(40, 8).t(), "b": torch.randn(16).to(torch.bfloat16)}, path)
    return path


def outcome(path: Path) -> dict[str, Tensor] | None:
    """The tensors, or None for our own error; anything else fails the test."""
    try:
        return {name: stored.read() for name, stored in read_pth(path).items()}
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 700
        return None


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(bits(found[name]) == bits(wanted[name]) for name in wanted)


def test_no_flipped_bit_changes_a_tensor(small: Path, tmp_path: Path) -> None:
    """Catches numbers that differ from those saved: torch.load itself compares no checksum."""
    content, wanted = small.read_bytes(), outcome(small)
    assert wanted is not None
    rng, path, noticed = random.Random(0), tmp_path / "a.pth", 0
    for place in rng.sample(range(8 * len(content)), 1500):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        found = outcome(path)
        assert found is None or same(found, wanted), place
        noticed += found is None
    assert noticed > 500  # the rest is padding


def test_no_cut_off_file_is_read(small: Path, tmp_path: Path) -> None:
    """Catches half a download."""
    content, path = small.read_bytes(), tmp_path / "a.pth"
    ends = [*range(0, 200, 7), *range(200, len(content) - 700, 50), *range(len(content) - 700, len(content))]
    for end in ends:
        path.write_bytes(content[:end])
        assert outcome(path) is None, end


@pytest.mark.parametrize("verify", [True, False])
def test_checksums_of_tensors_are_compared_on_request(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """Catches a check that is never made, or made where it was not wanted; the pickle is always checked."""
    monkeypatch.setattr(pth, "_BLOCK", 100)  # several, of which the last is shorter
    content, path = bytearray(small.read_bytes()), tmp_path / "a.pth"
    place = read_pth(small)["w"].offset
    content[place] ^= 1
    path.write_bytes(content)
    if verify:
        refused(path, "the checksum of a/data/0 is")
    else:
        assert set(read_pth(path, verify=False)) == {"w", "b"}
    content[place] ^= 1
    content[content.index(b"FloatStorage")] ^= 32
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the checksum of a/data\.pkl"):
        read_pth(path, verify=verify)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_mutated_files_raise_only_our_error(small: Path, tmp_path: Path) -> None:
    """Catches any other exception, for pickles and tables of contents that are nearly honest."""
    with zipfile.ZipFile(small) as archive:
        contents = {info.filename.removeprefix("a/"): archive.read(info) for info in archive.infolist()}
    honest = [contents.pop("data.pkl"), HONEST, dict_of(text("a"), view((2, 2), (1, 2)), text("b"), view())]
    records = {name: value for name, value in contents.items() if name.startswith("data/")}
    rng, path, read = random.Random(1), tmp_path / "a.pth", 0
    opcodes = bytes(
        {code for data in honest for code in data} | set(b"(.0123FGIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81")
    )
    for _ in range(1500):
        data = bytearray(rng.choice(honest))
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            other = rng.choice(honest)
            piece = other[rng.randrange(len(other)) :][: rng.choice((1, 2, 4, 20))]
            change = rng.choice((bytes([rng.choice(opcodes)]), piece, rng.randbytes(rng.choice((1, 4))), b""))
            data[start : start + rng.choice((0, 1, len(change)))] = change
        read += outcome(archive_of(path, bytes(data), records)) is not None
    assert 10 < read < 1000  # the mutations are neither all harmless nor all fatal


def test_a_mutated_table_of_contents_raises_only_our_error(small: Path, tmp_path: Path) -> None:
    """Catches what zipfile raises for nonsense, and a table that claims to be huge."""
    content, rng, path = small.read_bytes(), random.Random(2), tmp_path / "a.pth"
    start = content.index(b"PK\x01\x02")
    values = [0, 1, 0xFF, 0x7F, 0x80]
    for _ in range(1500):
        data = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(start, len(data))
            width = rng.choice((1, 2, 4, 8))
            data[place : place + width] = bytes([rng.choice(values)]) * width
        path.write_bytes(data)
        outcome(path)


def test_a_huge_table_of_contents_is_not_read(tmp_path: Path) -> None:
    """Catches memory and time for a hundred thousand empty entries."""
    path = archive_of(tmp_path / "a.pth", HONEST, {f"data/{i}/{'x' * 40}": b"" for i in range(60_000)})
    refused(path, "table of contents", loops=12)
