"""Values of a tensor as Hugging Face's files have them <-> as llama.cpp's do.

llama.cpp adds the offset of a norm beforehand, has rotary partners of some architectures side by side, and of linear
attention -exp(A_log). Value heads of that stand there in turns of the key heads which they share, and not behind one
another: head h of G key heads and H value heads is the key head h % G's, where Hugging Face's is h // (H / G)'s.
"""

import torch
from torch import Tensor

from lit_llama.conversion.gguf.architectures import entry_of
from lit_llama.conversion.tensors import in_halves, in_pairs
from lit_llama.model.config import LLaMAConfig

_CONVOLUTION, _FADING = "conv1d.weight", "A_log"


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in a file of a tensor that Hugging Face calls `name`."""
    return (shape[0], shape[-1]) if name.endswith(_CONVOLUTION) else shape


def native_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Invert `stored_shape`."""
    return (shape[0], 1, shape[-1]) if name.endswith(_CONVOLUTION) else shape


def is_plain(name: str) -> bool:
    """Whether a tensor stays in float32 whatever matrices are packed into, though it is one in a file."""
    return name.endswith(_CONVOLUTION)


def to_stored(name: str, value: Tensor, config: LLaMAConfig) -> Tensor:
    """Return the tensor that Hugging Face calls `name` as a file has it."""
    if added := _offset(name, config):
        value = value.float() + added
    if name.endswith(_FADING):
        value = -value.float().exp()
    value = value.reshape(stored_shape(name, tuple(value.shape)))
    if entry_of(config).paired:
        value = in_pairs(name, value, config)
    for dim, order in enumerate(orders(name, config)):
        value = value if order is None else value.index_select(dim, order)
    return value


def from_stored(name: str, value: Tensor, config: LLaMAConfig) -> Tensor:
    """Invert `to_stored`; in float32 where numbers change."""
    if added := _offset(name, config):
        value = value.float() - added
    if name.endswith(_FADING):
        value = (-value.float()).log()
    if entry_of(config).paired:
        value = in_halves(name, value, config)
    for dim, order in enumerate(orders(name, config)):
        value = value if order is None else value.index_select(dim, order.argsort())
    return value.reshape(native_shape(name, tuple(value.shape)))


def changes(name: str, config: LLaMAConfig) -> bool:
    """Whether numbers of a tensor are others in a file, and not only elsewhere."""
    return name.endswith(_FADING) or bool(_offset(name, config))


def _offset(name: str, config: LLaMAConfig) -> float:
    return config.norm_offset if name.endswith("norm.weight") and "linear_attn." not in name else 0.0


def orders(name: str, config: LLaMAConfig) -> tuple[Tensor | None, Tensor | None]:
    """Return which of Hugging Face's rows and columns each of a file's is, where they stand in another order."""
    keys, heads, size = (
        config.linear_num_key_heads or 1,
        config.linear_num_value_heads or 1,
        config.linear_value_head_dim or 1,
    )
    _, _, part = name.partition("linear_attn.")
    if not part or keys == heads or part == "norm.weight":
        return None, None
    turns = torch.arange(heads).view(keys, -1).t().flatten()  # (H,)
    values = (turns[:, None] * size + torch.arange(size)).flatten()  # (H E,)
    if part.startswith("out_proj"):
        return None, values
    if part.startswith(("in_proj_qkv", "conv1d")):
        before = sum(config.linear_channels[:2])
        return torch.cat((torch.arange(before), before + values)), None
    return (values if part.startswith("in_proj_z") else turns), None
