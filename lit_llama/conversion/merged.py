"""The tensors of base + adapter, made one at a time."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.errors import CheckpointError
from lit_llama.model.adapters.lora import adapters
from lit_llama.model.adapters.peft_folder import load_adapter
from lit_llama.model.config import LLaMAConfig, Onto
from lit_llama.model.files.weights import DTYPES, Spec, Weights
from lit_llama.model.llama import LLaMA
from lit_llama.model.quantize import is_quantized, through

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_STORED = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


class Merged:
    """Tensors of a checkpoint once an adapter is part of it.

    Attributes:
        specs: Dtype and shape of every tensor, in the order of the base.
        unties: A head that was tied to the embedding is a matrix of its own now.
        added_bytes: What the adapter adds to the memory of its base.
        config: Shape of the model.
        remarks: What of base and adapter was passed over or decided, for people.

    Args:
        base: Checkpoint folder.
        adapter_dir: The adapter.
        onto: What its updates are added to.
        dtype: Dtype of all tensors; None keeps that of the base.

    Raises:
        CheckpointError: The adapter does not fit the base, or that is stored in a dtype that cannot be merged into.
    """

    def __init__(self, base: Path, adapter_dir: Path, onto: Onto, dtype: str | None) -> None:
        shape = LLaMAConfig.from_folder(base)
        self._weights, self._onto = Weights(base), onto
        with torch.device("meta"):
            frame = LLaMA(shape)
        placed = load_adapter(frame, adapter_dir, self._weights)  # names and shapes fit; it alone takes memory
        self.remarks, self._brought = (*self._weights.remarks, *placed.remarks), placed.base
        self._adapters = {f"{name}.weight": module for name, module in adapters(frame)}
        trained = [part for _, module in adapters(frame) for part in module.parts().values()]
        self.added_bytes = sum(part.numel() * part.element_size() for part in trained)
        self._tied = shape.tie_word_embeddings
        self.specs = {name: self._spec(name, dtype) for name in self._weights}
        if foreign := [f"{name} ({kind})" for name, (kind, _) in self.specs.items() if kind not in DTYPES]:
            raise CheckpointError(f"{base}: {foreign[0]} is stored in another dtype than {', '.join(DTYPES)}")
        self.unties = shape.tie_word_embeddings and self._differ()
        if self.unties:
            self.specs.setdefault(_HEAD, self.specs[_EMBEDDING])
        self.config = replace(shape, tie_word_embeddings=shape.tie_word_embeddings and not self.unties)

    def spec(self, name: str) -> Spec:
        """Return the dtype and shape of a tensor."""
        return self.specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, computed in float32 and rounded once."""
        return self._make(name).to(DTYPES[self.specs[name][0]])

    @torch.no_grad()
    def _make(self, name: str) -> Tensor:
        stored = name if name in self._weights else _EMBEDDING  # a tied head may be stored or not
        tied = self._tied and name in (_EMBEDDING, _HEAD)
        brought = next(iter(self._brought.values()), None) if tied else self._brought.get(name)
        weight = self._weights[stored] if brought is None else brought
        if self._onto != "stored" and is_quantized(name):
            weight = through(weight, self._onto)
        module = self._adapters.get(name)
        return weight if module is None else module.merged(weight)

    def _spec(self, name: str, dtype: str | None) -> Spec:
        kind, shape = self._weights.spec(name)
        return _STORED[dtype] if dtype else kind, shape

    def _differ(self) -> bool:
        """Whether the adapter makes two matrices of the tied one."""
        if not {_EMBEDDING, _HEAD} & self._adapters.keys():
            return False
        return not torch.equal(self._make(_HEAD), self._make(_EMBEDDING))
