"""Memory that ends at every door: status 5, one line that says what to lower, no traceback, and nothing half made."""

import errno
import json
import os
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
from conftest import tiny_model, write_adapter, write_tokenizer
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_runs import ROWS, flags_of

from lit_llama.cli import CLI, _names
from lit_llama.commands import remedy
from lit_llama.errors import CheckpointError, DataError
from lit_llama.memory import ran_out

ROOT = Path(__file__).parents[2]
DOORS = sorted(
    str(path.relative_to(ROOT)) for room in ("prepare", "finetune", "generate") for path in (ROOT / room).glob("*.py")
)
LIMIT = """
import os, resource, sys

def limit(event, arguments):
    if event == "import" and arguments[0] == os.environ.get("AT"):
        del os.environ["AT"]
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        most = held + (int(os.environ["MORE"]) << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

sys.addaudithook(limit)
"""
"""Python runs it before a script: where the script imports something, it may have so many MiB more, and no others."""


def limited(folder: Path, script: str, at: str, more: int, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run a script whose addresses end."""
    (folder / "sitecustomize.py").write_text(LIMIT)
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "AT": at, "MORE": str(more), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def check(found: subprocess.CompletedProcess[str]) -> None:
    """It ended as it should, and its last line says why."""
    assert found.returncode == 5, f"{found.returncode}: {found.stderr[-2000:]}"
    assert "Traceback" not in found.stderr, found.stderr[-2000:]
    assert re.fullmatch(r"error: .*(out of memory|needs|take|model).*", found.stderr.rstrip("\n").split("\n")[-1])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of 150 MB, an adapter on it, data, and rows of 25 MB."""
    home = tmp_path_factory.mktemp("large")
    (home / "base").mkdir()
    model = tiny_model(hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12)
    write_tokenizer(home / "base")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, home / "base/model.safetensors")
    (home / "base/config.json").write_text(json.dumps(model.config.to_dict("float32")))
    del model
    write_adapter(home / "adapter", home / "base")
    (home / "few.json").write_text(json.dumps(ROWS))
    rows = [{**row, "instruction": row["instruction"] + "x" * 4000} for row in ROWS * 300]
    (home / "rows.json").write_text(json.dumps(rows))
    made = ["--destination_path", home / "data", "--tokenizer_path", home / "base", "--prompt_style", "alpaca"]
    command = [sys.executable, ROOT / "prepare/records.py", "--source", home / "few.json", *made]
    subprocess.run([*map(str, command)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    return home


@pytest.mark.parametrize("more", [60, 250])
def test_preparing_rows(more: int, large: Path, tmp_path: Path) -> None:
    """Catches a traceback of json, numpy or pyarrow, and rows that are called damaged."""
    flags = ["--source", large / "rows.json", "--tokenizer_path", large / "base", "--prompt_style", "alpaca"]
    made = tmp_path / "data"
    found = limited(
        tmp_path, "prepare/records.py", "lit_llama.text.pipeline.prepare", more, *flags, "--destination_path", made
    )
    check(found)
    assert "--near_duplicates 0" in found.stderr and not made.exists()


@pytest.mark.parametrize("more", [60, 330])
def test_training(more: int, large: Path, tmp_path: Path) -> None:
    """Catches a traceback of torch's allocator, and a base that is called damaged as it cannot be mapped."""
    flags = flags_of(large / "base", large / "data", tmp_path / "out")
    check(limited(tmp_path, "finetune/lora.py", "lit_llama.train.run", more, *flags))
    assert not (tmp_path / "out/adapter_config.json").exists()


@pytest.mark.parametrize("more", [60, 250])
def test_merging(more: int, large: Path, tmp_path: Path) -> None:
    """Catches the same."""
    flags = ["--adapter_dir", large / "adapter", "--destination_path", tmp_path / "merged"]
    check(limited(tmp_path, "finetune/merge.py", "lit_llama.conversion.merge", more, *flags))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("form", "name"), [("hf", "made"), ("gguf", "made.gguf"), ("meta", "made")])
def test_converting(form: str, name: str, large: Path, tmp_path: Path) -> None:
    """Catches the same."""
    flags = ["--source", large / "base", "--destination_path", tmp_path / name, "--format", form]
    more = ["--dtype", "float32"] if form == "hf" else []
    check(limited(tmp_path, "prepare/checkpoint.py", "lit_llama.conversion", 60, *flags, *more))
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("more", [60, 300])
def test_generating(more: int, large: Path, tmp_path: Path) -> None:
    """Catches the same, in the thread of the engine, too."""
    flags = ["--checkpoint_dir", large / "base", "--prompt", "a", "--prompt_style", "alpaca", "--max_new_tokens", 4]
    check(limited(tmp_path, "generate/instruct.py", "lit_llama.generate.llm", more, *flags))


def test_addresses_that_do_not_do_for_torch_are_told_before_it_is_imported(tmp_path: Path) -> None:
    """Catches an abort of C++ amid an import, and a --help that is refused."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))

    for door in DOORS:
        command = [sys.executable, str(ROOT / door)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        run = {"env": environment, "preexec_fn": few, "capture_output": True, "text": True}
        found = subprocess.run(command, **run)  # type: ignore[call-overload]
        assert found.returncode == 5 and found.stderr.startswith("error: a process may have 419.43 MB of addresses")
        assert found.stderr.count("\n") == 1 and "ulimit -v" in found.stderr
    assert subprocess.run([*command, "--help"], **run).returncode == 0  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("error", "ran"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (ImportError("x.so: failed to map segment from shared object"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOENT, "No such file or directory", "out of memory"), False),
        (pyarrow.ArrowMemoryError("malloc of size 9 failed"), True),
        (SafetensorError("Error while memory mapping: Cannot allocate memory (os error 12)"), True),
        (RuntimeError("shapes do not fit"), False),
        (DataError("row 3: unknown role 'out of memory'"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_it_are_known_even_as_a_cause(error: Exception, ran: bool) -> None:
    """Catches words of a user that are taken for those of an allocator, and a damaged file that is none."""
    assert ran_out(error) is ran
    try:
        try:
            raise error
        except Exception as inner:
            raise CheckpointError("model.safetensors is damaged") from inner
    except CheckpointError as outer:
        assert ran_out(outer) is ran


@pytest.mark.parametrize("door", DOORS)
def test_what_is_to_be_lowered_is_there(door: str) -> None:
    """Catches advice with a flag that its door does not have."""
    main = runpy.run_path(str(ROOT / door))
    known = {name for function in ("main", "apply", "make") if function in main for name in _names(main[function])}
    flags = re.findall(r"--([\w.]+)", remedy(door))
    assert set(flags) <= known and (flags or door == "prepare/download.py")


def test_every_door_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a size that is not told, and an error of our own that hides the cause."""

    def main() -> None:
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12345 bytes.")
        except RuntimeError as error:
            raise CheckpointError("damaged") from error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["x"])
        CLI(main)
    assert ended.value.code == 5
    assert capsys.readouterr().err.startswith("error: out of memory, asking for 12345 bytes more; ")
