"""Optimizers, their state, the course of the learning rate and the scale of losses."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_llama.errors import NumericalError, ResourceError
from lit_llama.model.quantize import library
from lit_llama.train.config import Optimizer, TrainConfig
from lit_llama.train.distributed.shards import is_spread, local, put, read_tensors, write_tensors
from lit_llama.wording import param

OPTIMIZER_FILE = "optim.safetensors"


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what optim.safetensors holds: `NAME.exp_avg` for the `exp_avg` of the parameter NAME and so on."""
    names, tensors = _names(model, optimizer), {}
    for place, value in state_tensors(optimizer).items():
        index, _, key = place.partition(".")
        tensors[f"{names[int(index)]}.{key}"] = value
    return tensors


def write_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, given: Mapping[str, Tensor] | None = None
) -> None:
    """Write optim.safetensors.

    Args:
        model: What is trained.
        optimizer: Of its weights.
        folder: Where to.
        given: Gives whole tensors by their names, where processes have parts of them; see `shards.gather`.

    Raises:
        NumericalError: A value is not finite; nothing is written.
    """
    tensors = optimizer_tensors(model, optimizer)

    def read(name: str) -> Tensor:
        value = (given or tensors)[name]
        if not value.isfinite().all():
            owner, _, key = name.rpartition(".")
            raise NumericalError(f"the optimizer's {key} of {owner} is not finite; no state is written")
        return value

    write_tensors(folder / OPTIMIZER_FILE, tensors, read)


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Give a new optimizer what `write_optimizer` took from the old one, bit by bit.

    Its settings, such as the weight decay, stay those it was built with.
    """
    parameters, found = _parameters(optimizer), {}
    places = {name: index for index, name in enumerate(_names(model, optimizer))}
    for place, value in read_tensors(folder / OPTIMIZER_FILE):
        name, _, key = place.rpartition(".")
        like = parameters[places[name]]
        if is_spread(like) and value.shape == like.shape:
            own = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
            put(own, value)
        else:
            own = value.clone()  # the file is mapped and will be removed one day
        found[f"{places[name]}.{key}"] = own
    load_state_tensors(optimizer, found)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters of an optimizer in its order, by their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def overflowed(scaler: torch.amp.GradScaler, loss: float, norm: float) -> bool:
    """Whether a step is skipped because the scale was too high, which `scaler.update` then halves.

    It is no failure: the scale starts too high by design and tries a doubled one now and then. A loss that is not
    finite itself, or gradients that are not at scale 1, no scale repairs.

    Args:
        scaler: Has unscaled the gradients already.
        loss: Of the step, before scaling.
        norm: Of the gradients.
    """
    return scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() > 1


WARMUP_RATIO, DECAY_RATIO = 0.03, 0.1
"""Shares of the run where neither ratio nor steps are given."""


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Compute the rate of optimizer step `step` (from 0) of `steps`: a linear rise from above zero, then the schedule.

    What falls ends at min_lr_ratio of the highest rate, one step after the last: cosine along half a wave (Loshchilov
    and Hutter 2017, arXiv:1608.03983), linear, and wsd linearly over the last decay_ratio of the steps after a stretch
    at the top (Hu et al. 2024, arXiv:2404.06395).
    """
    warmup = warmup_steps(steps, config)
    if step < warmup:
        return config.highest_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.highest_rate
    fall = steps - warmup
    if config.schedule == "wsd":
        ratio = DECAY_RATIO if config.decay_ratio is None else config.decay_ratio
        fall = min(math.ceil(ratio * steps), fall)
    progress = max(0.0, (step - (steps - fall)) / max(1, fall))
    height = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.highest_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)


def warmup_steps(steps: int, config: TrainConfig) -> int:
    """Count the optimizer steps of the rise.

    A warm-up longer than the run is cut to it, so that the highest rate is reached.
    """
    if config.warmup_steps is not None:
        return min(config.warmup_steps, steps)
    return math.ceil((WARMUP_RATIO if config.warmup_ratio is None else config.warmup_ratio) * steps)


Group = dict[str, Any]
"""What torch calls a parameter group: `params`, and settings of its own such as weight_decay or lr_ratio."""


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[Group], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Build the optimizer of `config`, at learning rate zero until `set_learning_rate`.

    Decay is decoupled from the gradient (Loshchilov and Hutter 2019, arXiv:1711.05101), for sgd it is added to it. The
    8-bit moments are quantised in blocks of 256 values (Dettmers et al. 2022, arXiv:2110.02861); parameters of fewer
    than 4096 values keep theirs in float32.

    Args:
        parameters: What to train, or groups of it; a group may carry an `lr_ratio`, see `set_learning_rate`.
        config: Which optimizer, and its settings.
        device: Where the parameters are.

    Raises:
        ResourceError: See `check_optimizer`.
    """
    check_optimizer(config.optimizer, device)
    decay = config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=config.beta1, weight_decay=decay)
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=config.eps, weight_decay=decay, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    kind = AdamW8bit if config.optimizer == "adamw_8bit" else PagedAdamW8bit
    built: torch.optim.Optimizer = kind(parameters, lr=0.0, betas=betas, eps=config.eps, weight_decay=decay)
    return built


def check_optimizer(name: Optimizer, device: torch.device) -> None:
    """Refuse an optimizer that this machine has not, before a model is loaded for it.

    Raises:
        ResourceError: bitsandbytes is not installed, or the device has no paged memory.
    """
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise ResourceError(
            f"moves memory between GPU and CPU, which the {device.type} has not",
            parameter="train.optimizer",
            value="paged_adamw_8bit",
            remedy=f"use {param('train.optimizer', 'adamw_8bit')}",
        )
    if "8bit" in name:
        library(param("train.optimizer", name))


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[Group]:
    """Divide trainable parameters into two groups: matrices, which decay, and norms and biases, which do not.

    For full fine-tuning: a norm scales a whole channel, and pulling it to zero pulls the model there.
    """
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group to `rate`, or to `rate` times its `lr_ratio` (LoRA+: Hayou et al. 2024,
    arXiv:2402.12354).
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all that the optimizer remembers, by names such as `12.exp_avg`: number of the parameter and of what it
    is.

    Plain tensors that share no memory, ready for safetensors; whole numbers become int64 tensors without a dimension.
    The same for every optimizer, while the `state_dict` of those of bitsandbytes is nested.
    """
    found: dict[str, Tensor] = {}
    seen = set()
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # the momentum of sgd before its first step
                continue
            tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
            # The tables of 8-bit values are one tensor for all parameters.
            place = local(tensor).data_ptr()
            found[f"{index}.{name}"] = tensor.clone() if place in seen else tensor
            seen.add(place)
    return found


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave; learning rate and the other settings stay those of `optimizer`.

    Raises:
        ValueError: A tensor belongs to no parameter of the optimizer.
    """
    count = len(_parameters(optimizer))
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        if not (index.isdecimal() and int(index) < count and key):
            raise ValueError(f"{name} belongs to none of the {count} parameters of the optimizer")
        whole = value.ndim == 0 and value.dtype == torch.int64
        state.setdefault(int(index), {})[key] = value.item() if whole else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _page(optimizer: Any) -> None:
    """Bring what bitsandbytes has loaded as plain memory of the GPU into pages, where it keeps it in a new run."""
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state:
                buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = buffer.copy_(state[name])


def _parameters(optimizer: torch.optim.Optimizer) -> Sequence[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 2 + 2 * 4 / 256, "sgd": 4.0}
"""Bytes of state for each trained value in float32."""


def state_bytes(optimizer: Optimizer, values: int, size: int) -> int:
    """Return the bytes of state for so many trained values of `size` bytes; moments of full size are in their dtype."""
    return int(STATE_BYTES[optimizer] * (values if "8bit" in optimizer else size / 4))
