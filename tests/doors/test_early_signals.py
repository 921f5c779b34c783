"""Signals while a script imports what it needs: no traceback, the status of the signal, and nothing for who imports."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOORS = sorted(
    str(path.relative_to(ROOT)) for room in ("prepare", "finetune", "generate") for path in (ROOT / room).glob("*.py")
)

STRIKE = """
import os, sys

def strike(event, arguments):
    if event == "import" and arguments[0] == os.environ.get("AT"):
        del os.environ["AT"]
        for number in os.environ["SIGNALS"].split():
            os.kill(os.getpid(), int(number))

sys.addaudithook(strike)
"""
"""Python runs it before a script."""
FLAGS = ("--adapter_dir", "x", "--destination_path", "y")


def struck(folder: Path, door: str, at: str, *signals: int, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Run a script that gets signals as it imports something; gives its status and what it said."""
    (folder / "sitecustomize.py").write_text(STRIKE)
    environment = os.environ | {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "AT": at,
        "SIGNALS": " ".join(str(int(number)) for number in signals),
    }
    found = subprocess.run(
        [sys.executable, str(ROOT / door), *flags], env=environment, capture_output=True, text=True, cwd=folder
    )
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize("door", DOORS)
def test_ctrl_c_among_the_first_imports_is_quiet(door: str, tmp_path: Path) -> None:
    """Catches a script that imports anything before it settles signals."""
    assert struck(tmp_path, door, "lit_llama.cli", signal.SIGINT) == (130, "", "")


@pytest.mark.parametrize(
    ("at", "number"),
    [
        *((at, signal.SIGINT) for at in ("jsonargparse", "yaml", "lit_llama.conversion.merge")),
        *((at, signal.SIGINT) for at in ("torch.nn", "safetensors")),
        *((at, signal.SIGTERM) for at in ("numpy", "lit_llama.model.adapters.peft_folder")),
        *((at, signal.SIGHUP) for at in ("numpy", "lit_llama.model.adapters.peft_folder")),
        ("numpy", signal.SIGINT),
    ],
)
def test_a_signal_at_any_import_is_quiet(at: str, number: signal.Signals, tmp_path: Path) -> None:
    """Catches tracebacks of imports, of jsonargparse's as well as of torch's, and a signal that is swallowed."""
    status, out, err = struck(tmp_path, "finetune/merge.py", at, number, flags=FLAGS)
    assert status == 128 + number and out == "" and err in ("", "Interrupted\n"), err


@pytest.mark.parametrize("at", ["dataclasses", "jsonargparse", "torch", "lit_llama.model.adapters.peft_folder"])
def test_two_are_quiet(at: str, tmp_path: Path) -> None:
    """Catches the traceback of a second Ctrl-C amid the words about the first."""
    signals = (signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    status, _, err = struck(tmp_path, "finetune/merge.py", at, *signals, flags=FLAGS)
    assert status in (130, 143) and err in ("", "Interrupted\n"), err


def test_importing_the_library_settles_nothing() -> None:
    """Catches a notebook whose Ctrl-C ends the kernel, and streams that are no longer its own."""
    program = """
import signal, sys
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
before = [signal.getsignal(number) for number in numbers], sys.stdout, sys.stderr, sys.unraisablehook
import lit_llama, lit_llama.cli, lit_llama.signals, lit_llama.console, lit_llama.progress, lit_llama.memory
sys.path.insert(0, sys.argv[1])
from finetune import lora
from prepare import records
for name in lit_llama.__all__:
    getattr(lit_llama, name)
assert ([signal.getsignal(number) for number in numbers], sys.stdout, sys.stderr, sys.unraisablehook) == before
"""
    found = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """Catches a job under nohup that a closed terminal ends."""
    (tmp_path / "sitecustomize.py").write_text(STRIKE)
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "AT": "lit_llama.cli",
        "SIGNALS": str(int(signal.SIGHUP)),
    }
    found = subprocess.run(
        ["nohup", sys.executable, str(ROOT / "prepare/show.py"), "--data_dir", "nothing"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert 0 < found.returncode < 8, found.stderr
    assert "Traceback" not in found.stderr
