"""The worst micro-batch first, so that running out of memory happens in the first minute."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_llama.text.dataset.folder import Batch, Split, collate, largest_group
from lit_llama.train.config import TrainConfig
from lit_llama.train.loss import TokenLoss


def largest_batch(
    split: Split, config: TrainConfig, device: str, seed: int, processes: int = 1, *, share: bool = False
) -> Batch:
    """The largest micro-batch that the steps of a run meet, in whichever of its processes; `share` as in `collate`."""
    rows = largest_group(
        split.lengths,
        batch_size=config.batch_size,
        micro_batch_tokens=config.tokens_on(device),
        seed=seed,
        steps=config.steps(len(split)),
        shares=processes,
    )
    return collate([split[row] for row in rows], share=share)


def warm_up(loss_of: TokenLoss, backward: Callable[[Tensor], object], batch: Batch) -> None:
    """Run `batch` forward and backward and leave no trace: no gradients, the same random numbers afterwards.

    It runs twice, as the second time meets the gradients of the first, and real steps have several micro-batches.
    """
    device = next(loss_of.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            backward(loss_of.of_batch(batch))
    for parameter in loss_of.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
