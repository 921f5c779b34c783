"""Root-mean-square norms (Zhang and Sennrich 2019, arXiv:1910.07467) of the model and of its heads."""

import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.model.config import LLaMAConfig


class OffsetNorm(nn.RMSNorm):
    """A norm whose weight is stored as its difference from an offset."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__(size, eps=eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalize in float32: (..., C) -> (..., C)."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float() + self.offset, self.eps).to(x.dtype)


def norm(config: LLaMAConfig, size: int) -> nn.RMSNorm:
    """Build a norm of the model."""
    if config.norm_offset:
        return OffsetNorm(size, config.rms_norm_eps, config.norm_offset)
    return nn.RMSNorm(size, eps=config.rms_norm_eps)


def qk_norm(config: LLaMAConfig, size: int) -> nn.Module:
    """Build the norm of the queries or of the keys, where there is one; `size` are all of them of a token."""
    if not config.use_qk_norm:
        return nn.Identity()
    return norm(config, size if config.joined_qk_norm else config.head_dim)
