"""Layers of a model as they are packed: weights with what was trained of them, but for updates of low rank."""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from lit_llama.model.adapters.low_rank import Adapter, LowRank
from lit_llama.model.kernels.packing import MappedFiles
from lit_llama.model.quantize import QuantizedLinear


class Factors(NamedTuple):
    """An update of low rank: scale B A, with A (r, in) and B (out, r)."""

    a: Tensor
    b: Tensor
    scale: float


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """Return the updates of low rank on the decoder's layers of a model, by their full names; what else was trained is
    in its packed weights.
    """
    return {
        name: Factors(module.lora_A, module.lora_B, module.scale)
        for name, module in model.named_modules()
        if isinstance(module, LowRank) and _is_plain(module) and name.startswith("model.layers.")
    }


def _is_plain(module: nn.Module) -> TypeGuard[LowRank]:
    """Whether what was trained of a module is an update B A and no more."""
    return isinstance(module, LowRank) and module.PARTS == LowRank.PARTS


def weight_of(module: nn.Module, *, whole: bool = False) -> Tensor:
    """Return a layer's weight without its update of low rank, or with it; merged with what else was trained of it."""
    base = getattr(module, "base_layer", module)
    weight = base.dense(torch.float32) if isinstance(base, QuantizedLinear) else base.get_parameter("weight")
    if isinstance(module, Adapter) and (whole or not _is_plain(module)):
        weight = module.merged(weight)
    return weight.detach()


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias of a layer, where it has one."""
    bias = getattr(getattr(module, "base_layer", module), "bias", None)
    return None if bias is None else bias.detach()


def give_up(module: nn.Module, files: MappedFiles) -> None:
    """Let go of the weight of a layer, and of its part of a mapped file."""
    base = getattr(module, "base_layer", module)
    name = "packed" if isinstance(base, QuantizedLinear) else "weight"
    files.forget(base.get_parameter(name))
    base.register_parameter(name, nn.Parameter(torch.empty(0), requires_grad=False))
