"""Weights spread over the processes, for a model that no device holds alone (FSDP2), and the way to them.

Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard. Of Fabric's strategies, FSDPStrategy refuses a
CPU, on which the tests compare with one process, and ModelParallelStrategy calls a function like `shard` below.

A tensor of which each process has a part is a DTensor. Below `shard` nobody asks which strategy a run has: the
functions here take tensors of both kinds, and leave alone what every process has whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_llama.conversion.source import NAMES
from lit_llama.model.experts import SparseMLP
from lit_llama.model.files.shards import write_shard
from lit_llama.train.distributed.processes import Processes
from lit_llama.train.loss import TokenLoss

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def shard(loss_of: TokenLoss, device: torch.device, size: int) -> None:
    """Leave each process its part of the weights, in place; those of a layer are whole only while it computes.

    Where all weights train, all of them are cut, and with them gradients and moments. Where some are frozen, those of
    the decoder layers are; what trains stays whole, outside of what torch looks after: `Processes.sum_gradients` sums
    its gradients, and it is saved as if nothing were sharded. So do embeddings, head and last norm.

    Every forward and every backward pass is something that all processes do together.

    Args:
        loss_of: A model with its loss, on the CPU, when every replacement of modules is done.
        device: Where this process computes. One layer at a time goes there before it is cut.
        size: Number of processes.
    """
    # Half of what a fine-tuning script imports, sympy with them, for the few that shard.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh(device.type, (size,)), loss_of.model
    if all(parameter.requires_grad for parameter in model.parameters()):
        _shard_all(loss_of, mesh)
        _move(model, device)
        return
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})
        _move(layer, device)
    # It manages no parameter; it makes the layers one tree, in which the next is fetched while one computes.
    fully_shard(model.model, mesh=mesh, ignored_params=set(model.model.parameters()))
    _move(model, device)


def _shard_all(loss_of: TokenLoss, mesh: "DeviceMesh") -> None:
    """Cut weights that train: each layer, an embedding that is not the head, and what remains, all with sums of
    gradients.

    The loss reads the head's weight itself, so that head, last norm and tied embeddings belong to the loss, and are
    whole during its passes; not between them, when weights are read and written. Gradients are cut after every
    micro-batch: kept whole until the last, they would take as much memory as the model.
    """
    from torch.distributed.fsdp import fully_shard

    model = loss_of.model
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for module in (*model.model.layers, *([] if tied else [model.model.embed_tokens]), loss_of):
        part = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all processes already
        part.set_force_sum_reduction_for_comms(True)  # or that would be a multiplication that NCCL alone knows
    for module in model.modules():
        if isinstance(module, SparseMLP):
            module.every = True


def _move(module: nn.Module, device: torch.device) -> None:
    """Bring to the device what is not sharded; a weight that two modules share stays shared."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not is_spread(tensor):
            tensor.data = tensor.data.to(device)


def is_spread(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Tell whether a process has no more than a part of a tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose class is not imported where nothing is spread


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process has, to read and to write; all of one that is not spread."""
    return tensor.to_local() if is_spread(tensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; of one that is spread, all processes do so together."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every process has read, to where each may have no more than a part of it."""
    if is_spread(target):
        from torch.distributed.tensor import distribute_tensor

        given = value.to(target.device)
        value = distribute_tensor(given, target.device_mesh, target.placements, src_data_rank=None)  # none sends it
    target.copy_(value)


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same kind, each process its parts."""
    torch._foreach_copy_([local(target) for target in targets], [local(value) for value in values])


def gather(
    processes: Processes, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], object]
) -> None:
    """Have the first process write tensors, whole, one at a time.

    Args:
        processes: All of them come here together; all but the first give their parts of what it asks for.
        tensors: By the same names in all processes.
        write: Takes the tensors by name; it may ask for some, in any order.
    """
    spread = any(is_spread(tensor) for tensor in tensors.values())
    if processes.is_first:
        write(_Gathered(processes, tensors) if spread else tensors)
    while spread and (name := _asked(processes, None)) is not None:
        whole(tensors[name])


def _asked(processes: Processes, name: str | None) -> str | None:
    """The name that the first process gives."""
    return processes.first(lambda: name)


class _Gathered(Mapping[str, Tensor]):
    """Tensors by name, of which the other processes give their parts when one is asked for."""

    def __init__(self, processes: Processes, tensors: Mapping[str, Tensor]) -> None:
        self._processes, self._tensors = processes, tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if is_spread(tensor):
            _asked(self._processes, name)
        return whole(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def write_tensors(path: "Path", tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file; where tensors are spread, memory holds one of them whole and not all.

    Args:
        path: Where to.
        tensors: As this process has them.
        read: Gives a whole one by its name.
    """
    if any(is_spread(tensor) for tensor in tensors.values()):
        names = sorted(tensors)  # a run that goes on has read them in the order of a file
        specs = {name: (NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names}
        write_shard(path, specs, (read(name).cpu() for name in names))
    else:
        save_file({name: read(name).cpu().contiguous() for name in tensors}, path)


def read_tensors(path: "Path") -> Iterator[tuple[str, Tensor]]:
    """Read a safetensors file, one tensor after the other."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118, as it is no mapping
            yield name, file.get_tensor(name)
