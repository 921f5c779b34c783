"""The LLaMA family, readable top to bottom: token ids in, logits out.

Root-mean-square norm before each block (Zhang and Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021,
arXiv:2104.09864, halves of a head rotated together), grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)
and a gated SiLU MLP (Shazeer 2020, arXiv:2002.05202). Modules carry Hugging Face's names, so state dicts are the same.

Shapes: T tokens of all samples, C hidden, I intermediate, H query heads, G key/value heads, D head size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.model.attention import Layout, Packed
from lit_llama.model.config import LLaMAConfig


class LLaMA(nn.Module):
    """Decoder and output head.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, layout: Layout | None = None, select: Tensor | None = None) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: (T,) token ids of one or more samples, laid end to end.
            layout: Which tokens belong together; one sample if left out.
            select: (N,) positions among the T whose logits are wanted; all if left out.

        Returns:
            (T, V) or (N, V), in the dtype of the weights.
        """
        hidden = self.model(input_ids, layout)  # (T, C)
        return self.lm_head(hidden if select is None else hidden.index_select(0, select))


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, layout: Layout | None = None) -> Tensor:
        """(T,) -> (T, C)."""
        layout = layout or Packed([len(input_ids)], input_ids.device)
        x = self.embed_tokens(input_ids)  # (T, C)
        rotation = rotary(self.config, layout.position_ids, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, layout)
        return self.norm(x)


class DecoderLayer(nn.Module):
    """Attention, then MLP, each on the normalised stream and added to it."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """(T, C) -> (T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Projections and rotary positions; the layout does the attending."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """(T, C) -> (T, C)."""
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rotation)  # (T, H, D)
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), rotation)  # (T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, G, D)
        return self.o_proj(layout.attend(self.index, q, k, v).flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, C) -> (T, C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary(config: LLaMAConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i / D): (T,) -> two of (T, 1, D/2), computed in float32."""
    exponent = torch.arange(0, config.head_dim, 2, device=position_ids.device).float() / config.head_dim
    angle = position_ids.float()[:, None, None] * (1.0 / config.rope_theta**exponent)  # (T, 1, D/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate component i of each head against component i + D/2: (T, H, D) -> (T, H, D)."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
