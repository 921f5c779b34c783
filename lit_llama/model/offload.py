"""Decoder layers whose weights lie elsewhere than where they compute: in the memory of the CPU, or in a mapped file.

A model that is too large for its device then answers all the same, slowly: each step brings every such layer once.
"""

import ctypes
import mmap
from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_llama.model.llama import LLaMA

_WILL_NEED = 3  # of madvise(2)


class OffloadedLayer(nn.Module):
    """A decoder layer whose weights come to the device for its forward pass and leave it again.

    Args:
        layer: The layer, its weights wherever they are.
        device: Where it computes.
        dtype: In which it computes.
        stored: Those of its parameters that are in the dtype in which they are stored.
        following: The layer that computes next; its weights are asked of the disk meanwhile.
    """

    def __init__(
        self,
        layer: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        stored: Collection[nn.Parameter],
        following: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layer, self._device = layer, device
        own = set(map(id, stored))
        self._dtypes = {name: dtype if id(p) in own else p.dtype for name, p in layer.named_parameters()}
        self._following = () if following is None else tuple(following.parameters())  # no part of this module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Bring the weights, and compute as the layer does."""
        for tensor in self._following:
            _read_ahead(tensor)
        tensors = chain(self.layer.named_parameters(), self.layer.named_buffers())
        here = {
            name: tensor.detach().to(self._device, self._dtypes.get(name, tensor.dtype), non_blocking=True)
            for name, tensor in tensors
        }
        y: Tensor = functional_call(self.layer, here, args, kwargs)
        return y


def offload(
    model: LLaMA, device: torch.device, dtype: torch.dtype, first: int, stored: Collection[nn.Parameter]
) -> None:
    """Let the decoder layers from `first` on bring their weights at each use, in place.

    Args:
        model: Its other layers are on the device, in the dtype.
        device: Where it computes.
        dtype: In which it computes.
        first: Index of a layer.
        stored: Parameters that are in the dtype in which they are stored, and are converted at each use; others, such
            as those of an adapter, keep theirs.
    """
    layers = list(model.model.layers)
    for index in range(first, len(layers)):
        following = layers[index + 1] if index + 1 < len(layers) else None
        model.model.layers[index] = OffloadedLayer(layers[index], device, dtype, stored, following)


def _read_ahead(tensor: Tensor) -> None:
    """Ask the system to read a mapped tensor in; elsewhere than on Linux, and for others, this does nothing."""
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_WILLNEED"):
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _WILL_NEED)
