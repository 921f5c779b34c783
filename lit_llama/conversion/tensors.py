"""Tensors of other layouts: parts of one joined, rows of q and k in another order, and rows for new tokens.

Meta's shards keep a tensor in parts, of which any rows can be read, part by part into place. The rows of q and k have
rotary partners side by side (Meta, lit-llama, GGUF), or a head in two halves (Hugging Face).

Shapes: H heads of the projection, D head size, in: input width, or nothing for a bias; R rows of the embedding, C
hidden.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.conversion.source import Source, check_shapes, read_tokenizer, write_files
from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.files.weights import Stored
from lit_llama.wording import param


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k from neighbouring pairs to the two halves of a head: (H D, in) -> same."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k from the two halves of a head to neighbouring pairs: (H D, in) -> same."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def in_halves(name: str, weight: Tensor, config: LLaMAConfig) -> Tensor:
    """Return the tensor that Hugging Face calls `name`, from a layout of pairs: rows move if it is of q or k."""
    heads = _heads(name, config)
    return halves_from_pairs(weight, heads) if heads else weight


def in_pairs(name: str, weight: Tensor, config: LLaMAConfig) -> Tensor:
    """Invert `in_halves`."""
    heads = _heads(name, config)
    return pairs_from_halves(weight, heads) if heads else weight


def _heads(name: str, config: LLaMAConfig) -> int:
    """Heads of a projection whose rows are rotated, else 0."""
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return rotated.get(name.split(".")[-2], 0)


_BLOCK = 8 * 2**20  # bytes


@dataclass(frozen=True)
class Joined:
    """A tensor whose parts lie in several files.

    Args:
        name: Its name there, for messages.
        parts: The parts in order, of one dtype, alike in all but the dimension `dim`.
        dim: Dimension that they are laid together along: 0 rows, 1 columns.
        copies: So many neighbouring parts hold the same values, of which one counts.

    Raises:
        CheckpointError: The parts do not fit each other.
    """

    name: str
    parts: Sequence[Stored]
    dim: int = 0
    copies: int = 1
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        first = self.parts[0]
        for part in self.parts:
            if (part.dtype, self._others(part)) != (first.dtype, self._others(first)):
                raise CheckpointError(
                    f"{part.path}: {self.name} is {part.shape} of {part.dtype}, which does not fit "
                    f"{first.shape} of {first.dtype} in {first.path.name}"
                )
        shape = list(first.shape)
        if shape:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts[:: self.copies])
        object.__setattr__(self, "shape", tuple(shape))

    def _others(self, part: Stored) -> tuple[int, ...]:
        return tuple(size for i, size in enumerate(part.shape) if i != self.dim)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return self.parts[0].dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Copy rows start to stop of the whole, or all of it, into memory, which holds it and a block of rows.

        Raises:
            CheckpointError: Parts that should hold the same do not.
        """
        if len(self.parts) == 1:
            return self.parts[0].read(start, stop)
        stop = self.shape[0] if stop is None else stop
        whole = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        at = 0
        for i in range(0, len(self.parts), self.copies):
            size = self.parts[i].shape[self.dim]
            low, high = (max(start - at, 0), min(stop - at, size)) if self.dim == 0 else (start, stop)
            for first, last in _blocks(self.parts[i], low, high):
                if self.dim == 0:
                    target = whole[at + first - start : at + last - start]
                else:
                    target = whole[first - start : last - start, at : at + size]
                target.copy_(self._read_copies(i, first, last))
            at += size
        return whole

    def _read_copies(self, i: int, low: int, high: int) -> Tensor:
        value = self.parts[i].read(low, high)
        for other in self.parts[i + 1 : i + self.copies]:
            if not _same_bits(value, other.read(low, high)):
                first = self.parts[i].path.name
                raise CheckpointError(
                    f"{other.path}: {self.name} is not what {first} holds, though every shard has a copy of it; "
                    "the shards are of different models, or damaged: download them again"
                )
        return value


def same(first: Stored | Joined, second: Stored | Joined) -> bool:
    """Whether two tensors are equal to the last bit, without holding either."""
    if first == second:  # one place that two names point to
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape) or not first.shape:
        return False
    blocks = _blocks(first, 0, first.shape[0])
    return all(_same_bits(first.read(*rows), second.read(*rows)) for rows in blocks)


def _blocks(tensor: Stored | Joined, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows start to stop in blocks that are small beside a tensor."""
    step = max(1, _BLOCK // max(1, tensor.dtype.itemsize * math.prod(tensor.shape[1:])))
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


RESIZED = ("model.embed_tokens.weight", "lm_head.weight")
"""The matrices with a row for each id; a tied head is stored once."""


def resize(source: Source, rows: int) -> Source:
    """Return a model with an embedding and a head of `rows` rows and all else as it was.

    Old rows keep every bit. A new one is the mean of the rows that have been trained, which are those of the tokenizer,
    taken in float32 and rounded once: it says nothing of its own, and its logit is that of an average token.

    Args:
        source: The model.
        rows: How many there are to be, more than now.

    Raises:
        CheckpointError: There would not be more, or still too few for the tokenizer.
    """
    check_shapes(source)
    old = source.shape.vocab_size
    if rows <= old:
        what = "already has that many" if rows == old else f"has {old}, and rows that were trained are not thrown away"
        raise CheckpointError(f"{param('resize_vocab')} is {rows}, but the embedding of {source.path} {what}")
    tokens = _tokens(source)
    if tokens is not None and rows < tokens:
        raise CheckpointError(
            f"{param('resize_vocab')} is {rows}, but the tokenizer of {source.path} has {tokens} tokens"
        )
    trained = min(old, old if tokens is None else tokens)

    def read(name: str) -> Tensor:
        stored = source.read(name)  # (R, C) if it is resized
        if name not in RESIZED:
            return stored
        grown = torch.empty(rows, stored.shape[1], dtype=stored.dtype)
        grown[:old] = stored
        grown[old:rows] = stored[:trained].mean(0, dtype=torch.float32).to(stored.dtype)
        return grown

    specs = {
        name: (dtype, (rows, *shape[1:]) if name in RESIZED else shape) for name, (dtype, shape) in source.specs.items()
    }
    notes = {**source.notes, "resized_vocab": {"from": old, "to": rows, "mean_of_rows": trained}}
    return replace(source, config={**source.config, "vocab_size": rows}, specs=specs, read=read, notes=notes)


def _tokens(source: Source) -> int | None:
    """Size of the tokenizer that comes with a model, if it can be read."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(source, Path(folder))
        tokenizer = read_tokenizer(Path(folder))
    return tokenizer.size if tokenizer else None
