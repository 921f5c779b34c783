"""More rows for an embedding whose tokenizer has grown.

Shapes: R rows of the embedding, C hidden.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.convert.source import Source, check_shapes, read_tokenizer, write_files
from lit_llama.errors import CheckpointError

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
        raise CheckpointError(f"--resize_vocab is {rows}, but the embedding of {source.path} {what}")
    tokens = _tokens(source)
    if tokens is not None and rows < tokens:
        raise CheckpointError(f"--resize_vocab is {rows}, but the tokenizer of {source.path} has {tokens} tokens")
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
