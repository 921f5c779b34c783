"""The processes of a run: which of them this one is, sums over all, and what only the first does.

One process forms no group and pays for none of this.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_llama.errors import Interrupted, ResourceError, UserError
from lit_llama.train.distributed.launch import LAUNCHER, launched, layout
from lit_llama.wording import param, params

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
_PATIENCE = 2.0
"""Seconds that a process with an error gives to the others: the launcher ends it when one of them has said it all."""
_LONG = 10.0
"""The same for an error of which the first process most likely speaks itself, however slowly it ends."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Processes of the run, and this one among them.

    Weights that train are the same in all of them, bit by bit, unless they are spread: they begin the same, and their
    gradients are summed by one all-reduce of one flat buffer when the last micro-batch of a step is done. torch's
    DistributedDataParallel does the same in buckets during the backward pass, which hides the time it takes; a LoRA
    adapter takes less than a millisecond of it, and without the wrapper processes may have different numbers of
    micro-batches, or none, and nothing has to be known of parameters that a pass leaves out. The sums are torch's own,
    as `Fabric.all_reduce` has all processes wait for each other before each of them.

    Args:
        rank: Number of this process, from 0.
        size: How many there are.
        here: How many of them are on this machine.
        sharded: Each holds a part of the model, so that all of them must do every pass together; see shards.py.
        fabric: Connects them, if there are several.
    """

    rank: int = 0
    size: int = 1
    here: int = 1
    sharded: bool = False
    fabric: "Fabric | None" = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sum each value over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        with _lost():
            dist.all_reduce(total)
        return list(total.tolist())

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients of all processes, in place; gives the sum of `loss`, which travels with them.

        A parameter without a gradient counts as zero: the share of a process may be empty.
        """
        if self.size == 1:
            return loss
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([part.flatten().float() for part in (*parts, loss.detach())])
        with _lost():
            dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return flat[-1]

    def highest(self, value: int, device: torch.device) -> int:
        """Return the highest value that a process gives."""
        if self.size == 1:
            return value
        highest = torch.tensor(value, device=device)
        with _lost():
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest.item())

    def first(self, decide: Callable[[], T]) -> T:
        """Decide in the first process, for all of them; the others do not try."""
        if self.fabric is None:
            return decide()
        decided = decide() if self.is_first else None
        with _lost():
            return self.fabric.broadcast(decided)  # type: ignore[return-value]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.fabric is not None:
            with _lost():
                self.fabric.barrier()

    def check_same(self, what: str, value: object) -> None:
        """Make sure that all processes have read the same.

        Raises:
            UserError: This one has not.
        """
        if self.first(lambda: value) != value:
            raise UserError(
                f"process {self.rank} on {os.uname().nodename} finds another {what} than process 0; the folders of a "
                "run must be the same on all machines"
            )


ALONE = Processes()
"""The only process of a run."""


def described(processes: Processes, *, whole: bool = False) -> str:
    """Describe how they work together, as the end of a sentence about one of them.

    Args:
        processes: They.
        whole: All weights train.
    """
    if processes.size == 1:
        return ""
    what = "weights, gradients and optimizer" if whole else "the frozen layers"
    spread = f", {what} spread over all" if processes.sharded else ""
    return f"; {processes.size} processes, this for each of them{spread}"


@contextlib.contextmanager
def join(devices: int | Literal["auto"], num_nodes: int) -> Iterator[Processes]:
    """Be one of the processes of a run, which `launch`, torchrun or SLURM have started.

    All but the first are silent. They leave together, so that none ends what another one is still writing.

    Raises:
        ResourceError: Fewer GPUs than processes here, or another process is gone.
    """
    here, machines = layout(devices, num_nodes)
    if here * machines == 1:
        yield ALONE
        return
    if not launched():
        both = params(devices=devices, num_nodes=num_nodes)
        raise UserError(f"{both} is for commands, which start a process for each, and torchrun")
    _end_with_launcher()
    with contextlib.ExitStack() as stack:
        rank = _rank(here)
        try:
            if rank:
                stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
            fabric = _connect(here, machines)
            processes = Processes(rank=fabric.global_rank, size=fabric.world_size, here=here, fabric=fabric)
            yield processes
            processes.wait()
            dist.destroy_process_group()
        except Interrupted as error:  # which is so in all of them
            processes.wait()
            if rank:
                time.sleep(_PATIENCE)
                sys.exit(error.exit_status)
            raise
        except Exception as error:
            if isinstance(error, LostError):  # the reason may be another one's to tell
                time.sleep(_LONG + _PATIENCE)
            elif not isinstance(error, UserError):
                time.sleep(_PATIENCE)
            elif rank:
                time.sleep(_LONG)
            raise


class LostError(ResourceError):
    """Another process of the run is gone."""


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """torch's errors of communication, which tell of sockets, as what they mean."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostError(
            f"another process of this run is gone ({reason}); the last state stays. Continue with "
            f"{param('resume', 'auto')}"
        ) from error


def _rank(here: int) -> int:
    """Number of this process, before the others are found."""
    if LAUNCHER in os.environ:
        return int(os.environ["NODE_RANK"]) * here + int(os.environ["LOCAL_RANK"])
    return int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])


def _connect(here: int, machines: int) -> "Fabric":
    """Join the group of all processes; with GPUs, this one has its own from here on."""
    gpus = torch.cuda.device_count()
    if gpus and here > gpus:
        raise ResourceError(
            f"{param('devices')} is {here}, but this machine has {gpus} {'GPU' if gpus == 1 else 'GPUs'}"
        )
    import logging

    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    environment: ClusterEnvironment = LightningEnvironment()
    if LAUNCHER not in os.environ:
        environment = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment()
    fabric = Fabric(
        accelerator="cuda" if gpus else "cpu",
        devices=here,
        num_nodes=machines,
        strategy=DDPStrategy(),
        plugins=[environment],
    )
    try:
        fabric.launch()
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ResourceError(f"the processes do not find each other: {reason}") from error
    return fabric


def _end_with_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher dies: the step is finished and saved, and nothing runs unseen."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(launcher):
        signal.raise_signal(signal.SIGTERM)
