"""Mixture of experts in place of an MLP: a router sends each token to a few of many MLPs (Shazeer et al. 2017,
arXiv:1701.06538; Jiang et al. 2024, Mixtral, arXiv:2401.04088).

Shapes: T tokens, C hidden, E experts, K experts of a token.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lit_llama.model.config import LLaMAConfig


class SparseMLP(nn.Module):
    """Router and experts. The modules carry the names of Hugging Face's files, in which each expert is an MLP of its
    own.

    The tokens of an expert are brought together, so that each of its matrices is multiplied once. Experts without
    tokens compute nothing.

    Args:
        config: Shape of the model.
        experts: The E MLPs.
    """

    def __init__(self, config: LLaMAConfig, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts or 0, bias=False)
        self.experts = nn.ModuleList(experts)
        self.chosen, self.normalized = config.num_experts_per_tok or 0, config.norm_topk_prob
        self.evenly = False  # as a plan has it, which knows no numbers
        self.every = False  # those without tokens have gradients of zero: processes that sum them have all of them

    def forward(self, x: Tensor) -> Tensor:
        """Add up what the experts of each token make of it: (T, C) -> (T, C)."""
        weights, experts = self.route(x)
        order = experts.flatten().argsort(stable=True)  # (T K,) pairs of token and expert, by expert
        tokens = order // self.chosen
        parts = x.index_select(0, tokens).split(self._counts(experts))
        made = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if self.every or len(part)]
        y = torch.cat([*made, x[:0]]) * weights.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add(0, tokens, y.to(x.dtype))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token, and how much each counts: both (T, K), the latter in float32."""
        weights, experts = self.gate(x).float().softmax(-1).topk(self.chosen, -1)
        return weights / weights.sum(-1, keepdim=True) if self.normalized else weights, experts

    def _counts(self, experts: Tensor) -> list[int]:
        """Tokens of each expert."""
        number = len(self.experts)
        if self.evenly:
            share, more = divmod(experts.numel(), number)
            return [share + (index < more) for index in range(number)]
        counts: list[int] = experts.flatten().bincount(minlength=number).tolist()
        return counts
