"""Linear attention by the gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464), in place of attention.

A head keeps a matrix S of the values that it has seen by their keys. A token lets it fade, corrects what it holds for
its own key, and reads it by its query:

    S <- exp(g) S + k (beta (v - exp(g) S' k))'        y = S' q

Tokens are computed a chunk at a time: what those of a chunk correct in each other's is a triangular system (the WY form
of Yang et al. 2024, arXiv:2406.06484, section 3), so that products of matrices remain. A chunk of one token is the rule
itself, as a step of generation has it.

Shapes: T tokens of all samples, B samples, L tokens of each, N chunks of K tokens, C hidden, H value heads, D size of a
key, E size of a value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.device import capabilities
from lit_llama.model.attention.layout import Layout, State
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.rope import Rotation

CHUNK = 64
"""Tokens of a chunk, at most."""


class GatedDeltaNet(nn.Module):
    """Projections, a causal convolution over each channel, and the gated delta rule. The modules carry the names of
    Hugging Face's files.

    Args:
        config: Shape of the model.
        index: Of the layer.
    """

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.config, self.index, self.sizes = config, index, config.linear_channels
        heads, size = config.linear_num_value_heads or 0, config.linear_value_head_dim or 0
        channels, kernel = sum(self.sizes), config.linear_conv_kernel_dim or 0
        self.in_proj_qkv = nn.Linear(config.hidden_size, channels, bias=False)
        self.in_proj_z = nn.Linear(config.hidden_size, heads * size, bias=False)
        self.in_proj_b = nn.Linear(config.hidden_size, heads, bias=False)
        self.in_proj_a = nn.Linear(config.hidden_size, heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels, bias=False)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(heads * size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation | None, layout: Layout) -> Tensor:
        """Let each token read what the tokens before it in its sample have left: (T, C) -> (T, C)."""
        y = layout.recur(self.index, self.advance, (self.in_proj_qkv(x), self.in_proj_a(x), self.in_proj_b(x)))
        z = self.in_proj_z(x).unflatten(-1, (-1, self.config.linear_value_head_dim or 0))
        return self.out_proj((self.norm(y) * F.silu(z.float())).to(x.dtype).flatten(1))

    def advance(self, parts: tuple[Tensor, ...], state: State | None) -> tuple[Tensor, State]:
        """Compute tokens of samples of one length, from the states that those before them left.

        Args:
            parts: Queries, keys and values (B, L, channels), and what fading and correction follow from (B, L, H).
            state: The last inputs of the convolution (B, channels, its tokens - 1) and S (B, H, D, E); None before the
                first token.

        Returns:
            (B, L, H, E), and the state behind the last token.
        """
        config, (x, a, b) = self.config, parts
        x = x.transpose(1, 2)  # (B, channels, L)
        tail, memory = (x.new_zeros(*x.shape[:2], self.conv1d.kernel_size[0] - 1), None) if state is None else state
        x = torch.cat((tail.to(x.dtype), x), dim=2)
        mixed = F.silu(self.conv1d(x.to(self.conv1d.weight.dtype))).transpose(1, 2)  # (B, L, channels)
        q, k, v = mixed.split(self.sizes, dim=-1)
        q, k = (part.unflatten(-1, (-1, config.linear_key_head_dim or 0)) for part in (q, k))
        v = v.unflatten(-1, (config.linear_num_value_heads or 0, -1))
        fading = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())  # (B, L, H)
        with torch.autocast(capabilities(x.device).kind, enabled=False):
            y, memory = delta_rule(q.float(), k.float(), v.float(), fading, b.sigmoid().float(), memory)
        return y.to(parts[0].dtype), (x[..., x.shape[2] - tail.shape[2] :], memory)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, fading: Tensor, beta: Tensor, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule in float32, with normalised queries and keys.

    Args:
        q: Queries (B, L, heads, D), of as many heads as the keys.
        k: Keys; each head of them serves as many neighbouring value heads.
        v: Values (B, L, H, E).
        fading: g (B, L, H), at most 0.
        beta: How much of what is held for a key is corrected (B, L, H).
        memory: S before the first token (B, H, D, E); None for zeros.

    Returns:
        y (B, L, H, E), and S behind the last token.
    """
    length, repeats = q.shape[1], v.shape[2] // k.shape[2]
    q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    q, k = (part.repeat_interleave(repeats, dim=2) for part in (q * q.shape[-1] ** -0.5, k))
    together = torch.cat((q, k, v, fading[..., None], beta[..., None]), dim=-1).transpose(1, 2)
    size = min(CHUNK, length)  # tokens of zeros that fill up the last chunk fade nothing and correct nothing
    chunks = F.pad(together, (0, 0, 0, -length % size)).unflatten(2, (-1, size))  # (B, H, N, K, 2 D + E + 2)
    q, k, v, fading, beta = chunks.split((q.shape[-1], k.shape[-1], v.shape[-1], 1, 1), dim=-1)
    total = fading.cumsum(3)  # (B, H, N, K, 1) since the chunk began
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    # How much of what a token leaves is there for a later one: (B, H, N, K, K)
    between = (total - total.mT).masked_fill(later, -torch.inf).exp()
    system = (beta * k @ k.mT) * between  # its diagonal counts as ones
    wanted = torch.cat((beta * v, beta * total.exp() * k), dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    values, read = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    within = (q @ k.mT) * between
    last = total[..., -1:, :]
    parts = q * total.exp(), within, values, read, (k * (last - total).exp()).mT, last.exp()
    memory = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]) if memory is None else memory
    outputs = []
    for q, within, value, read, k, faded in zip(*(part.unbind(2) for part in parts), strict=True):
        value = value - read @ memory
        outputs.append(q @ memory + within @ value)
        memory = memory * faded + k @ value
    return torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2), memory
