"""Several models: a base and adapters of it on one engine, or models that are compared, one after another.

Each is an `LLM` with its own prompt style. Of models that are compared all is known before they are loaded, and those
that share a base are loaded at once.
"""

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_llama.device import pick_device, pick_dtype
from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder.manifest import sha256_file
from lit_llama.generate.flags import Loading
from lit_llama.generate.llm import LLM, Opened, open_folder
from lit_llama.model.adapters.lora import adapters as adapters_of
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, WEIGHTS_FILE, load_adapter, trained_on
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.files.checkpoint import fingerprint
from lit_llama.model.files.weights import Weights
from lit_llama.model.kernels.trained import Factors, factors_of
from lit_llama.model.llama import LLaMA
from lit_llama.model.places import no_adapter
from lit_llama.progress import stderr
from lit_llama.text.tokenizer.vocabulary import tokenizer_home
from lit_llama.wording import call, param


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
            f"alone, or merge an adapter into its base with {call('merge')}"
        )
    own = updates_of(opened) if packs and opened.adapted else None
    if not given and own is None:
        return {_name(opened.folder): opened.load()}
    base = open_folder(opened.base, replace(loading, base_dir=None)) if opened.adapted else opened
    parts: dict[str, tuple[Opened, Updates | None]] = {}
    if opened.adapted:
        parts[_name(opened.folder)] = opened, own
    for name, path in given.items():
        part = open_adapter(name, path, replace(loading, base_dir=opened.base))
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
            f"makes one adapter part of the base, which the others of {param('adapters')} need as it is: leave one of "
            "the two out",
            parameter="merge_adapter",
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


def open_adapter(name: str, path: Path, loading: Loading) -> Opened:
    """Read all of an adapter folder but its weights; errors as for `open_folder`.

    Args:
        name: Of the adapter.
        path: Its folder.
        loading: How it is loaded.
    """
    if not (path / CONFIG_FILE).is_file():
        absent = f"has no {CONFIG_FILE}, so it is no adapter" if path.exists() else "does not exist"
        why = no_adapter(path) or f"{path} {absent}"
        raise CheckpointError(f"adapter {name}: {why}")
    return open_folder(path, loading)


def _check(parts: Mapping[str, tuple[Opened, Updates | None]], base: Opened) -> None:
    for name, (part, updates) in parts.items():
        if name == _name(base.folder):
            raise UserError(f"{part.folder}: {name!r} is the name of the base already; name another")
        if updates is None:
            raise UserError(
                f"adapter {name}: {part.folder} holds more than updates of low rank on the linear layers of the "
                f"decoder, so it cannot answer beside others: name it alone, or merge it with {call('merge')}"
            )
        if part.tokenizer.size != base.tokenizer.size:
            raise UserError(
                f"adapter {name}: its own tokenizer has {part.tokenizer.size} tokens, that of the base "
                f"{base.tokenizer.size}, so they cannot answer from one engine: name it alone"
            )
        if part.style is None and base.style is None:
            raise UserError(f"adapter {name}: neither {part.folder} nor {base.folder} has a chat template")


@dataclass(frozen=True)
class Model:
    """A folder that is to be evaluated.

    Attributes:
        name: What it is called in the report.
        opened: All of it but its weights.
    """

    name: str
    opened: Opened

    @property
    def folder(self) -> Path:
        """Folder of the model."""
        return self.opened.folder


def identity(opened: Opened) -> dict[str, Any]:
    """Return the fingerprints of what decides the answers of a folder."""
    style = "" if opened.style is None else opened.style.jinja(bos=False)
    loading = opened.loading
    found: dict[str, Any] = {"weights": fingerprint(opened.base)}
    if opened.adapted:
        found["adapter"] = sha256_file(opened.folder / WEIGHTS_FILE)
    if loading.kv_cache != "auto":
        found["kv_cache"] = loading.kv_cache
    if loading.merge_adapter:
        found["merge_adapter"] = True
    return found | {
        "tokenizer": opened.tokenizer.fingerprint(),
        "prompt_style": hashlib.sha256(style.encode()).hexdigest()[:16],
        "dtype": str(pick_dtype(loading.precision, pick_device()))[6:],
        "quantize": loading.quantize or (trained_on(opened.folder) if opened.adapted else None),
    }


def open_models(folders: Sequence[Path], loading: Loading | None = None) -> list[Model]:
    """Read all of the folders but their weights.

    Args:
        folders: Checkpoints and adapters; the first is what others are compared to.
        loading: How all of them are loaded; `base_dir` is that of the adapters among them.

    Raises:
        UserError: A folder is named twice.
        CheckpointError: One of them cannot be used.
    """
    loading = loading or Loading()
    plain = replace(loading, base_dir=None, merge_adapter=False)
    names = short_names(folders)
    adapters = [(folder / "adapter_config.json").is_file() for folder in folders]
    if (loading.base_dir is not None or loading.merge_adapter) and not any(adapters):
        what = (
            f"{param('base_dir', loading.base_dir)} is the base of"
            if loading.base_dir
            else f"{param('merge_adapter')} is for"
        )
        raise UserError(f"{what} an adapter, but none of the folders is one")
    return [
        Model(name, open_folder(folder, loading if adapter else plain))
        for name, folder, adapter in zip(names, folders, adapters, strict=True)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return as much of the end of each path as tells it from the others.

    Raises:
        UserError: One is named twice.
    """
    places = [path.resolve() for path in paths]
    longest = max((len(place.parts) for place in places), default=0)
    for place, path in zip(places, paths, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{path} is named twice, expected different folders")
    for length in range(1, longest + 1):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len({*names}) == len(names):
            return names
    return [str(place) for place in places]


def loaded(models: Sequence[Model]) -> Iterator[tuple[Model, LLM]]:
    """Load models one after another, those that share a base as one with its adapters where the engine can.

    What was given before is let go: it must not be used when the next one is asked for.

    Args:
        models: Which.
    """
    done: set[str] = set()
    for model in models:
        if model.name in done:
            continue
        near = [other for other in models if other.name not in done and _same_base(other, model)]
        shared = [(other, found) for other in near if (found := _shared(other)) is not None] if len(near) > 1 else []
        if len(shared) > 1 and shared[0][0] is model:
            yield from _together(shared)
            done |= {other.name for other, _ in shared}
        else:
            yield model, model.opened.load()
            done.add(model.name)
        gc.collect()


def _same_base(one: Model, other: Model) -> bool:
    """Whether two are loaded in one way onto one base."""
    bases = {model.opened.base.resolve() for model in (one, other)}
    ways = {replace(model.opened.loading, base_dir=None) for model in (one, other)}
    return len(bases) == len(ways) == 1


def _shared(model: Model) -> Updates | None:
    """What the engine can add to a base in use; None if the model has to be loaded alone."""
    opened = model.opened
    if (
        opened.loading.merge_adapter
        or not opened.plan().packed
        or tokenizer_home(opened.folder, opened.base) != opened.base
    ):
        return None
    return updates_of(opened) if opened.adapted else Updates({}, ())


def _together(members: Sequence[tuple[Model, Updates]]) -> Iterator[tuple[Model, LLM]]:
    """One base with all its adapters, as one model after another."""
    first = members[0][0].opened
    base = replace(first, folder=first.base, remarks=()).load()
    for model, updates in members:
        if model.opened.adapted:
            base.engine.add_adapter(model.name, updates.factors)
            stderr().print(f"{model.folder} on {first.base}, which is loaded already")
        for remark in (*updates.remarks, *model.opened.remarks):
            stderr().print(remark)
    for model, _ in members:
        yield model, model.opened.on(base, model.name if model.opened.adapted else None)
