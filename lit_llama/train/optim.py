"""Optimizers: how they are built, their learning rate, and their state as named tensors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_llama.errors import ResourceError
from lit_llama.model.quantize import library
from lit_llama.train.config import Optimizer, TrainConfig

Group = dict[str, Any]
"""What torch calls a parameter group: `params`, and settings of its own such as weight_decay or lr_ratio."""


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[Group], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of `config`, at learning rate zero until `set_learning_rate`.

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
            f"--train.optimizer paged_adamw_8bit moves memory between GPU and CPU, which the {device.type} has not; "
            "use --train.optimizer adamw_8bit"
        )
    if "8bit" in name:
        library(f"--train.optimizer {name}")


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[Group]:
    """Trainable parameters in two groups: matrices, which decay, and norms and biases, which do not.

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
    """Every group learns at `rate`, or at `rate` times its `lr_ratio` (LoRA+: Hayou et al. 2024, arXiv:2402.12354)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that the optimizer remembers, by names such as `12.exp_avg`: number of the parameter and of what it is.

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
            found[f"{index}.{name}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
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
    """Bytes of state for so many trained values that take `size` bytes; moments of full size are in their dtype."""
    return int(STATE_BYTES[optimizer] * (values if "8bit" in optimizer else size / 4))
