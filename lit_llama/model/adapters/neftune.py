"""Noise on the embeddings while training (Jain et al. 2023, NEFTune, arXiv:2310.05914).

Shapes: T tokens of all samples, C hidden, L tokens of one sample.
"""

import math

import torch
from torch import Tensor, nn

from lit_llama.model.attention.layout import Layout
from lit_llama.model.llama import LLaMA


class EmbeddingNoise(nn.Module):
    """Noise drawn evenly from -a to a with a = alpha / sqrt(L C), L being the token's own sample's length.

    The draws come from torch's generator of the device, in training mode alone.

    Args:
        alpha: Size of the noise; the paper uses 5 to 15.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Add noise while training: (T, C) -> (T, C)."""
        if not self.training:
            return x
        counts = torch.tensor(layout.counts)
        # The size is told, as a plan has no numbers to add up.
        shrunk = counts.float().rsqrt().repeat_interleave(counts, output_size=len(x))  # (T,)
        size = self.alpha / math.sqrt(x.shape[1]) * shrunk
        noise = torch.empty_like(x, dtype=torch.float32).uniform_(-1, 1)  # (T, C)
        return x + (noise * size.to(x.device)[:, None]).to(x.dtype)


def add_noise(model: LLaMA, alpha: float) -> None:
    """Let `model` see its embeddings through noise while it is trained, in place; alpha 0 adds none."""
    model.model.noise = EmbeddingNoise(alpha) if alpha else None
