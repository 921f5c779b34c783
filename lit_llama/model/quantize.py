"""Base weights in four or eight bits, through bitsandbytes and the products of 8-bit floats that torch has.

nf4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314) has 16 levels and a float32 scale for each 64 values, 4.5 bits a
value; nf4-dq holds the scales in 8 bits, too, 4.13 bits a value. int8 (Dettmers et al. 2022, LLM.int8(),
arXiv:2208.07339) has 255 levels and a scale for each row; activations stay as they are, on every device. fp8 is for
speed: weights are floats of eight bits, and so are activations and their gradients while training, see float8.py.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.errors import ResourceError
from lit_llama.model import float8
from lit_llama.model.config import LINEARS, Quantization
from lit_llama.wording import param

BLOCK = 64
"""Values of nf4 that share a scale."""


def is_quantized(name: str) -> bool:
    """Whether the weight of this name is one that is quantised: the linear layers, not embedding and head."""
    return name.endswith(tuple(f".{linear}.weight" for linear in LINEARS))


def through(weight: Tensor, method: Quantization) -> Tensor:
    """Quantise a weight and dequantise it again, in the same dtype.

    Raises:
        ResourceError: bitsandbytes is not installed, or cannot do it on this device.
    """
    packed, state = _pack(weight, method)
    return _unpack(packed, state, weight.shape, weight.dtype)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is unpacked each time it is used; made by `quantized`.

    Args:
        shape: Of the weight, (out, in).
        packed: Its values.
        state: What is needed to unpack them: bitsandbytes' state of nf4, else the scales (out,). None for values that
            are not there, as in the plan of a run.
        bias: (out,) or None.
    """

    def __init__(self, shape: torch.Size, packed: Tensor, state: Any, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.state, self.bias = state, bias

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the weight that is computed with: (out, in), written into `out` if that is given."""
        return _unpack(self.packed, self.state, torch.Size((self.out_features, self.in_features)), dtype, out)

    def product(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Compute x W', without the bias: (T, in) -> (T, out); `start` (T, out) is added before anything is rounded."""
        y: Tensor = _Product.apply(x, start, self)  # type: ignore[no-untyped-call]
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: (T, in) -> (T, out)."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def times(self, x: Tensor, start: Tensor | None) -> Tensor:
        """Compute what `product` does, (T, in) -> (T, out)."""
        weight = self.dense(x.dtype)
        return F.linear(x, weight) if start is None else torch.addmm(start, x, weight.t())

    def times_back(self, gradient: Tensor) -> Tensor:
        """Compute dy W: (T, out) -> (T, in)."""
        return gradient @ self.dense(gradient.dtype)


class Float8Linear(QuantizedLinear):
    """Linear layer in 8-bit floats; while training, what is multiplied with the weight is rounded to them, too."""

    def times(self, x: Tensor, start: Tensor | None) -> Tensor:
        """Compute x W' of 8-bit floats: (T, in) -> (T, out)."""
        if not self.training:
            return super().times(x, start)
        y = float8.product(x, self.packed, self.state)
        return y if start is None else y + start

    def times_back(self, gradient: Tensor) -> Tensor:
        """Compute dy W: (T, out) -> (T, in)."""
        if not self.training:
            return super().times_back(gradient)
        return float8.product_back(gradient, self.packed.t().contiguous(), self.state)


def quantized(weight: Tensor, bias: nn.Parameter | None, method: Quantization) -> QuantizedLinear:
    """Build the layer of a method.

    Args:
        weight: (out, in), as it is stored: quantised in that dtype, so that nothing depends on the precision of a run.
        bias: (out,) or None.
        method: How.

    Raises:
        ResourceError: bitsandbytes is not installed, or it cannot be done on this device.
    """
    return _kind(method)(weight.shape, *_pack(weight, method), bias)


def quantize_shapes(model: nn.Module, method: Quantization) -> None:
    """Put the layers of a method into a model whose weights have shapes and no numbers, as the plan of a run has it."""
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(method, torch.uint8)
    for name, linear in list(model.named_modules()):
        if is_quantized(f"{name}.weight"):
            assert isinstance(linear, nn.Linear)
            weight = linear.weight
            packed = weight.new_empty(weight.shape, dtype=dtype)
            state = None if dtype == torch.uint8 else weight.new_empty(len(weight)).float()
            model.set_submodule(name, _kind(method)(weight.shape, packed, state, linear.bias))


def _kind(method: Quantization) -> type[QuantizedLinear]:
    return Float8Linear if method == "fp8" else QuantizedLinear


class _Product(torch.autograd.Function):
    """x W', unpacking W again on the way back, so that nobody keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.started = layer, start is not None
        return layer.times(x, start)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = grad_outputs
        return ctx.layer.times_back(gradient), gradient if ctx.started else None, None


def library(wanted: str = "4-bit and 8-bit weights") -> Any:
    """Import bitsandbytes' functions, without its advice about kernels that are not used here.

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
    """The packed values, and the state that unpacks them."""
    if method == "fp8":
        float8.check(weight.device)
        return float8.rounded(weight)
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
            f"{param('quantize', method)}: the installed bitsandbytes cannot do it on {weight.device.type}; update it "
            f"(pip install -U bitsandbytes), or leave {param('quantize')} out"
        ) from error


def _unpack(packed: Tensor, state: Any, shape: torch.Size, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if state is None:
        return packed.new_empty(shape, dtype=dtype) if out is None else out
    if isinstance(state, Tensor):
        values = packed.float() if packed.is_floating_point() else packed
        out = packed.new_empty(shape, dtype=dtype) if out is None else out
        return torch.mul(values, state[:, None], out=out)
    state.dtype = dtype
    if out is None or packed.device.type == "cpu":  # where the library makes a tensor of its own
        weight: Tensor = library().dequantize_4bit(packed, state).reshape(shape)
        return weight if out is None else out.copy_(weight)
    library().dequantize_4bit(packed, state, out=out.view(state.shape))
    return out
