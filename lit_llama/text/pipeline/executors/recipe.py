"""Recipe of an encoder: all that decides how texts are rendered and encoded, for a machine that has no files of it."""

import hashlib
import pickle
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from lit_llama.errors import UserError
from lit_llama.folder.manifest import sha256_file
from lit_llama.text.config import ENCODING, PrepareConfig, StyleChoice
from lit_llama.text.pipeline.encoder import Encoder
from lit_llama.text.pipeline.pairs import PairEncoder
from lit_llama.text.prompts.encode import TEMPLATE_FILE, folder_style, named_style
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.tokenizer.base import TOKENIZER_FILES, Tokenizer
from lit_llama.text.tokenizer.special import MERGES_FILES
from lit_llama.wording import param

_BESIDE = (
    *(*TOKENIZER_FILES, *MERGES_FILES, TEMPLATE_FILE),
    *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
)
_ENDS = ("config.json", "generation_config.json")
"""Files that a tokenizer looks into for the token that ends a text, where its own do not say it."""
_PACKAGES = ("tokenizers", "sentencepiece", "tiktoken", "jinja2")


@dataclass(frozen=True)
class Recipe:
    """Everything that an encoder is made of.

    Args:
        config: How rows become samples.
        files: Contents of the files of the tokenizer and its prompt style, by name.
        file: Name of the tokenizer's file; "" for the folder.
        packages: Versions of what encodes and renders.
        encoding: Version of what rows become.
    """

    config: PrepareConfig
    files: dict[str, bytes]
    file: str
    packages: dict[str, str]
    encoding: int = ENCODING

    @classmethod
    def of(cls, config: PrepareConfig) -> "Recipe":
        """Read the files that a configuration names."""
        path = config.tokenizer_path
        names = dict.fromkeys((*_BESIDE, *_ENDS, *([path.name] if path.is_file() else [])))
        folder = folder_of(path)
        files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
        return cls(config, files, path.name if path.is_file() else "", packages())

    @cached_property
    def written(self) -> bytes:
        """The recipe as bytes, for another process."""
        return pickle.dumps(replace(self))

    @property
    def key(self) -> str:
        """Hash of all of it."""
        return hashlib.sha256(self.written).hexdigest()

    def encoder(self) -> Encoder:
        """Build the encoder.

        Raises:
            UserError: The packages here are others than where the recipe was written: they might give other tokens.
            CheckpointError: The tokenizer or the style cannot be used.
        """
        here = {**packages(), "the encoding": str(ENCODING)}
        for name, wanted in {**self.packages, "the encoding": str(self.encoding)}.items():
            if (found := here.get(name, "none")) != wanted:
                raise UserError(
                    f"a machine of the cluster has version {found} of {name}, expected {wanted} as on the machine that "
                    "reads the rows: install the same versions on all, since others may give other tokens"
                )
        with TemporaryDirectory(prefix="lit-llama-") as name:
            folder = Path(name)
            for file, content in self.files.items():
                (folder / file).write_bytes(content)
            path = folder / self.file
            style = choose_style(self.config.prompt_style, path)
            return new_encoder(Tokenizer.from_path(path), style, self.config)


def new_encoder(tokenizer: Tokenizer, style: PromptStyle, config: PrepareConfig) -> Encoder:
    """Build the encoder of a configuration."""
    kind = PairEncoder if config.data_kind == "preference" else Encoder
    return kind(
        tokenizer,
        style,
        max_seq_length=config.max_seq_length,
        mask_inputs=config.mask_inputs,
        train_on=config.train_on,
        overflow=config.overflow,
        on_error=config.on_error,
        thoughts=config.thoughts,
        spelled=config.rendered,
        typed_ends=config.typed_ends,
    )


def choose_style(name: StyleChoice | None, tokenizer_path: Path) -> PromptStyle:
    """Return the style of a name; without one that of the model folder, or Alpaca's where the folder has none.

    Raises:
        UserError: The folder's own is wanted, and there is none.
    """
    if name not in (None, "chat_template"):
        return named_style(name)
    folder = folder_of(tokenizer_path)
    style = folder_style(folder)
    if style is None and name is not None:
        raise UserError(
            f"{param('prompt_style', 'chat_template')}: {folder} has no {TEMPLATE_FILE}; name a built-in style"
        )
    return style or named_style("alpaca")


def folder_of(tokenizer_path: Path) -> Path:
    """Return the folder of a tokenizer, which may be named by its file."""
    return tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent


def tokenizer_files(path: Path) -> dict[str, str]:
    """Return the sha256 of all that says how texts are encoded and rendered."""
    folder = folder_of(path)
    files = {name: sha256_file(folder / name) for name in _BESIDE if (folder / name).is_file()}
    return files | {"tokenizer": sha256_file(path) if path.is_file() else ""}


def packages() -> dict[str, str]:
    """Return the versions of what encodes and renders: another may give other tokens."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # not all are needed
            found[name] = version(name)
    return found
