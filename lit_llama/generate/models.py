"""Several models on one engine: a base and adapters of it, each an `LLM` with its own prompt style."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.llm import LLM, Opened, open_folder
from lit_llama.generate.loading import Loading
from lit_llama.model.adapter import CONFIG_FILE, load_adapter
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.kernels.decode import Factors, factors_of
from lit_llama.model.llama import LLaMA
from lit_llama.model.lora import adapters as adapters_of
from lit_llama.model.weights import Weights
from lit_llama.progress import stderr


def load_models(
    folder: Path, adapters: Mapping[str, Path] | None = None, loading: Loading | None = None, *, system: str = ""
) -> dict[str, LLM]:
    """Load a folder and adapters of its model; what is asked first is what the folder is.

    Where the folder is an adapter whose base can answer without it, both are there.

    Args:
        folder: A checkpoint folder or an adapter folder.
        adapters: Folders of further adapters, by the names that they are to have.
        loading: How they are loaded.
        system: Message that conversations will begin with, which the style of the first model has to have.

    Returns:
        Models by their names; all have one engine.

    Raises:
        UserError: A name is taken, or an adapter is more than updates of low rank on linear layers, or the device has
            no kernels for several models.
        CheckpointError: Something is missing or does not fit.
        IntegrityError: An adapter is of another base.
    """
    loading = loading or Loading()
    opened = open_folder(folder, loading)
    opened.check_style(system)
    given = dict(adapters or {})
    check_merging(loading, given)
    if loading.merge_adapter:
        return {_name(opened.folder): opened.load()}
    packs = opened.plan().packed
    if given and not packs:
        raise UserError(
            "several models at once need the kernels for CPUs, and weights that these can hold: name one of them "
            "alone, or merge an adapter into its base with finetune/merge.py"
        )
    own = updates_of(opened) if packs and opened.adapted else None
    if not given and own is None:
        return {_name(opened.folder): opened.load()}
    base = open_folder(opened.base, replace(loading, base_dir=None)) if opened.adapted else opened
    parts: dict[str, tuple[Opened, Updates | None]] = {}
    if opened.adapted:
        parts[_name(opened.folder)] = opened, own
    for name, path in given.items():
        part = _open_adapter(name, path, replace(loading, base_dir=opened.base))
        parts[name] = part, updates_of(part)
    _check(parts, base)
    styled = base if base.style is not None else replace(base, style=opened.style)
    if styled is not base:
        stderr().print(f"{base.folder}: it has no chat template, so it is asked in the style of {opened.folder}")
    llm = styled.load()
    models = {_name(base.folder): llm}
    for name, (part, updates) in parts.items():
        assert updates is not None
        llm.engine.add_adapter(name, updates.factors)
        stderr().print(f"adapter {name}: {part.folder}")
        models[name] = part.on(llm, name)
    first = _name(opened.folder)
    return {first: models[first], **models}


def check_merging(loading: Loading, adapters: Mapping[str, Path]) -> None:
    """Raise UserError if one adapter is to be merged into the base that others need as it is."""
    if loading.merge_adapter and adapters:
        raise UserError(
            "--merge_adapter makes one adapter part of the base, which the others of --adapters need as it is: leave "
            "one of the two out"
        )


class Updates(NamedTuple):
    """Updates that an engine adds to a base in use to have it answer as an adapter.

    Attributes:
        factors: By the names of the layers.
        remarks: What people should know of the adapter.
    """

    factors: dict[str, Factors]
    remarks: tuple[str, ...]


def updates_of(adapter: Opened) -> Updates | None:
    """Read the updates of an adapter folder; None if it has more than updates of low rank on linear layers of the
    decoder.
    """
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.from_folder(adapter.base))
    placed = load_adapter(model, adapter.folder, Weights(adapter.base))
    factors = factors_of(model)
    if placed.base or len(factors) < sum(1 for _ in adapters_of(model)):
        return None
    return Updates(factors, placed.remarks)


def _name(folder: Path) -> str:
    return folder.resolve().name


def _open_adapter(name: str, path: Path, loading: Loading) -> Opened:
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(f"adapter {name}: {path} has no {CONFIG_FILE}, so it is no adapter")
    return open_folder(path, loading)


def _check(parts: Mapping[str, tuple[Opened, Updates | None]], base: Opened) -> None:
    for name, (part, updates) in parts.items():
        if name == _name(base.folder):
            raise UserError(f"{part.folder}: {name!r} is the name of the base already; name another")
        if updates is None:
            raise UserError(
                f"adapter {name}: {part.folder} holds more than updates of low rank on the linear layers of the "
                "decoder, so it cannot answer beside others: name it alone, or merge it with finetune/merge.py"
            )
        if part.tokenizer.size != base.tokenizer.size:
            raise UserError(
                f"adapter {name}: its own tokenizer has {part.tokenizer.size} tokens, that of the base "
                f"{base.tokenizer.size}, so they cannot answer from one engine: name it alone"
            )
        if part.style is None and base.style is None:
            raise UserError(f"adapter {name}: neither {part.folder} nor {base.folder} has a chat template")
