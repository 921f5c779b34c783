"""The models that are compared: what is known before they are loaded; those that share a base are loaded at once."""

import gc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_llama.device import pick_device, pick_dtype
from lit_llama.errors import UserError
from lit_llama.folder.manifest import sha256_file
from lit_llama.generate.llm import LLM, Opened, open_folder
from lit_llama.generate.loading import Loading
from lit_llama.generate.models import Updates, updates_of
from lit_llama.model.adapter import WEIGHTS_FILE, trained_on
from lit_llama.model.checkpoint import fingerprint
from lit_llama.progress import stderr
from lit_llama.text.tokenizer.vocabulary import tokenizer_home


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
        what = f"--base_dir {loading.base_dir} is the base of" if loading.base_dir else "--merge_adapter is for"
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
