"""The LLaMA family, readable top to bottom: token ids in, logits out.

Root-mean-square norm before each block (Zhang and Sennrich 2019, arXiv:1910.07467), rotary positions (rope.py),
grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) and a gated SiLU MLP (Shazeer 2020, arXiv:2002.05202).
Families differ by fields of the configuration: biases, norms of queries and keys (Henry et al. 2020, arXiv:2010.04245),
a sliding window (Jiang et al. 2023, arXiv:2310.06825), norms elsewhere, scales, a mixture of experts in place of the
MLP (experts.py), linear attention (delta.py). Modules carry Hugging Face's names, so state dicts are the same.

Shapes: T tokens of all samples, C hidden, I intermediate, H query heads, G key/value heads, D head size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.model.attention.layout import Layout, Packed
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.delta import GatedDeltaNet
from lit_llama.model.experts import SparseMLP
from lit_llama.model.norms import norm, qk_norm
from lit_llama.model.rope import Rotation, query_factor, rotary, rotate


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
        return self.logits(hidden if select is None else hidden.index_select(0, select))

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits of the last hidden states: (T, C) -> (T, V)."""
        cap, logits = self.config.final_logit_softcapping, self.lm_head(hidden)
        return logits if cap is None else (logits / cap).tanh() * cap


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.rotary = [config.rotary(index) for index in range(config.num_hidden_layers)]
        self.norm = norm(config, config.hidden_size)
        self.noise: nn.Module | None = None  # what training may add to the embeddings; see neftune.py

    def forward(self, input_ids: Tensor, layout: Layout | None = None) -> Tensor:
        """Run all layers: (T,) -> (T, C)."""
        layout = layout or Packed([len(input_ids)], input_ids.device)
        x = self.embed_tokens(input_ids)  # (T, C)
        x = _times(x, torch.tensor(self.config.embedding_multiplier, dtype=x.dtype, device="cpu").item())
        x = x if self.noise is None else self.noise(x, layout)
        rotations = {config: rotary(config, layout, x.dtype) for config in {*self.rotary} if config}
        for layer, config in zip(self.layers, self.rotary, strict=True):
            x = layer(x, rotations[config] if config else None, layout)
        return _times(self.norm(x), 1 / self.config.logits_scaling)  # as the head is linear


class DecoderLayer(nn.Module):
    """Attention, then MLP, each added to the stream, with norms before or after them."""

    input_layernorm: nn.RMSNorm
    self_attn: "Attention"
    post_attention_layernorm: nn.RMSNorm
    mlp: "MLP"

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.beyond = config.beyond(index)
        self.norms, self.multiplier = config.layer_norms, config.residual_multiplier
        before, after, before_mlp, after_mlp = self.norms
        self._add(config, before)
        self.mixer = "linear_attn" if config.recurrent(index) else "self_attn"
        self.add_module(self.mixer, (GatedDeltaNet if config.recurrent(index) else Attention)(config, index))
        self._add(config, after)
        self._add(config, before_mlp)
        self.block = config.mlp_name(index)
        self.add_module(self.block, _mlp(config, index))
        self._add(config, after_mlp)

    def forward(self, x: Tensor, rotation: Rotation | None, layout: Layout) -> Tensor:
        """Add attention and MLP to the residual: (T, C) -> (T, C)."""
        mixed = getattr(self, self.mixer)(self._normed(0, x), rotation, layout)
        x = x + _times(self._normed(1, mixed), self.multiplier)
        return x + _times(self._normed(3, getattr(self, self.block)(self._normed(2, x))), self.multiplier)

    def _add(self, config: LLaMAConfig, name: str) -> None:
        if name:
            self.add_module(name, norm(config, config.hidden_size))

    def _normed(self, place: int, x: Tensor) -> Tensor:
        name = self.norms[place]
        y: Tensor = getattr(self, name)(x) if name else x
        return y


class Attention(nn.Module):
    """Projections, norms of the heads and rotary positions; the layout does the attending."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.config, self.index, self.head_dim, self.window = config, index, config.head_dim, config.window(index)
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        if config.joined_qkv:
            self.qkv_proj = nn.Linear(config.hidden_size, queries + 2 * keys, bias=config.attention_bias)
        else:
            width = 2 * queries if config.attention_gate else queries
            self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
            self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm, self.k_norm = (qk_norm(config, size) for size in (queries, keys))

    def forward(self, x: Tensor, rotation: Rotation | None, layout: Layout) -> Tensor:
        """Attend to the tokens of the layout: (T, C) -> (T, C)."""
        q, k, v, gate = self._heads(x)
        if rotation is not None:
            q, k = (rotate(part, rotation, self.config.rope_interleaved) for part in (q, k))
        if (factor := query_factor(self.config.rope_scaling, layout)) is not None:
            q = q * factor.to(q.dtype)
        scale, cap = self.config.attention_scale, self.config.attn_logit_softcapping
        y = layout.attend(self.index, q, k, v, self.window, scale, cap)  # (T, H, D)
        return self.o_proj((y if gate is None else y * gate.sigmoid()).flatten(1))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries (T, H, D), keys and values (T, G, D), and the gate (T, H, D) where there is one."""
        config, size = self.config, self.head_dim
        if config.joined_qkv:
            heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
            q, k, v = self.qkv_proj(x).split([count * size for count in heads], dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        gate = None
        if config.attention_gate:  # those of a head stand behind its queries
            q, gate = q.unflatten(-1, (-1, 2 * size)).chunk(2, dim=-1)
            q = q.flatten(1)
        if config.joined_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, size)) for part in (q, k, v))
        return (q, k, v, gate) if config.joined_qk_norm else (self.q_norm(q), self.k_norm(k), v, gate)


class MLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)).

    Args:
        config: Shape of the model.
        width: I.
        names: Of the projections to gate and up, and of that down.
    """

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(
        self,
        config: LLaMAConfig,
        width: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        gate, up, self._down = names
        if config.joined_gate_up:
            self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=config.mlp_bias)
        else:
            self.add_module(gate, nn.Linear(config.hidden_size, width, bias=config.mlp_bias))
            self.add_module(up, nn.Linear(config.hidden_size, width, bias=config.mlp_bias))
        self.add_module(self._down, nn.Linear(width, config.hidden_size, bias=config.mlp_bias))
        self._gate, self._up = gate, up
        self.joined, self.activation = config.joined_gate_up, ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gated MLP: (T, C) -> (T, C)."""
        return self.down(self.product(x))

    def down(self, product: Tensor) -> Tensor:
        """Apply the projection of the product: (T, I) -> (T, C)."""
        y: Tensor = getattr(self, self._down)(product)
        return y

    def product(self, x: Tensor) -> Tensor:
        """Compute silu(gate(x)) * up(x), or with another activation: (T, C) -> (T, I)."""
        if self.joined:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.activation(gate) * up
        y: Tensor = self.activation(getattr(self, self._gate)(x)) * getattr(self, self._up)(x)
        return y


def _mlp(config: LLaMAConfig, index: int) -> nn.Module:
    """Build the MLP of a layer, or its mixture of them."""
    if not config.sparse(index):
        return MLP(config, config.intermediate_size)
    width, names = config.moe_intermediate_size or config.intermediate_size, config.expert_projections
    return SparseMLP(config, (MLP(config, width, names) for _ in range(config.num_local_experts or 0)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""By the names of config.json."""


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _embedding(rows: int, columns: int) -> nn.Embedding:
    """Make an embedding as torch does, but without drawing for a model without numbers: normal ones on the meta device
    would import torch's compiler, which takes time and 70 MB of memory."""
    weight = torch.empty(rows, columns)
    return nn.Embedding.from_pretrained(weight, freeze=False) if weight.is_meta else nn.Embedding(rows, columns)
