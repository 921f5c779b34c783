"""The folder of a sum: what an interruption leaves, where it says it came from, and that harm to it is found."""

import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from delta_files import assert_same, delta_of, folder_of, plain_sum, read
from delta_files import base as base  # a fixture

from lit_llama.conversion.delta import apply, verify
from lit_llama.conversion.delta_config import DeltaConfig
from lit_llama.errors import IntegrityError, LockedError
from lit_llama.folder.manifest import read_manifest
from lit_llama.folder.publish import resume

KILLED = """
import os, random, signal, sys
from pathlib import Path
from lit_llama.folder import publish as folder
from lit_llama.conversion import delta_writing
from lit_llama.conversion.delta import apply
from lit_llama.conversion.delta_config import DeltaConfig
steps, limit = [0], 0
def counted(module, name):
    original = getattr(module, name)
    def call(*a, **k):
        steps[0] += 1
        if steps[0] == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*a, **k)
    setattr(module, name, call)
for name in ("combine", "write_shard", "write_index", "_write_settings", "_write_origin", "write_manifest"):
    counted(delta_writing, name)
for name in ("sync", "_line"):
    counted(folder, name)
base, delta = map(Path, sys.argv[1:])
for line in sys.stdin:
    number, destination = line.rstrip().split(" ", 1)
    limit = int(number)
    if not (pid := os.fork()):
        apply(base, delta, Path(destination), DeltaConfig(max_shard_size="60KB"))
        print("steps", steps[0], flush=True)
        os._exit(0)
    print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Sums in forks of a process that has imported all: each is killed at the step that is asked for, or tells how many it
took."""
Start = Callable[[Path, int], tuple[int, int]]


@contextlib.contextmanager
def killed_sums(base: Path, delta: Path) -> Iterator[Start]:
    """Give what sums into a folder, up to the step of that number; it gives a status, and steps where that is 0."""
    command = [sys.executable, "-c", KILLED, str(base), str(delta)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def start(destination: Path, limit: int) -> tuple[int, int]:
            print(limit, destination, file=process.stdin, flush=True)
            found = {"steps": 0}
            while "status" not in found:
                name, number = process.stdout.readline().split()
                found[name] = int(number)
            return found["status"], found["steps"]

        yield start
        process.stdin.close()
    assert process.returncode == 0


def sums(folder: Path) -> dict[str, str]:
    return read_manifest(folder)


def test_a_run_killed_anywhere_goes_on_and_ends_in_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """Catches a folder that looks whole and is not, and a resumed run that keeps a half-written file."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    with killed_sums(base, delta) as start:
        status, total = start(tmp_path / "whole", 0)
        assert status == 0
        limits = sorted(random.Random(0).sample(range(1, total + 1), 5))
        statuses = {limit: start(tmp_path / f"killed-{limit}", limit)[0] for limit in limits}
        assert set(statuses.values()) == {-signal.SIGKILL}
        undone = [limit for limit in limits if not (tmp_path / f"killed-{limit}").exists()]
        # A second kill, then to the end: more than one interruption in a row must not matter.
        again = {limit: start(tmp_path / f"killed-{limit}", max(1, limit // 2))[0] for limit in undone}
    for limit in limits:
        destination = tmp_path / f"killed-{limit}"
        if limit not in undone:  # killed after the commit
            verify(destination)
            continue
        if again[limit] == 0:
            continue
        apply(base, delta, destination, DeltaConfig(max_shard_size="60KB"))
        assert sums(destination) == sums(tmp_path / "whole") and len(sums(destination)) > 8
        assert not list(tmp_path.glob(f".{destination.name}.*"))


def test_a_resumed_run_does_not_trust_a_damaged_file(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a journal that is believed without looking at the file, and work that is done twice."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    apply(base, delta, tmp_path / "whole", DeltaConfig(max_shard_size="60KB"))
    with killed_sums(base, delta) as start:
        assert start(tmp_path / "sum", 40)[0] == -signal.SIGKILL
    files = sorted((tmp_path / ".sum.unfinished").glob("model-*.safetensors"))
    assert len(files) > 2
    kept = files[1].stat().st_mtime_ns
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    capsys.readouterr()
    apply(base, delta, tmp_path / "sum", DeltaConfig(max_shard_size="60KB"))
    assert f"going on where it stopped: {len(files) - 1} of" in capsys.readouterr().err
    assert (tmp_path / "sum" / files[1].name).stat().st_mtime_ns == kept
    assert sums(tmp_path / "sum") == sums(tmp_path / "whole")


def test_another_plan_starts_afresh_and_a_second_process_waits_for_nobody(base: Path, tmp_path: Path) -> None:
    """Catches files of another delta in a sum, and two processes that write one folder."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    with killed_sums(base, delta) as start:
        assert start(tmp_path / "sum", 40)[0] == -signal.SIGKILL
    state = delta_of("ziya")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    other = folder_of(tmp_path / "other", state)
    with resume(tmp_path / "held", "plan"), ThreadPoolExecutor(1) as pool:
        second = pool.submit(apply, base, other, tmp_path / "held")
        assert isinstance(second.exception(), LockedError)
    apply(base, other, tmp_path / "sum", DeltaConfig(max_shard_size="60KB"))
    assert_same(read(tmp_path / "sum"), plain_sum(read(base), state, "ziya"))


def test_the_folder_says_where_it_came_from(base: Path, tmp_path: Path) -> None:
    """Catches provenance that changes with the files' cut, and a manifest that other programs cannot check."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    apply(base, delta, tmp_path / "one")
    apply(base, delta, tmp_path / "many", DeltaConfig(max_shard_size="60KB"))
    origins = [json.loads((tmp_path / name / "meta.json").read_text())["delta"] for name in ("one", "many")]
    assert origins[0] == origins[1]
    assert origins[0]["policy"] == "ziya" and origins[0]["base"]["path"] == str(base)
    assert origins[0]["base"]["weights_sha256"] != origins[0]["delta"]["weights_sha256"]
    assert set(sums(tmp_path / "many")) == {path.name for path in (tmp_path / "many").iterdir()} - {"SHA256SUMS"}
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "many", check=False)
    assert checked.returncode == 0


@pytest.mark.parametrize("harm", ["bit", "missing", "config", "line"])
def test_verify_finds_any_harm(base: Path, tmp_path: Path, harm: str) -> None:
    """Catches a verification that cannot fail."""
    apply(base, folder_of(tmp_path / "delta", delta_of("ziya")), tmp_path / "sum")
    folder = tmp_path / "sum"
    verify(folder, base, tmp_path / "delta")
    if harm == "bit":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[random.Random(0).randrange(len(data))] ^= 4
        (folder / "model.safetensors").write_bytes(data)
    elif harm == "missing":
        (folder / "tokenizer.json").unlink()
    elif harm == "config":
        (folder / "config.json").write_text((folder / "config.json").read_text().replace("384", "385"))
    else:
        (folder / "SHA256SUMS").write_text("0" * 64 + "  ../base/config.json\n")
    with pytest.raises(IntegrityError, match=r"damaged|missing"):
        verify(folder, base, tmp_path / "delta")


def test_verify_adds_rows_again(base: Path, tmp_path: Path) -> None:
    """Catches a verification by manifest alone: the files are as written, but of another sum."""
    apply(base, folder_of(tmp_path / "delta", delta_of("ziya")), tmp_path / "sum")
    state = delta_of("ziya")
    state["model.layers.1.mlp.down_proj.weight"] *= 0.5
    with pytest.raises(IntegrityError, match=r"down_proj\.weight is not the sum"):
        verify(tmp_path / "sum", base, folder_of(tmp_path / "other", state))
