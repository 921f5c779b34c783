"""Base weights in four or eight bits, through bitsandbytes.

nf4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314) has 16 levels and a float32 scale for each 64 values, 4.5 bits a
value; nf4-dq holds the scales in 8 bits, too, 4.13 bits a value. int8 (Dettmers et al. 2022, LLM.int8(),
arXiv:2208.07339) has 255 levels and a scale for each row; activations stay as they are, on every device.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.errors import ResourceError
from lit_llama.model.config import LINEARS, Quantization

BLOCK = 64
"""Values of nf4 that share a scale."""


def is_quantized(name: str) -> bool:
    """Whether the weight of this name is one that is quantised: the linear layers, not embedding and head."""
    return name.endswith(tuple(f".{linear}.weight" for linear in LINEARS))


def through(weight: Tensor, method: Quantization) -> Tensor:
    """What quantisation leaves of a weight: quantised and dequantised again, in the same dtype.

    Raises:
        ResourceError: bitsandbytes is not installed, or cannot do it on this device.
    """
    packed, state = _pack(weight, method)
    return _unpack(packed, state, weight.shape, weight.dtype)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is unpacked each time it is used.

    Args:
        weight: (out, in), as it is stored: quantised in that dtype, so that nothing depends on the precision of a run.
        bias: (out,) or None.
        method: How.

    Raises:
        ResourceError: bitsandbytes is not installed, or cannot do it on this device.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, method: Quantization) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed, self._state = _pack(weight, method)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = bias

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that is computed with: (out, in)."""
        return _unpack(self.packed, self._state, torch.Size((self.out_features, self.in_features)), dtype)

    def product(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """x W', without the bias: (T, in) -> (T, out); `start` (T, out) is added before anything is rounded."""
        y: Tensor = _Product.apply(x, start, self)  # type: ignore[no-untyped-call]
        return y

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x W', unpacking W again on the way back, so that nobody keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.started = layer, start is not None
        weight = layer.dense(x.dtype)
        return F.linear(x, weight) if start is None else torch.addmm(start, x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = grad_outputs
        return gradient @ ctx.layer.dense(gradient.dtype), gradient if ctx.started else None, None


def library(wanted: str = "4-bit and 8-bit weights") -> Any:
    """bitsandbytes' functions, without its advice about kernels that are not used here.

    Raises:
        ResourceError: It is not installed, and needed for what is `wanted`.
    """
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ResourceError(f"bitsandbytes is needed for {wanted}: pip install 'lit_llama[quantize]'") from error
    finally:
        advice.setLevel(level)
    return functional


def _pack(weight: Tensor, method: Quantization) -> tuple[Tensor, Any]:
    """The packed values, and what is needed to unpack them: bitsandbytes' state of nf4, the scales (out,) of int8."""
    functional = library()
    try:
        if method == "int8":
            packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
            return packed, scales / 127
        # Blocks run over the flattened weight; on a CPU the library cuts them otherwise where a row is no multiple of
        # one.
        blocks = weight.reshape(-1, BLOCK if weight.numel() % BLOCK == 0 else weight.numel())
        return functional.quantize_4bit(
            blocks, blocksize=BLOCK, quant_type="nf4", compress_statistics=method == "nf4-dq"
        )
    except NotImplementedError as error:
        raise ResourceError(
            f"--quantize {method}: the installed bitsandbytes cannot do it on {weight.device.type}; update it "
            "(pip install -U bitsandbytes), or leave --quantize out"
        ) from error


def _unpack(packed: Tensor, state: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if isinstance(state, Tensor):
        return (packed * state[:, None]).to(dtype)
    state.dtype = dtype
    weight: Tensor = library().dequantize_4bit(packed, state)
    return weight.reshape(shape)
