"""Checkpoint folder without the values of its weights, into which another model of the same shape is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_llama.conversion.native import companions
from lit_llama.conversion.source import NAMES
from lit_llama.conversion.source import SETTINGS_FILE as CONFIG_FILE
from lit_llama.conversion.tokens import complete
from lit_llama.errors import CheckpointError
from lit_llama.folder.publish import check_space, write_json
from lit_llama.model.config import text_part
from lit_llama.model.files.shards import write_weights
from lit_llama.model.files.weights import DTYPES, Spec, Weights, byte_size
from lit_llama.text.prompts.encode import TEMPLATE_FILE, end_id, style_of
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import ADDED_FILE, NAMES_FILE, SETTINGS_FILE, read_object
from lit_llama.text.tokenizer.vocabulary import tokenizer_home
from lit_llama.wording import param

GENERATION_FILE = "generation_config.json"
TOKENIZER_PARTS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", SETTINGS_FILE, ADDED_FILE, NAMES_FILE),
    *(TEMPLATE_FILE, "chat_template.json"),
)
"""Files that together are a tokenizer, with its chat template."""

_NAMES = {str(dtype).removeprefix("torch."): name for dtype, name in NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Parts of a checkpoint folder that stay when its weights change; held, as hours later the folder may be gone.

    Attributes:
        config: Contents of config.json.
        files: Tokenizer, settings and licences, by name.
        specs: Dtype and shape of each tensor, in the order of the files.
        tokenizer: The tokenizer of the folder.
    """

    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    specs: Mapping[str, Spec]
    tokenizer: Tokenizer

    @classmethod
    def read(cls, folder: Path, tokenizer: Tokenizer) -> "Frame":
        """Read all but the weights."""
        weights = Weights(folder)
        return cls(
            config=text_part(read_object(folder / CONFIG_FILE)),
            files=read_companions(folder),
            specs={name: weights.spec(name) for name in weights},
            tokenizer=tokenizer,
        )

    def write(self, folder: Path, tensors: Mapping[str, Tensor], dtype: str | None, template: str) -> None:
        """Write a checkpoint folder, one tensor at a time.

        Args:
            folder: Where to.
            tensors: The weights by name, at least those of `specs`.
            dtype: Store all of them in this dtype, such as bfloat16; None for that which each had.
            template: Its prompt style, a Jinja template.

        Raises:
            CheckpointError: A value does not fit float16.
            ResourceError: The disk is full.
        """
        specs = {name: (_NAMES[dtype] if dtype else kind, shape) for name, (kind, shape) in self.specs.items()}
        check_space(folder, sum(map(byte_size, specs.values())))
        write_weights(folder, specs, lambda name: _cast(name, tensors[name], specs[name]))
        write_companions(folder, self.files, template.encode(), style_of(template), self.tokenizer)
        complete(folder)
        write_json(folder / CONFIG_FILE, with_dtype(self.config, dtype))


def _cast(name: str, value: Tensor, spec: Spec) -> Tensor:
    stored = value.detach().to(device="cpu", dtype=DTYPES[spec[0]])
    if spec[0] == "F16" and not stored.isfinite().all():
        raise CheckpointError(
            f"{name} has values beyond float16; store the model with {param('dtype', 'bfloat16')} or float32"
        )
    return stored


def with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return the config.json of the same model in another dtype; None leaves it as it is."""
    if dtype is None:
        return dict(config)
    return {**config, "torch_dtype": dtype} | ({"dtype": dtype} if "dtype" in config else {})


def read_companions(folder: Path) -> dict[str, bytes]:
    """Read the files that belong to a model beside config.json and weights, by name."""
    return {name: path.read_bytes() for name, path in companions(folder).items()}


def companions_of_adapter(adapter_dir: Path, base: Path) -> dict[str, bytes]:
    """Read the files that belong to base + adapter: of the base, but for the tokenizer where the adapter has its own.

    No file of the base's tokenizer stays beside the adapter's: added tokens of one would be read into the other.
    """
    files, own = read_companions(base), read_companions(adapter_dir)
    if tokenizer_home(adapter_dir, base) == base:
        return files
    template = {TEMPLATE_FILE: files[TEMPLATE_FILE]} if TEMPLATE_FILE in files else {}
    kept = {name: content for name, content in files.items() if name not in TOKENIZER_PARTS}
    return kept | template | {name: content for name, content in own.items() if name in TOKENIZER_PARTS}


def write_companions(
    folder: Path,
    files: Mapping[str, bytes],
    template: bytes | None,
    style: PromptStyle | None,
    tokenizer: Tokenizer,
) -> None:
    """Write what belongs to a model beside config.json and weights, and let it speak in a style.

    The tokenizer's end and that of an answer in that style are added to those of generation_config.json, as other
    programs stop at these.

    Args:
        folder: Where to.
        files: What `read_companions` gives.
        template: A Jinja template that takes the place of the model's own; None leaves that.
        style: The style in which the model answers, if it is known.
        tokenizer: That of the model.
    """
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if template is not None:
        (folder / TEMPLATE_FILE).write_bytes(template)
        if values := read_object(folder / SETTINGS_FILE):  # the model's own template may stand in here, too
            values.pop("chat_template", None)
            write_json(folder / SETTINGS_FILE, values)
    end = end_id(tokenizer, style) if style else None
    path = folder / GENERATION_FILE
    named = read_object(path).get("eos_token_id")
    ends = named if isinstance(named, list) else [tokenizer.eos_id if named is None else named]
    if more := [wanted for wanted in dict.fromkeys((tokenizer.eos_id, end)) if wanted not in (None, *ends)]:
        write_json(path, read_object(path) | {"eos_token_id": [*ends, *more]})
