"""How the kernels are compiled, kept, and done without."""

import ctypes
import shutil
import sys
from pathlib import Path

import pytest

from lit_llama.model.operators import kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled on Linux")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lit_llama"


def compiler(folder: Path, script: str) -> str:
    """A PATH on which c++ is a script."""
    folder.mkdir()
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(folder)


def test_they_are_compiled_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second compilation, a half-written library, and one that is used after flags or a header have
    changed."""
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if real is None:
        pytest.skip("no C++ compiler")
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", compiler(tmp_path / "bin", f'echo "$*" >> {log}\nexec {real} "$@"'), prepend=":")
    sources = tmp_path / "one", tmp_path / "other"
    for number, folder in enumerate(sources):
        folder.mkdir()
        (folder / "a.h").write_text(f"#define ANSWER {number}\n")
        (folder / f"unit{number}.cpp").write_text(f'#include "a.h"\nint answer{number} = ANSWER;\n')
    monkeypatch.setattr(kernels, "SOURCES", sources)
    assert kernels.compiled.__wrapped__() is not None
    assert [path.suffix for path in home.iterdir()] == [".so"]
    calls = log.read_text().count(" -c ")
    assert calls == sum(len(list(folder.glob("*.cpp"))) for folder in kernels.SOURCES)
    assert kernels.compiled.__wrapped__() is not None
    assert log.read_text().count(" -c ") == calls
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-DOTHER"))
    assert kernels.compiled.__wrapped__() is not None
    assert len(list(home.iterdir())) == 2
    (sources[1] / "a.h").write_text("#define ANSWER 7\n")
    library = kernels.compiled.__wrapped__()
    assert ctypes.c_int.in_dll(library, "answer1").value == 7 and len(list(home.iterdir())) == 3


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 0", "cannot open shared object|No such file"),
        ('[ "$1" = --version ] && exit 0; echo "numbers.h:7: error: no such thing" >&2; exit 1', "no such thing"),
        ('[ "$1" = --version ] && exit 0; exit 3', "status 3"),
    ],
    ids=["makes nothing", "finds an error", "says nothing"],
)
def test_a_compiler_that_fails_is_named_and_done_without(
    script: str,
    said: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a training that ends because it could not be made faster, and what is left of the attempt."""
    monkeypatch.setenv("PATH", compiler(tmp_path / "bin", script), prepend=":")
    assert kernels.compiled.__wrapped__() is None
    shown = capsys.readouterr().err
    assert "this CPU is slower than it could be" in shown.replace("\n", " ")
    assert any(part in shown for part in said.split("|")), shown
    assert not list(home.iterdir())


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a silent loss of speed."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert kernels.compiled.__wrapped__() is None
    assert "no C++ compiler (g++)" in capsys.readouterr().err
