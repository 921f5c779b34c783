"""Runners, which compute the logits of a step: the kernels of a CPU with packed weights, or the library's own
operations.

Shapes: N tokens whose logits are wanted, V vocabulary.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lit_llama.errors import ResourceError, UserError
from lit_llama.model.config import KVCacheType, LLaMAConfig
from lit_llama.model.kernels.decode import PackedCache, PackedLLaMA
from lit_llama.model.kernels.paged import BLOCK, PagedBatch, PagedCache, paged_logits
from lit_llama.model.kernels.trained import Factors
from lit_llama.model.llama import LLaMA


class Runner(Protocol):
    """A model with a cache of blocks.

    Attributes:
        config: Shape of the model.
        blocks: How many there are.
        device: Where the logits are.
        exact: Whether the logits of a sequence are the same bits whatever is computed beside it.
    """

    config: LLaMAConfig
    blocks: int
    device: torch.device
    exact: bool

    def logits(self, batch: PagedBatch) -> Tensor:
        """Compute the logits of a plan: (N, V)."""
        ...

    def copy(self, source: int, destination: int) -> None:
        """Copy a block."""
        ...

    def clear(self, block: int) -> None:
        """Set a block to zero."""
        ...

    def reclaim(self, blocks: Sequence[int]) -> int:
        """Give memory of blocks back to the system, whose content is lost; bytes that it may have now."""
        ...

    def add_adapter(self, name: str, factors: dict[str, Factors]) -> None:
        """Keep the updates of an adapter."""
        ...

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter."""
        ...


class PackedRunner:
    """Packed weights on a CPU.

    Args:
        model: The weights.
        cache_bytes: Memory of the cache.
        kv_cache: How keys and values are held.
    """

    exact = True
    device = torch.device("cpu")

    def __init__(self, model: PackedLLaMA, cache_bytes: int, kv_cache: KVCacheType = "auto") -> None:
        self._model, self.config = model, model.config
        size = PackedCache.bytes_of_block(model.config, model.dtype, kv_cache)
        self.blocks = _blocks(cache_bytes, size)
        self._cache = PackedCache(model.config, self.blocks, model.dtype, kv_cache)
        self.copy, self.clear = self._cache.copy, self._cache.clear
        self.add_adapter, self.remove_adapter = model.add_adapter, model.remove_adapter

    def reclaim(self, blocks: Sequence[int]) -> int:
        """Give memory of blocks back to the system."""
        return _reclaimed([self._cache.blocks], blocks)

    def logits(self, batch: PagedBatch) -> Tensor:
        """Compute the logits of a plan: (N, V) in float32."""
        return self._model(batch, self._cache)


class TorchRunner:
    """A model as it is, on any device.

    Args:
        model: In evaluation mode.
        cache_bytes: Memory of the cache.
        kv_cache: How keys and values are held.
        max_sequences: States that are kept beside the cache, if the model has recurrent layers.
    """

    exact = False

    def __init__(self, model: LLaMA, cache_bytes: int, kv_cache: KVCacheType = "auto", max_sequences: int = 64) -> None:
        self._model, self.config = model, model.config
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        self.blocks = _blocks(cache_bytes, PagedCache.bytes_of_block(model.config, weight.dtype, kv_cache))
        self._cache = PagedCache(model.config, self.blocks, weight.device, weight.dtype, kv_cache, max_sequences)
        self.copy, self.clear = self._cache.copy, self._cache.clear

    def reclaim(self, blocks: Sequence[int]) -> int:
        """Give memory of blocks back to the system."""
        return _reclaimed(self._cache.parts, blocks)

    def logits(self, batch: PagedBatch) -> Tensor:
        """Compute the logits of a plan: (N, V) in the dtype of the weights."""
        return paged_logits(self._model, batch, self._cache)

    def add_adapter(self, name: str, factors: dict[str, Factors]) -> None:
        """Refuse an adapter.

        Raises:
            UserError: Always: the layers of a model hold one adapter.
        """
        raise UserError(f"adapter {name!r}: several adapters at once need the kernels for CPUs; merge it into its base")

    def remove_adapter(self, name: str) -> None:
        """Refuse to remove an adapter, as there is none."""
        raise KeyError(name)


def _reclaimed(caches: Sequence[Tensor], blocks: Sequence[int]) -> int:
    """Give back the whole pages of blocks in caches (layers, blocks, ...), which are read as zeros from then on.

    Only Linux promises those zeros, which the attention needs behind a mask; elsewhere, and on a GPU, nothing is done.
    """
    if not sys.platform.startswith("linux") or any(cache.device.type != "cpu" for cache in caches):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    runs: list[tuple[int, int]] = []  # first and last + 1
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = runs[-1][0], block + 1
        else:
            runs.append((block, block + 1))
    given = 0
    for cache in caches:
        size = cache[0, 0].nbytes
        for layer in cache:
            for first, end in runs:
                start = -(-(layer.data_ptr() + first * size) // mmap.PAGESIZE) * mmap.PAGESIZE
                length = (layer.data_ptr() + end * size) // mmap.PAGESIZE * mmap.PAGESIZE - start
                if length > 0 and madvise(start, length, mmap.MADV_DONTNEED) == 0:
                    given += length
    return given


def _blocks(cache_bytes: int, size: int) -> int:
    count = cache_bytes // size
    if count < 2:
        raise ResourceError(
            f"a cache of {cache_bytes:,} bytes holds {count} blocks of {BLOCK} tokens, which take {size:,} each; it "
            "needs 2 at least"
        )
    return count
