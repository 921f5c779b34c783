"""What an optimizer remembers, as a file of tensors by the names of the parameters."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_llama.errors import NumericalError

OPTIMIZER_FILE = "optim.safetensors"


def write_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Write optim.safetensors, with `NAME.exp_avg` for the `exp_avg` of the parameter NAME and so on.

    Returns:
        What is no tensor, by the same names, to be kept elsewhere as JSON.

    Raises:
        NumericalError: A value is not finite; nothing is written.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, parameter in _named(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                others[f"{name}.{key}"] = value
            elif not value.isfinite().all():
                raise NumericalError(f"the optimizer's {key} of {name} is not finite; no state is written")
            else:
                tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / OPTIMIZER_FILE)
    return others


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, others: Mapping[str, Any]
) -> None:
    """Give a new optimizer what `write_optimizer` took from the old one, bit by bit.

    Its settings, such as the weight decay, stay those it was built with.
    """
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    # Copies, as the file is mapped and will be removed one day.
    tensors = {name: value.clone() for name, value in load_file(folder / OPTIMIZER_FILE).items()}
    for name, value in (tensors | dict(others)).items():
        parameter, _, key = name.rpartition(".")
        found[parameter][key] = value
    names = [name for name, _ in _named(model, optimizer)]
    state = {index: found[name] for index, name in enumerate(names) if name in found}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of an optimizer in its order, with their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter
