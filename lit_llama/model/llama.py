"""The LLaMA family, readable top to bottom: token ids in, logits out.

Root-mean-square norm before each block (Zhang and Sennrich 2019, arXiv:1910.07467), rotary positions (rope.py),
grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) and a gated SiLU MLP (Shazeer 2020, arXiv:2002.05202).
Families differ by fields of the configuration: biases, norms of queries and keys (Henry et al. 2020, arXiv:2010.04245),
a sliding window (Jiang et al. 2023, arXiv:2310.06825). Modules carry Hugging Face's names, so state dicts are the same.

Shapes: T tokens of all samples, C hidden, I intermediate, H query heads, G key/value heads, D head size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.model.attention.layout import Layout, Packed
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.rope import Rotation, rotary, rotate


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
        """Compute the logits of the next token.

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
        self.embed_tokens = _embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.rotary = [config.rotary(index) for index in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.noise: nn.Module | None = None  # what training may add to the embeddings; see neftune.py

    def forward(self, input_ids: Tensor, layout: Layout | None = None) -> Tensor:
        """Run all layers: (T,) -> (T, C)."""
        layout = layout or Packed([len(input_ids)], input_ids.device)
        x = self.embed_tokens(input_ids)  # (T, C)
        x = x if self.noise is None else self.noise(x, layout)
        rotations = {config: rotary(config, layout, x.dtype) for config in {*self.rotary} if config}
        for layer, config in zip(self.layers, self.rotary, strict=True):
            x = layer(x, rotations[config] if config else None, layout)
        return self.norm(x)


class DecoderLayer(nn.Module):
    """Attention, then MLP, each on the normalised stream and added to it."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.beyond = config.beyond(index)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Rotation | None, layout: Layout) -> Tensor:
        """Add attention and MLP to the residual: (T, C) -> (T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Projections, norms of the heads and rotary positions; the layout does the attending."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim, self.window = index, config.head_dim, config.window(index)
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)

    def forward(self, x: Tensor, rotation: Rotation | None, layout: Layout) -> Tensor:
        """Attend to the tokens of the layout: (T, C) -> (T, C)."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, G, D)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = layout.attend(self.index, q, k, v, self.window)  # (T, H, D)
        return self.o_proj(y.flatten(1))


def head_norm(config: LLaMAConfig) -> nn.Module:
    """Build the norm of each query or key head, where there is one."""
    return nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.use_qk_norm else nn.Identity()


class MLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gated MLP: (T, C) -> (T, C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _embedding(rows: int, columns: int) -> nn.Embedding:
    """Make an embedding as torch does, but without drawing for a model without numbers: normal ones on the meta device
    would import torch's compiler, which takes time and 70 MB of memory."""
    weight = torch.empty(rows, columns)
    return nn.Embedding.from_pretrained(weight, freeze=False) if weight.is_meta else nn.Embedding(rows, columns)
