"""Low-rank adapters on a built model (Hu et al. 2021, arXiv:2106.09685).

Shapes: r rank; A (r, in_features), B (out_features, r). The update is scale * B A with scale = alpha / r.
"""

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.errors import UserError
from lit_llama.model.config import LoRAConfig


class LoRALinear(nn.Linear):
    """A frozen linear layer with trainable A and B: y = x W' + scale * dropout(x) A' B'.

    A and B are kept in float32 whatever the base is in, because their updates are far below bfloat16's resolution.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.r, base.in_features, device=device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, device=device))  # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        y = F.linear(x, self.weight, self.bias)
        u = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (T, r)
        return torch.addmm(y, u, self.lora_B.to(x.dtype).t(), alpha=self.scale)


def apply_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freeze `model` and put adapters on the linear layers that `config` names, in place.

    Returns:
        The full names of the adapted modules.

    Raises:
        UserError: A target names no linear layer of the model.
    """
    model.requires_grad_(False)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    last = {name.rpartition(".")[2] for name in linears}
    for target in config.targets:
        if not any(_matches(name, target) for name in linears):
            close = difflib.get_close_matches(target, last, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(last))}"
            raise UserError(f"--lora.target_modules: {target!r} matches no linear layer of the model{hint}")
    adapted = [name for name in linears if any(_matches(name, target) for target in config.targets)]
    for name in adapted:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linears[name], config))
    return adapted


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their full names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All A and B, what an optimizer is given."""
    return [parameter for _, module in adapters(model) for parameter in (module.lora_A, module.lora_B)]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone: adapters add nothing inside this context."""
    scales = {module: module.scale for _, module in adapters(model)}
    try:
        for module in scales:
            module.scale = 0.0
        yield
    finally:
        for module, scale in scales.items():
            module.scale = scale


def merge_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + scale * B A, added in float32 and rounded once to `dtype`: (out, in)."""
    return torch.addmm(weight.float(), lora_B.float(), lora_A.float(), alpha=scale).to(dtype)
