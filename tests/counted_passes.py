"""What a forward and backward pass takes: planned on a model without numbers, and counted on one with."""

from collections.abc import Sequence

import torch
from tiny_families import random_ids

from lit_llama.model.assemble import assemble
from lit_llama.model.attention.layout import Packed
from lit_llama.model.llama import LLaMA
from lit_llama.train.loss import TokenLoss
from lit_llama.train.memory.footprint import Build, Shape, _Count


def planned_and_counted(build: Build, lengths: Sequence[int], trained: int) -> tuple[int, int]:
    """Bytes at the peak, by the plan and by counting."""
    torch.manual_seed(0)
    loss_of = TokenLoss(assemble(LLaMA(build.config).requires_grad_(False), build.assembly()).model.train())
    for parameter in loss_of.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ids = random_ids(sum(lengths))
    with _Count(loss_of) as count:
        loss_of.of_layout(ids, Packed([*lengths]), torch.arange(trained), ids[1 : trained + 1]).sum().backward()
    return build.training_peak(Shape([*lengths], trained)), count.peak
