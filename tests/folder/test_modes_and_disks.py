"""Files whose modes are those of plain new ones, disks that fail with the path in the message, and sizes in words."""

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import run_here
from small_runs import ROWS, flags_of

from lit_llama.cli import CLI
from lit_llama.memory import amount, amounts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what each command writes, under a umask that is not the usual one."""
    home = tmp_path_factory.mktemp("modes")
    before = os.umask(0o027)
    try:
        (home / "rows.json").write_text(json.dumps(ROWS))
        to, base, data, out = "--destination_path", tiny_folder, home / "data", home / "out"
        drawn = ["--max_new_tokens", 3, "--temperature", 0]
        course = [*flags_of(base, data, out), "--train.max_steps", 2, "--train.save_interval", 1]
        encoded = ["--tokenizer_path", base, "--prompt_style", "alpaca", "--test_split_size", 0.2]
        place = ["--checkpoint_dir", base, "--data_dir", data, "--out_dir", home / "full"]
        whole = [*place, "--train.max_steps", 2, "--train.save_interval", 1, "--train.sample_prompts", 0]
        commands: list[list[object]] = [
            ["prepare/records.py", "--source", home / "rows.json", *encoded, to, data],
            ["finetune/lora.py", *course],
            ["finetune/full.py", *whole],
            ["finetune/merge.py", "--adapter_dir", out, to, home / "merged", "--dtype", "float32"],
            ["finetune/merge.py", "--adapter_dir", out, to, home / "m.gguf", "--format", "gguf", "--modelfile", "true"],
            ["prepare/checkpoint.py", "--source", base, to, home / "float32", "--dtype", "float32"],
            ["prepare/checkpoint.py", "--source", base, to, home / "meta", "--format", "meta"],
            ["prepare/checkpoint.py", "--source", base, to, home / "b.gguf", "--format", "gguf"],
            [
                "generate/instruct.py",
                "--checkpoint_dir",
                out,
                "--data_dir",
                data,
                *drawn,
                "--output_file",
                home / "a.jsonl",
            ],
            [
                "generate/evaluate.py",
                "--checkpoint_dir",
                base,
                out,
                "--data_dir",
                data,
                *drawn,
                "--out_dir",
                home / "scores",
            ],
        ]
        for command in commands:
            done = run_here(*command)
            assert done.returncode == 0, done.stderr
        yield home
    finally:
        os.umask(before)


def test_every_file_has_the_mode_that_the_umask_gives(made: Path) -> None:
    """Catches files of tempfile and of libraries that only their owner can read, beside others that a group can."""
    modes = {path.relative_to(made): path.stat().st_mode & 0o777 for path in made.rglob("*") if path.is_file()}
    folders = {path.relative_to(made): path.stat().st_mode & 0o777 for path in made.rglob("*") if path.is_dir()}
    assert len(modes) > 60
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o640} == {}
    assert {name: oct(mode) for name, mode in folders.items() if mode != 0o750} == {}
    places = {
        "data",
        "out",
        "full",
        "merged",
        "m.gguf",
        "float32",
        "meta",
        "b.gguf",
        "a.jsonl",
        "scores",
    }
    assert {path.name for path in made.iterdir()} >= places


def refusal(main: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that cannot go on."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["x"])
        CLI(main)
    assert ended.value.code == 5
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Errno" not in said
    return said


class Failing(io.FileIO):
    """A file on a disk that refuses every byte."""

    number = 0

    def write(self, data: object) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_a_write_that_fails_names_its_file(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches "Input/output error" of nobody knows what."""

    def buffered() -> None:
        raw = Failing(tmp_path / "buffered", "w")
        raw.number = number
        with io.BufferedWriter(raw) as file:
            file.write(b"x")
            raw = None  # the buffer fails where it is emptied

    class Writer:
        def __init__(self) -> None:
            self.path = tmp_path / "descriptor"

        def write(self) -> None:
            raise OSError(number, os.strerror(number))

    assert str(tmp_path / "buffered") in refusal(buffered, capsys)
    assert str(tmp_path / "descriptor") in refusal(lambda: Writer().write(), capsys)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_named_where_a_file_or_stdout_lies_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a status of 0 or 120 for results that were lost, and words of Python's end."""

    def write() -> None:
        Path("/dev/full").write_text("x" * 10)

    assert "/dev/full" in refusal(write, capsys)
    for unbuffered in ("", "1"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
        program = "from lit_llama.cli import CLI\ndef main() -> None:\n    print('results')\nCLI(main)"
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-c", program]
            found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
        assert found.returncode == 5
        assert found.stderr == "error: stdout (/dev/full): No space left on device\n"


def test_amounts_have_units_in_which_they_differ() -> None:
    """Catches "0.0 GB free, 0.0 GB are needed"."""
    assert [amount(size) for size in (0, 1, 999, 1000, 1_500_000, 20 * 10**9, 3 * 10**12)] == [
        "0 bytes", "1 byte", "999 bytes", "1.00 kB", "1.50 MB", "20.00 GB", "3.00 TB",
    ]  # fmt: skip
    assert amounts(5_000_000_001, 5_000_000_002) == ("5,000,000,001 bytes", "5,000,000,002 bytes")
    assert amounts(7_000, 9_000_000) == ("7.00 kB", "9.00 MB") and amounts(5, 5) == ("5 bytes", "5 bytes")
