"""Keys and values in blocks that sequences share, and a step over any sequences in the library's own operations.

Shapes: T tokens of all sequences, S sequences, N tokens whose logits are wanted, H query heads, G key/value heads, D
head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.model.config import LLaMAConfig
from lit_llama.model.llama import LLaMA

BLOCK = 32
"""Tokens of a block."""


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """The tokens of a step, those of each sequence next to each other.

    Attributes:
        ids: Of each sequence, its new tokens.
        starts: Position of the first of them.
        tables: Blocks of each sequence, in order; those that nothing sees any more may be -1.
        logits: How many of the last tokens of each sequence want logits.
        adapters: Name of the adapter of each sequence, None for the base; empty where all are None.
    """

    ids: Sequence[Sequence[int]]
    starts: Sequence[int]
    tables: Sequence[Sequence[int]]
    logits: Sequence[int]
    adapters: Sequence[str | None] = field(default=())

    @property
    def selected(self) -> list[int]:
        """Places among the T tokens whose logits are wanted (N)."""
        end = 0
        places: list[int] = []
        for ids, logits in zip(self.ids, self.logits, strict=True):
            end += len(ids)
            places += range(end - logits, end)
        return places


class PagedCache:
    """Keys and values of all layers, in blocks.

    Args:
        config: Shape of the model.
        blocks: How many.
        device: Where the model is.
        dtype: That of the model.
    """

    def __init__(self, config: LLaMAConfig, blocks: int, device: torch.device | str, dtype: torch.dtype) -> None:
        shape = (2, config.num_hidden_layers, blocks, BLOCK, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = torch.zeros(shape, device=device, dtype=dtype)  # 0 x NaN of a masked one is NaN

    @staticmethod
    def bytes_of_block(config: LLaMAConfig, dtype: torch.dtype) -> int:
        """Memory that a block takes."""
        heads = config.num_hidden_layers * config.num_key_value_heads
        return 2 * BLOCK * heads * config.head_dim * dtype.itemsize

    def copy(self, source: int, destination: int) -> None:
        """Copy a block."""
        for part in (self.keys, self.values):
            part[:, destination] = part[:, source]

    def clear(self, block: int) -> None:
        """Set a block to zero, as after numbers that are not finite."""
        for part in (self.keys, self.values):
            part[:, block] = 0


class Paged:
    """The layout of a step, see attention.Layout: attention over the blocks of each sequence."""

    def __init__(self, batch: PagedBatch, cache: PagedCache) -> None:
        device = cache.keys.device
        self.counts = [len(ids) for ids in batch.ids]
        self.lengths = [start + count for start, count in zip(batch.starts, self.counts, strict=True)]
        spans = zip(batch.starts, self.lengths, strict=True)
        self.position_ids = torch.cat([torch.arange(start, end) for start, end in spans]).to(device)
        self._cache = cache
        self._tables = [torch.tensor(table, device=device).clamp(min=0) for table in batch.tables]
        blocks = [table[start // BLOCK :] for table, start in zip(self._tables, batch.starts, strict=True)]
        first = [start // BLOCK for start in batch.starts]
        self._blocks = torch.cat(
            [
                part[position // BLOCK - begin]
                for part, begin, position in zip(blocks, first, self.position_ids.split(self.counts), strict=True)
            ]
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Causal softmax attention over the cache: q (T, H, D), k and v (T, G, D) -> (T, H, D)."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]  # (blocks, BLOCK, G, D)
        keys[self._blocks, self.position_ids % BLOCK] = k
        values[self._blocks, self.position_ids % BLOCK] = v
        outputs = []
        rest = zip(self._tables, self.lengths, self.position_ids.split(self.counts), q.split(self.counts), strict=True)
        for table, length, position, query in rest:
            low = max(0, int(position[0]) - window + 1) // BLOCK if window is not None else 0
            used = table[low : -(-length // BLOCK)]
            key, value = (x[used].flatten(0, 1).transpose(0, 1)[None] for x in (keys, values))  # (1, G, K, D)
            place = torch.arange(low * BLOCK, low * BLOCK + key.shape[2], device=q.device)
            distance = position[:, None] - place
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            y = F.scaled_dot_product_attention(
                query.transpose(0, 1)[None], key, value, mask, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(y[0].transpose(0, 1))
        return torch.cat(outputs)


@torch.inference_mode()
def paged_logits(model: LLaMA, batch: PagedBatch, cache: PagedCache) -> Tensor:
    """Logits after the tokens that want them: (N, V). The keys and values of all tokens are written into the cache."""
    device = cache.keys.device
    ids = torch.tensor([token for ids in batch.ids for token in ids], device=device)
    return model(ids, Paged(batch, cache), torch.tensor(batch.selected, dtype=torch.int64, device=device))
