"""Pickles and archives for tests, put together by hand."""

import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_llama.errors import CheckpointError
from lit_llama.model.files.pth.files import read_pth


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def loop_seconds() -> float:
    """CPU time that ten million steps of a loop in Python take, here and now."""
    started = time.process_time()
    for _ in range(10_000_000):
        pass
    return time.process_time() - started


def refused(path: Path, message: str = "", loops: float = 40) -> None:
    """One line with the path and what was found, in no more CPU time than some loops of ten million steps take."""
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_pth(path)
    spent = time.process_time() - started
    assert spent < 0.3 or spent < loops * loop_seconds()
    text = str(caught.value)
    assert text.startswith(str(path)) and message in text and "\n" not in text and len(text) < 700, text


def archive_of(path: Path, data: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """An archive as torch writes it, with this pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for name, content in (records if records is not None else {"data/0": bytes(16)}).items():
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", b"3\n")
    return path


def global_(name: str) -> bytes:
    return f"c{name}\n".replace(" ", "\n").encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def view(
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    elements: int = 4,
    key: str = "0",
    storage: bytes = b"ctorch\nFloatStorage\n",
) -> bytes:
    """Opcodes of one tensor; the default is honest."""
    sizes = b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, stride)) + b"t"
    reference = b"(" + text("storage") + storage + text(key) + text("cpu") + number(elements) + b"tQ"
    hooks = b"\x89" + global_("collections OrderedDict") + b")R"
    return global_("torch._utils _rebuild_tensor_v2") + b"(" + reference + number(offset) + sizes + hooks + b"tR"


def dict_of(*items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(items) + b"u."


HONEST = dict_of(text("a"), view())
