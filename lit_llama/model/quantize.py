"""Base weights in four bits (Dettmers et al. 2023, QLoRA, arXiv:2305.14314), through bitsandbytes."""

import torch
from torch import Tensor, nn

from lit_llama.errors import ResourceError
from lit_llama.model.config import LINEARS

BLOCK = 64
"""Values that share a scale."""


def is_quantized(name: str) -> bool:
    """Whether the weight of this name is one that QLoRA quantises: the linear layers, not embedding and head."""
    return name.endswith(tuple(f".{linear}.weight" for linear in LINEARS))


def through_nf4(weight: Tensor) -> Tensor:
    """What nf4 with double quantisation leaves of a weight: quantised and dequantised again, in the same dtype.

    Raises:
        ResourceError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ResourceError("4-bit weights need bitsandbytes: pip install 'lit_llama[quantize]'") from error
    # Blocks run over the flattened weight; on a CPU the library cuts them otherwise where a row is no multiple of one.
    blocks = weight.reshape(-1, BLOCK if weight.numel() % BLOCK == 0 else weight.numel())
    packed, state = functional.quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(packed, state).reshape(weight.shape)


@torch.no_grad()
def quantize_in_place(model: nn.Module) -> None:
    """Leave of every weight that QLoRA quantises what nf4 leaves of it."""
    for name, parameter in model.named_parameters():
        if is_quantized(name):
            parameter.data = through_nf4(parameter.data)
