"""What an optimizer remembers, as a file of tensors by the names of the parameters."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lit_llama.errors import NumericalError
from lit_llama.train.optim import load_state_tensors, state_tensors

OPTIMIZER_FILE = "optim.safetensors"


def write_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write optim.safetensors, with `NAME.exp_avg` for the `exp_avg` of the parameter NAME and so on.

    Raises:
        NumericalError: A value is not finite; nothing is written.
    """
    names, tensors = _names(model, optimizer), {}
    for place, value in state_tensors(optimizer).items():
        index, _, key = place.partition(".")
        if not value.isfinite().all():
            raise NumericalError(f"the optimizer's {key} of {names[int(index)]} is not finite; no state is written")
        tensors[f"{names[int(index)]}.{key}"] = value.cpu().contiguous()
    save_file(tensors, folder / OPTIMIZER_FILE)


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Give a new optimizer what `write_optimizer` took from the old one, bit by bit.

    Its settings, such as the weight decay, stay those it was built with.
    """
    places = {name: index for index, name in enumerate(_names(model, optimizer))}
    found = {}
    for place, value in load_file(folder / OPTIMIZER_FILE).items():
        name, _, key = place.rpartition(".")
        found[f"{places[name]}.{key}"] = value.clone()  # the file is mapped and will be removed one day
    load_state_tensors(optimizer, found)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters of an optimizer in its order, by their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
