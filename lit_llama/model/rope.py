"""Rotary positions (Su et al. 2021, arXiv:2104.09864) and the ways to stretch them beyond the first context.

Component i of a head turns against component i + D/2 by position * frequency[i], where the plain frequency is
theta^(-2i / D). Frequencies are made in float32 on the CPU, so that every device turns by the same angles.

Shapes: B sequences, T tokens of all of them, H heads, D head size.
"""

import math

import torch
from torch import Tensor

from lit_llama.model.attention.layout import Layout
from lit_llama.model.config import LLaMAConfig, RopeScaling

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine, each (T, 1, D/2), or of the fewer components that are rotated."""


def rotary(config: LLaMAConfig, layout: Layout, dtype: torch.dtype) -> Rotation:
    """Compute cosine and sine of position * frequency for the tokens of a layout: two of (T, 1, D/2), in float32."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.by_length:
        lengths = layout.bounds if scaling.rope_type == "longrope" else layout.lengths
        each = torch.stack([frequencies(config, length) for length in lengths])  # (B, D/2)
        frequency = each.repeat_interleave(torch.tensor(layout.counts), dim=0)  # (T, D/2)
    else:
        frequency = frequencies(config)  # (D/2,)
    position = layout.position_ids
    angle = position.float()[:, None] * frequency.to(position.device)  # (T, D/2)
    factor = attention_factor(scaling)
    return (angle.cos() * factor).to(dtype)[:, None], (angle.sin() * factor).to(dtype)[:, None]


def rotate(x: Tensor, rotation: Rotation, interleaved: bool = False) -> Tensor:
    """Rotate component i of each head against component i + D/2, or 2 i against 2 i + 1: (T, H, D) -> (T, H, D).

    Where cosine and sine are of fewer than D/2 components, only the first ones are rotated.
    """
    cos, sin = rotation
    size = 2 * cos.shape[-1]
    x, rest = x[..., :size], x[..., size:]
    left, right = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    parts = left * cos - right * sin, right * cos + left * sin
    if interleaved:
        return torch.cat((torch.stack(parts, dim=-1).flatten(-2), rest), dim=-1)
    return torch.cat((*parts, rest), dim=-1)


def frequencies(config: LLaMAConfig, length: int = 0) -> Tensor:
    """Compute the radians that each rotated component turns per position: (D/2,) in float32, on the CPU.

    Args:
        config: Shape of the model.
        length: Tokens of the sequence so far, or at its end, on which the types dynamic and longrope depend.
    """
    scaling, theta, dim = config.rope_scaling, config.rope_theta, config.rotary_dim
    if scaling is None:
        return _plain(theta, dim)
    match scaling.rope_type:
        case "linear":  # Chen et al. 2023, arXiv:2306.15595: positions are divided
            return _plain(theta, dim) / scaling.factor
        case "dynamic":
            return _plain(_dynamic_theta(theta, dim, scaling, length), dim)
        case "llama3":
            return _llama3(_plain(theta, dim), scaling)
        case "yarn":
            return _yarn(_plain(theta, dim), theta, scaling)
        case "longrope":  # Ding et al. 2024, arXiv:2402.13753: a divisor of its own for each component
            return _plain(theta, dim) / torch.tensor(
                scaling.long_factor if scaling.turns_long(length) else scaling.short_factor
            )
    raise AssertionError(scaling.rope_type)


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return the factor of cosine and sine: sqrt(1/t) = 0.1 ln(factor) + 1 for yarn (arXiv:2309.00071, eq. 22), and
    sqrt(1 + ln(factor) / ln(original)) for longrope (arXiv:2402.13753, eq. 4).
    """
    if scaling is None or scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.rope_type == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings))


def query_factor(scaling: RopeScaling | None, layout: Layout) -> Tensor | None:
    """Compute the factor of the queries by their positions, as Llama 4 has it: (T, 1, 1) in float32; None for 1."""
    if scaling is None or not scaling.llama_4_scaling_beta:
        return None
    turns = (layout.position_ids / scaling.original_max_position_embeddings).floor()
    return (1 + scaling.llama_4_scaling_beta * torch.log1p(turns))[:, None, None]


def _plain(theta: float, dim: int) -> Tensor:
    exponent = torch.arange(0, dim, 2, device="cpu").float() / dim
    return 1.0 / theta**exponent


def _dynamic_theta(theta: float, dim: int, scaling: RopeScaling, length: int) -> float:
    """NTK-aware interpolation that grows with the sequence (u/emozilla 2023; arXiv:2309.00071, appendix B.1)."""
    stretch = max(length / scaling.original_max_position_embeddings, 1.0)
    return theta * (scaling.factor * stretch - (scaling.factor - 1)) ** (dim / (dim - 2))


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Short waves stay, long waves are stretched, between them a mixture (Meta's llama-models, apply_scaling)."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # within the first context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def _yarn(frequency: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """The same with a ramp over the components (Peng et al. 2023, arXiv:2309.00071, eqs. 20 to 23)."""
    dim = 2 * len(frequency)

    def component(turns: float) -> float:
        """Which component turns so often within the first context."""
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = component(scaling.beta_fast), component(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretch = ((torch.arange(dim // 2, device="cpu") - low) / ((high - low) or 0.001)).clamp(0, 1)
    return (1 - stretch) * frequency + stretch * frequency / scaling.factor
