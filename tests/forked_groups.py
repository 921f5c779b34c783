"""Commands of one or several processes, in forks of a process that has imported everything.

What the launcher starts would import for ten seconds each. Here it forks in place of starting Python again; all else is
the launcher's own: the environment, signals, and who ends whom. How it starts Python is tested with the command.
"""

import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from forks import ROOT, become, ended, import_all
from known_passes import keep
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lit_llama.train.distributed import launch

ALONE_IN_ENVIRONMENT = (
    *("LOCAL_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
"""Variables by which others say that they have started a process, or where it meets its like."""


def alone() -> dict[str, str]:
    """The environment of a command that nobody has started as one of several."""
    environment = {name: value for name, value in os.environ.items() if name not in ALONE_IN_ENVIRONMENT}
    return environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def in_forks(
    script: str | Path, *words: object, torchrun: bool = False, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a script whose processes are forks, as a new Python would.

    Args:
        script: Such as finetune/lora.py, or one of the tests' own.
        words: Its command line.
        torchrun: It is started as two processes by the agent of torchrun, else it starts its own.
        cwd: Where.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    command = [str(script), *map(str, words)]
    server.stdin.write(json.dumps({"torchrun": torchrun, "cwd": str(cwd), "command": command}) + "\n")
    server.stdin.flush()
    return subprocess.CompletedProcess(command, *json.loads(server.stdout.readline()))


@functools.cache
def _server() -> subprocess.Popen[str]:
    """A process that has imported torch and computed nothing: forks of one that has computed hang in OpenMP."""
    command = [sys.executable, __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone(), cwd=ROOT)


class _Fork:
    """What the launcher uses of a Popen, for a fork that becomes `command` as a new Python would."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdin: int, process_group: int) -> None:
        assert stdin == subprocess.DEVNULL and process_group == 0
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        script, *words = command
        become(script, words)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        if self._code is None:
            self._code = ended(self.pid)
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _started_by_itself(command: Sequence[str]) -> NoReturn:
    """Be a command whose launcher forks."""

    def popen(words: Sequence[str], **settings: Any) -> _Fork:
        assert words == [sys.executable, *sys.orig_argv[1:]]
        return _Fork(command, **settings)

    launch.subprocess = SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    become(command[0], command[1:])


def _started_by_torchrun(command: Sequence[str]) -> NoReturn:
    """Be torchrun with two processes, as `torch.distributed.run` calls it, but for its way to start them."""
    status = 1
    try:
        settings: dict[str, Any] = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "start_method": "fork"}
        settings |= {"run_id": "tests", "max_restarts": 0, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
        elastic_launch(LaunchConfig(**settings), _run)(*command)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def _run(script: str, *words: str) -> None:
    keep(pytest.MonkeyPatch())
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def _serve() -> None:
    """Answer requests until the input ends: a fork for each, which starts others."""
    import_all()
    for name in ("lightning_fabric", "torch.distributed.fsdp"):
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if not pid:
                for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out.fileno()), (2, err.fileno())):
                    os.dup2(file, number)
                os.chdir(asked["cwd"])
                sys.path.insert(0, str((ROOT / asked["command"][0]).parent))
                (_started_by_torchrun if asked["torchrun"] else _started_by_itself)(asked["command"])
            status, said = ended(pid), []
            for stream in (out, err):
                stream.seek(0)
                said.append(stream.read().decode("utf-8", "replace"))
            print(json.dumps([status, *said]), flush=True)


if __name__ == "__main__":
    _serve()
