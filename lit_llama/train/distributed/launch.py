"""Starting the processes of a run on this machine, and ending them together. Imports no torch.

torchrun and SLURM start the processes themselves; then there is nothing to do here but to read how many there are. In
either case the processes meet through Lightning Fabric, see processes.py. Fabric's own launchers (of 2.6) are no
substitute for this file:

* Its script launcher runs `sys.argv` again out of the first process. When another one fails, a thread of the first
  kills it by SIGKILL, up to five seconds later, without the error, status and signal of the one that failed; a call
  from Python would run, and kill, the program that made it. `python -X` and `-c` are lost on the way.
* Its spawning launcher passes no signal on, and the process that waits has to load torch before the others can begin.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Literal

from lit_llama.errors import ResourceError, UserError
from lit_llama.train.interrupt import SIGNALS
from lit_llama.wording import param

LAUNCHER = "LIT_LLAMA_LAUNCHER"
"""In the environment of a process that was started here: the id of the process that did."""
_POLL = 0.05  # seconds
_SHARING = 8  # processes that may be more than the cores


def launch(devices: int | Literal["auto"], num_nodes: int) -> None:
    """Start this command once for each device and wait for all of them; returns only where there is nothing to start.

    The processes end together: a signal to this one is passed on to all, and when one of them dies the others, which
    would wait for it forever, are killed. Their states are written so that this harms none.

    Raises:
        ResourceError: More processes than cores, or one was killed by others than this one.
        SystemExit: All have ended; with the status of the first that did not end well, or 0.
        UserError: Numbers that make no sense.
    """
    processes, machines = layout(devices, num_nodes)
    if launched() or processes * machines == 1:
        return
    # A few may share a core. Of GPUs, which are fewer, each process counts its own; torch is too slow to ask here.
    if processes > max(cores := os.cpu_count() or 1, _SHARING):
        raise ResourceError(
            f"{param('devices')} is {processes}, but this machine has {cores} {'core' if cores == 1 else 'cores'}, "
            "and each "
            f"device is a process; name fewer, or {param('plan')} for another machine"
        )
    sys.exit(_Group(processes, _meeting_place(processes, machines)).wait())


def launched() -> bool:
    """Whether somebody has started this process as one of several."""
    return _outside() is not None or LAUNCHER in os.environ


def layout(devices: int | Literal["auto"], num_nodes: int) -> tuple[int, int]:
    """Count the processes on each machine, and the machines.

    torchrun and SLURM have decided it already: `devices` and `num_nodes` may be left out there.

    Raises:
        UserError: Numbers below 1, or others than theirs.
    """
    if (devices != "auto" and devices < 1) or num_nodes < 1:
        raise UserError(
            f"{param('devices')} is {devices} and {param('num_nodes', num_nodes)}, expected 1 or more of each"
        )
    if outside := _outside():
        name, processes, machines = outside
        if devices not in ("auto", 1, processes) or num_nodes not in (1, machines):
            raise UserError(
                f"{param('devices')} is {devices} and {param('num_nodes', num_nodes)}, but {name} has started "
                f"{processes} processes on "
                f"each of {machines} machines; leave both out"
            )
        return processes, machines
    if devices != "auto":
        return devices, num_nodes
    import torch

    return max(1, torch.cuda.device_count()), num_nodes


def _outside() -> tuple[str, int, int] | None:
    """Who else has started the processes: its name, processes on each machine, machines."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return "torchrun", here, everywhere // here
    # In a batch script without srun, SLURM_NTASKS says how many there could be; SLURM_STEP_ID is there with srun only.
    if "SLURM_STEP_ID" in os.environ and (tasks := int(os.environ.get("SLURM_NTASKS", 1))) > 1:
        machines = int(os.environ.get("SLURM_NNODES", 1))
        return "srun", tasks // machines, machines
    return None


def _meeting_place(processes: int, machines: int) -> dict[str, str]:
    """The environment by which the processes find each other, as torch.distributed and Fabric read it."""
    found = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")}
    if machines > 1 and (missing := [name for name, value in found.items() if value is None]):
        raise UserError(
            f"{param('num_nodes')} is {machines}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "set: "
            "start the command on each machine with the address and a free port of the first in MASTER_ADDR and "
            "MASTER_PORT and its own number from 0 in NODE_RANK, or use torchrun or srun"
        )
    if machines > 1:
        return {name: str(value) for name, value in found.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}


class _Group:
    """The processes of this machine.

    They are no part of the terminal's foreground group: Ctrl-C reaches the launcher alone and, passed on, each of them
    once, since a second one would mean "stop now".
    """

    def __init__(self, processes: int, environment: Mapping[str, str]) -> None:
        self._sent: set[int] = set()
        self._children: Sequence[subprocess.Popen[bytes]] = []
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._pass_on)
            for number in SIGNALS
            if signal.getsignal(number) not in (signal.SIG_IGN, None)
        }
        shared = os.environ | environment | {LAUNCHER: str(os.getpid())}
        self._children = [
            subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                env=shared | {"LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            for rank in range(processes)
        ]

    def wait(self) -> int:
        """The status of the first that does not end well, with the others killed; 0 when all do."""
        try:
            while True:
                codes = [child.poll() for child in self._children]
                for rank, code in enumerate(codes):
                    if code:
                        return self._status(rank, code)
                if all(code == 0 for code in codes):
                    return 0
                time.sleep(_POLL)
        finally:
            for child in self._children:
                child.kill()
            for child in self._children:
                child.wait()
            for number, before in self._before.items():
                signal.signal(number, before)

    def _status(self, rank: int, code: int) -> int:
        if code > 0 or -code in self._sent:
            return code if code > 0 else 128 - code
        raise ResourceError(
            f"process {rank} of {len(self._children)} was killed by {signal.Signals(-code).name}, by hand or for want "
            f"of memory; the others were stopped, and the last state stays. Continue with {param('resume', 'auto')}"
        )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._sent.add(number)
        for child in self._children:
            child.send_signal(number)
