"""torch's zip files: what torch.save writes is found bit for bit, and nothing else is run, believed or waited for."""

import itertools
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_model
from torch import Tensor
from torch_files import HONEST, archive_of, bits, dict_of, refused, text, view

from lit_llama.errors import CheckpointError
from lit_llama.model.files.pth import files as pth
from lit_llama.model.files.pth.files import read_pth, write_pth
from lit_llama.model.files.weights import SINGLE_FILE, Weights, describe_wrong_file

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ODD = "d\u00e9j\u00e0 'vu' \"x\" $HOME"


def check_equal(path: Path, wanted: dict[str, Tensor]) -> None:
    found = read_pth(path)
    assert list(found) == list(wanted)
    for name, stored in found.items():
        value = stored.read()
        assert (value.dtype, value.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert bits(value) == bits(wanted[name]), name


def tensors_of_every_kind() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    whole = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
    return {
        "base": base,
        "row": base[2],
        "column": base[:, 3],
        "block": base[1:4, 2:6],
        "steps": base[::2, ::3],
        "transposed": base.t(),
        "expanded": torch.randn(1, 5).expand(4, 5),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "empty slice": base[6:],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]),
        ODD: torch.ones(2),
        **{str(dtype): torch.randn(33).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)},
        **{str(dtype): torch.randint(0, 2, (9,)).to(dtype) for dtype in whole},
    }


def every_half() -> dict[str, Tensor]:
    """Each of the 65536 patterns, quiet and signalling NaN among them."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    return {"half": patterns.view(torch.float16), "bfloat": patterns.clone().view(torch.bfloat16)}


@pytest.fixture
def no_checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(before)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_kind_of_tensor_is_found(tmp_path: Path, protocol: int) -> None:
    """Catches a lost offset or stride, a dtype read as another, and opcodes of one protocol that are unknown."""
    wanted = tensors_of_every_kind() | every_half()
    for kind in (dict, OrderedDict):
        torch.save(kind(wanted), tmp_path / "a.pth", pickle_protocol=protocol)
        check_equal(tmp_path / "a.pth", wanted)


@pytest.mark.usefixtures("no_checksums")
def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    """Catches 0 taken for a checksum."""
    torch.save(tensors_of_every_kind(), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert {info.CRC for info in archive.infolist()} == {0}
    check_equal(tmp_path / "a.pth", tensors_of_every_kind())


def test_rows_of_a_stored_tensor(tmp_path: Path) -> None:
    """Catches rows taken without the strides."""
    torch.save(tensors_of_every_kind(), tmp_path / "a.pth")
    found = read_pth(tmp_path / "a.pth")
    for name in ("base", "block", "transposed", "permuted", "expanded"):
        assert torch.equal(found[name].read(1, 3), tensors_of_every_kind()[name][1:3]), name


def test_state_dicts_are_found_where_programs_put_them(tmp_path: Path) -> None:
    """Catches `_metadata` refused, wrappers that are unknown, and other values that stop the reading."""
    state = tiny_model().state_dict()
    assert state._metadata  # type: ignore[attr-defined]
    extras = {"step": 3, "lr": 1e-4, "name": "x", "none": None, "flag": True, "shape": torch.Size([1, 2])}
    extras |= {"dtype": torch.bfloat16, "device": torch.device("cpu"), "list": [1, (2, 3)], "big": 2**40, "raw": b"ab"}
    path = tmp_path / "a.ckpt"
    for wrapper in ("model", "state_dict", "module"):
        momentum = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
        torch.save({wrapper: state, "optimizer": momentum, **extras}, path, pickle_protocol=4)
        check_equal(path, dict(state))
    torch.save(state, path)
    check_equal(path, dict(state))
    torch.save({"config": {"a": 1}, **state}, path)
    check_equal(path, dict(state))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.ones(1)}, "b": torch.ones(1)}, "at the top and 'model'"),
        ({"model": {"a": torch.ones(1)}, "module": {"a": torch.ones(1)}}, "at 'model' and 'module'"),
        ({"net": {"a": torch.ones(1)}}, "at nowhere (keys: 'net')"),
        ({"model": {"model": {"a": torch.ones(1)}}}, "at nowhere"),
        ({}, "at nowhere"),
        (torch.ones(1), "holds a tensor and no dict"),
        ([torch.ones(1)], "holds a list and no dict"),
        (None, "holds a NoneType and no dict"),
        ({3: torch.ones(1)}, "named by a int"),
        ({"a": torch.nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
        ({"a": torch.ones(1).to(torch.float8_e4m3fn)}, "torch._utils._rebuild_tensor_v3"),
        ({"a": torch._neg_view(torch.ones(1))}, "_rebuild_tensor_v2 with unknown arguments"),
        ({"a": torch.ones(1).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        ({"a": Path("x")}, "pathlib"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: Any, message: str) -> None:
    """Catches tensors left out in silence, negated or packed numbers read as plain ones, a bare traceback."""
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", message)


def test_the_builder_of_these_tests_is_honest(tmp_path: Path) -> None:
    """Catches refusals below that have another cause than the one they test."""
    path = archive_of(tmp_path / "a.pth", HONEST, {"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    assert torch.load(path, weights_only=True)["a"].tolist() == read_pth(path)["a"].read().tolist() == [1, 2, 3, 4]


def test_a_foreign_byte_order_is_refused(tmp_path: Path) -> None:
    """Catches numbers of a big-endian machine read backwards."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    for order, message in ((b"big", "byteorder is b'big'"), (b"little" * 9, "byteorder has 54 bytes")):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, order if name.endswith("byteorder") else content)
        refused(path, message)


def test_files_that_are_no_weights_say_what_they_are(tmp_path: Path) -> None:
    """Catches a parser's complaint where the download is at fault."""
    path = tmp_path / ODD
    for content, message in (
        (b"", "is empty: download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269062936\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf\n <HTML>", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an HTML page"),
        (b'{"error": "Repository not found"}', "is JSON and not weights"),
        (b"Invalid username or password.", "is text and not weights (b'Invalid"),
        (b"GGUF\x03\0\0\0", "starts with b'GGUF"),
        (b"PK\x03\x04" + bytes(60), "cut off or damaged"),
        (os.urandom(3000).replace(b"\x80", b"\0"), "starts with"),
    ):
        path.write_bytes(content)
        refused(path, message, loops=12)
    refused(tmp_path / "gone", "is missing")
    refused(tmp_path, "a folder or device")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "a folder or device", loops=12)
    refused(Path("/dev/zero"), "a folder or device", loops=12)
    torch.save({"a": torch.ones(1)}, path)
    assert describe_wrong_file(path) is None


def test_safetensors_files_say_it_too(tmp_path: Path) -> None:
    """Catches the same mistake explained for one format only."""
    (tmp_path / SINGLE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Weights(tmp_path)


def test_an_old_container_says_how_to_write_it_anew(tmp_path: Path) -> None:
    """Catches advice that does not work, whatever the name of the file."""
    path = tmp_path / f"{ODD}.bin"
    wanted = tiny_model().state_dict()
    torch.save(wanted, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch before 1\.6") as caught:
        read_pth(path)
    command = str(caught.value).split("write it anew with: python ")[1]
    subprocess.run(f'"{sys.executable}" {command}', shell=True, check=True)
    check_equal(path.with_name(f"{ODD}.new.bin"), dict(wanted))
    path.write_bytes(b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(2000))
    refused(path, "tar format")


def spec_of(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return {dtype: name for name, dtype in DTYPES.items()}[tensor.dtype], tuple(tensor.shape)


def written(path: Path, tensors: dict[str, Tensor], produce: Callable[[str], Tensor] | None = None) -> Path:
    write_pth(path, {name: spec_of(value) for name, value in tensors.items()}, produce or tensors.__getitem__)
    return path


def writable() -> dict[str, Tensor]:
    return {name: value for name, value in tensors_of_every_kind().items() if value.dtype in DTYPES.values()}


@pytest.mark.parametrize("threshold", [pth._ZIP64, 0])
def test_torch_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: int) -> None:
    """Catches a file that only we read, an entry that is not aligned, a wrong checksum; large entries have another
    header."""
    monkeypatch.setattr(pth, "_ZIP64", threshold)
    tensors = writable() | every_half()
    path = written(tmp_path / "a.pth", tensors)
    check_equal(path, {name: value.detach() for name, value in tensors.items()})
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert list(found) == list(tensors)
        assert all(bits(found[name]) == bits(value) for name, value in tensors.items())
        assert all(found[name].dtype == value.dtype for name, value in tensors.items())
    assert {stored.offset % 64 for stored in read_pth(path).values()} == {0}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.create_system for info in archive.infolist()} == {0}  # the same bytes on every system
        assert all(info.CRC for info in archive.infolist() if info.file_size)


def test_equal_tensors_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a time or an address in the file."""
    first = written(tmp_path / "a.pth", writable()).read_bytes()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert written(tmp_path / "b.pth", writable()).read_bytes() == first


def test_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    """Catches a writer that collects the model, or that writes other shapes than it announced."""
    tensors = {str(i): torch.randn(50_000) for i in range(5)}
    sizes: list[int] = []

    def produce(name: str) -> Tensor:
        sizes.append((tmp_path / "a.pth").stat().st_size)
        return tensors[name]

    written(tmp_path / "a.pth", tensors, produce)
    assert all(100_000 < later - earlier < 300_000 for earlier, later in itertools.pairwise(sizes))
    with pytest.raises(AssertionError, match="0"):
        written(tmp_path / "a.pth", tensors, lambda name: torch.ones(2))


def test_entries_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Catches sizes and places cut to 32 bits. The large record is a hole and has no checksum."""
    path, rows = tmp_path / "a.pth", 5 * 2**28
    large = view((rows,), elements=rows, key="1")
    last = struct.pack("<4f", 1, 2, 3, 4)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dict_of(text("large"), large, text("last"), view()))
        info = zipfile.ZipInfo("archive/data/1")
        assert archive.fp is not None
        info.file_size = info.compress_size = 4 * rows
        info.CRC, info.header_offset = 0, archive.fp.tell()
        archive.fp.write(info.FileHeader(zip64=True))
        archive.start_dir = archive.fp.tell() + 4 * rows
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info
        archive.writestr("archive/data/0", last)
    assert path.stat().st_size > 2**32
    found = read_pth(path)
    assert found["last"].offset > 2**32 and found["last"].read().tolist() == [1, 2, 3, 4]
    assert found["large"].read(rows - 2).tolist() == [0, 0]


def test_reading_and_writing_hold_one_tensor(tmp_path: Path) -> None:
    """Catches a reader or writer whose memory is the file: 300 MB in tensors of 10 MB, in a process of its own."""
    script = """
import resource, sys, torch
from pathlib import Path
from lit_llama.model.files.pth.files import read_pth, write_pth

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

path = Path(sys.argv[1])
torch.ones(10).sum()
before = peak()
write_pth(path, {str(i): ("F32", (2_500_000,)) for i in range(30)}, lambda name: torch.full((2_500_000,), float(name)))
wrote = peak()
total = sum(stored.read()[0].item() for stored in read_pth(path).values())
assert total == sum(range(30)), total
print(wrote - before, peak() - wrote)
"""
    path = tmp_path / "a.pth"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert path.stat().st_size > 300_000_000
    assert all(int(megabytes) < 100 for megabytes in done.stdout.split()), done.stdout
