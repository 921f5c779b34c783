"""Source of weights in any layout on their way into another: tensors in Hugging Face's names, read one by one.

A layout's file in this package opens it as a Source, and writes a Source as itself if it can.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.errors import CheckpointError
from lit_llama.folder.publish import check_space, publish, write_json
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.files.shards import MAX_SHARD_SIZE, write_weights
from lit_llama.model.files.weights import DTYPES, Spec, Stored, byte_size, check_finite, check_names
from lit_llama.progress import stderr
from lit_llama.text.tokenizer.base import TOKENIZER_FILES, Tokenizer
from lit_llama.text.tokenizer.special import MERGES_FILES
from lit_llama.text.tokenizer.vocabulary import identity
from lit_llama.wording import param

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""torch.float16 -> F16."""

SETTINGS_FILE, META_FILE = "config.json", "meta.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Names:
    """Names of a layout for the tensors of a model.

    Args:
        outer: Its names of `model.embed_tokens.weight`, `model.norm.weight` and `lm_head.weight`.
        layer: What stands before the tensors of a layer, with {} for its number.
        inner: Its names of the tensors of a layer.
    """

    outer: Mapping[str, str]
    layer: str
    inner: Mapping[str, str]

    def __call__(self, native: str) -> str | None:
        """Return the layout's name of a tensor that Hugging Face calls `native`; None if the layout has none."""
        if native in self.outer:
            return self.outer[native]
        _, _, layer, rest = native.split(".", 3)  # model.layers.N.rest
        return self.layer.format(layer) + self.inner[rest] if rest in self.inner else None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as it is stored somewhere.

    Args:
        path: File or folder it comes from, for messages.
        kind: Layout in words, such as "GGUF".
        config: Contents of the config.json of its Hugging Face folder, without torch_dtype.
        specs: Stored dtype and shape of each tensor, by Hugging Face's names, in the order to write.
        read: Makes one tensor, in its stored dtype.
        stored: Where each tensor lies, if it needs no conversion.
        files: What else belongs into the folder, such as tokenizer and chat template: a file to copy, or its contents.
        notes: Where it came from and what was decided, for meta.json.
    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    specs: Mapping[str, Spec]
    read: Callable[[str], Tensor]
    stored: Mapping[str, Stored] = field(default_factory=dict)
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def shape(self) -> LLaMAConfig:
        """The configuration, checked."""
        try:
            return LLaMAConfig.from_dict(self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    @property
    def parameters(self) -> int:
        """Number of values."""
        return sum(math.prod(shape) for _, shape in self.specs.values())

    @property
    def dtype(self) -> str:
        """Name of the dtype that most values are stored in, as in torch_dtype."""
        counts: dict[str, int] = {}
        for name, shape in self.specs.values():
            counts[name] = counts.get(name, 0) + math.prod(shape)
        return str(DTYPES[max(counts, key=lambda name: counts[name])]).removeprefix("torch.")

    def checked(self) -> "Source":
        """Return a twin of the model of which no tensor is read whose values are not finite, see `check_finite`."""

        def read(name: str) -> Tensor:
            value = self.read(name)
            check_finite(value, name, self.stored[name].path if name in self.stored else self.path)
            return value

        return replace(self, read=read)

    def cast(self, dtype: str | None) -> "Source":
        """Return a twin with every tensor rounded to `dtype`, such as "float16"; None keeps what is stored.

        Reading a value that `dtype` cannot hold raises CheckpointError.
        """
        if dtype is None:
            return self
        target: torch.dtype = getattr(torch, dtype)

        def read(name: str) -> Tensor:
            stored = self.read(name)
            value = stored.to(target)
            if lost := int((stored.isfinite() & ~value.isfinite()).sum()):
                raise CheckpointError(
                    f"{self.path}: {lost} values of {name} are too large for {dtype}; use "
                    f"{param('dtype', 'bfloat16')} or float32"
                )
            return value

        specs = {name: (NAMES[target], shape) for name, (_, shape) in self.specs.items()}
        return replace(self, specs=specs, read=read)


def settings(config: LLaMAConfig) -> dict[str, Any]:
    """Return the part of a configuration that a Source holds."""
    raw = config.to_dict("")
    del raw["torch_dtype"]  # follows from the tensors
    return raw


def expected_shapes(config: LLaMAConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model by name, in the order to write; a tied head is not among them."""
    from lit_llama.model.llama import LLaMA

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LLaMA(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def check_stored(path: Path, expected: set[str], tensors: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a file holds exactly the tensors expected, in dtypes that can be written.

    Args:
        path: The file or folder, for messages.
        expected: Names in its layout.
        tensors: What it holds by name, each with a dtype.
    """
    check_names(path, expected, tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{path}: {name} is of {tensor.dtype}, expected one of {', '.join(map(str, NAMES))}")


def check_shapes(source: Source) -> None:
    """Raise CheckpointError unless the tensors are exactly those that the configuration asks for."""
    expected = expected_shapes(source.shape)
    if HEAD in source.specs:  # a tied one may be stored twice
        expected[HEAD] = expected[EMBEDDING]
    for name in sorted(expected.keys() | source.specs.keys()):
        found = source.specs[name][1] if name in source.specs else None
        if found != expected.get(name):
            raise CheckpointError(f"{source.path}: {name} is {found}, the settings ask for {expected.get(name)}")


def write_folder(source: Source, destination: Path, *, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Write the Hugging Face folder of a model, tensor by tensor.

    Args:
        source: The model.
        destination: Folder to make.
        max_shard_size: Most bytes of a weight file, unless one tensor is larger.

    Raises:
        CheckpointError: Tensors and configuration do not fit each other.
        ResourceError: The disk has no room for it.
    """
    from lit_llama.conversion.tokens import complete

    check_shapes(source)
    with publish(destination, SETTINGS_FILE) as folder:
        check_space(folder, sum(map(byte_size, source.specs.values())))
        write_weights(folder, source.specs, source.read, max_shard_size)
        write_files(source, folder)
        complete(folder)
        origin = {"path": str(source.path), "kind": source.kind, **source.notes}
        tokenizer = read_tokenizer(folder)
        write_json(
            folder / META_FILE,
            {"format": 1, "source": origin} | ({"tokenizer": identity(tokenizer)} if tokenizer else {}),
        )


def write_files(source: Source, folder: Path) -> None:
    """Write all but the weights: config.json, tokenizer and so on."""
    for name, content in source.files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    write_json(folder / SETTINGS_FILE, {**source.config, "torch_dtype": source.dtype})


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Read the tokenizer in a folder; None, and aloud, if it has one that cannot be read."""
    if not any((folder / name).is_file() for name in (*TOKENIZER_FILES, MERGES_FILES[0])):
        return None
    try:
        return Tokenizer.from_path(folder)
    except CheckpointError as error:
        stderr().print(f"the tokenizer is taken along, but not recorded: {error}")
        return None
