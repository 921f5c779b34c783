"""Frozen decoder layers spread over the processes, for a base that no device holds alone (FSDP2).

Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard. Of Fabric's strategies, FSDPStrategy refuses a
CPU, on which the tests compare with one process, and ModelParallelStrategy calls a function like `shard` below.
"""

import torch
from torch import nn

from lit_llama.errors import UserError
from lit_llama.model.llama import LLaMA
from lit_llama.wording import param


def shard(model: LLaMA, device: torch.device, size: int) -> None:
    """Leave each process its part of every frozen decoder layer, in place; a layer is whole only while it computes.

    What trains stays whole in all of them, outside of what torch looks after: `Processes.sum_gradients` sums its
    gradients, and it is saved as if nothing were sharded. So do embeddings, head and last norm. Every forward and
    every backward pass is something that all processes do together.

    Args:
        model: On the CPU, when every replacement of modules is done.
        device: Where this process computes. One layer at a time goes there before it is cut.
        size: Number of processes.

    Raises:
        UserError: Nothing in the layers is frozen.
    """
    # Half of what a fine-tuning script imports, sympy with them, for the few that shard.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if all(parameter.requires_grad for parameter in model.model.layers.parameters()):
        raise UserError(
            "spreads frozen weights, and here all of them train",
            parameter="strategy",
            value="fsdp",
            remedy=f"use {param('strategy', 'ddp')}",
        )
    mesh = init_device_mesh(device.type, (size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})
        _move(layer, device)
    # It manages no parameter; it makes the layers one tree, in which the next is fetched while one computes.
    fully_shard(model.model, mesh=mesh, ignored_params=set(model.model.parameters()))
    _move(model, device)


def _move(module: nn.Module, device: torch.device) -> None:
    """Bring to the device what is not sharded; a weight that two modules share stays shared."""
    from torch.distributed.tensor import DTensor

    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
