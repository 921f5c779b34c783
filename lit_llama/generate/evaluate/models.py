"""The models that are compared: what is known before they are loaded; those that share a base are loaded at once."""

import gc
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_llama.device import Precision, pick_device, pick_dtype
from lit_llama.errors import UserError
from lit_llama.folder import sha256_file
from lit_llama.generate.llm import LLM, Opened, open_folder
from lit_llama.model.adapter import WEIGHTS_FILE, load_adapter, read_adapter_weights, trained_on
from lit_llama.model.checkpoint import fingerprint
from lit_llama.model.config import Held, LLaMAConfig
from lit_llama.model.kernels.decode import Factors, factors_of, packs
from lit_llama.model.llama import LLaMA
from lit_llama.progress import stderr
from lit_llama.text.encode import answer_opening, end_id
from lit_llama.text.vocabulary import tokenizer_home

_PLAIN = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight")
"""Tensors of an adapter that the engine adds to a base which others use as well."""


@dataclass(frozen=True)
class Model:
    """A folder that is to be evaluated.

    Attributes:
        name: What it is called in the report.
        opened: All of it but its weights.
        precision: Of weights and activations.
        quantize: How its linear layers are held; None as the folder says.
    """

    name: str
    opened: Opened
    precision: Precision
    quantize: Held | None

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.opened.folder

    @property
    def adapted(self) -> bool:
        """Whether it is an adapter on a base."""
        return self.opened.base != self.opened.folder

    def identity(self) -> dict[str, Any]:
        """What decides its answers, by fingerprints."""
        return identity(self.opened, self.precision, self.quantize)

    def load(self, max_sequences: int) -> LLM:
        """The model alone."""
        return self.opened.load(precision=self.precision, quantize=self.quantize, max_sequences=max_sequences)


def identity(opened: Opened, precision: Precision, quantize: Held | None) -> dict[str, Any]:
    """What decides the answers of a folder, by fingerprints."""
    style = "" if opened.style is None else opened.style.jinja(bos=False)
    found: dict[str, Any] = {"weights": fingerprint(opened.base)}
    adapted = opened.base != opened.folder
    if adapted:
        found["adapter"] = sha256_file(opened.folder / WEIGHTS_FILE)
    return found | {
        "tokenizer": opened.tokenizer.fingerprint(),
        "prompt_style": hashlib.sha256(style.encode()).hexdigest()[:16],
        "dtype": str(pick_dtype(precision, pick_device()))[6:],
        "quantize": quantize or (trained_on(opened.folder) if adapted else None),
    }


def open_models(
    folders: Sequence[Path],
    *,
    prompt_style: str | None = None,
    base_dir: Path | None = None,
    precision: Precision = "auto",
    quantize: Held | None = None,
) -> list[Model]:
    """Read all of the folders but their weights.

    Args:
        folders: Checkpoints and adapters; the first is what others are compared to.
        prompt_style: Ask all of them in this style instead of their own.
        base_dir: Base of the adapters among them.
        precision: Of weights and activations.
        quantize: How to hold the linear layers of all of them.

    Raises:
        UserError: A folder is named twice.
        CheckpointError: One of them cannot be used.
    """
    names = short_names(folders)
    adapters = [(folder / "adapter_config.json").is_file() for folder in folders]
    if base_dir is not None and not any(adapters):
        raise UserError(f"--base_dir {base_dir} is the base of an adapter, but none of the folders is one")
    return [
        Model(
            name,
            open_folder(folder, prompt_style=prompt_style, base_dir=base_dir if adapter else None),
            precision,
            quantize,
        )
        for name, folder, adapter in zip(names, folders, adapters, strict=True)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells it from the others.

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


def loaded(models: Sequence[Model], max_sequences: int) -> Iterator[tuple[Model, LLM]]:
    """Load models one after another, those that share a base as one with its adapters where the engine can.

    What was given before is let go: it must not be used when the next one is asked for.

    Args:
        models: Which.
        max_sequences: Answers that are made together, at most.
    """
    done: set[str] = set()
    for model in models:
        if model.name in done:
            continue
        near = [other for other in models if other.name not in done and _same_base(other, model)]
        shared = [(other, found) for other in near if (found := _shared(other)) is not None] if len(near) > 1 else []
        if len(shared) > 1 and shared[0][0] is model:
            yield from _together(shared, max_sequences)
            done |= {other.name for other, _ in shared}
        else:
            yield model, model.load(max_sequences)
            done.add(model.name)
        gc.collect()


def _same_base(one: Model, other: Model) -> bool:
    return one.opened.base.resolve() == other.opened.base.resolve() and one.precision == other.precision


class _Shared(NamedTuple):
    """What makes a model of a base in use.

    Attributes:
        factors: Updates of an adapter; none for the base itself.
        remarks: What people should know of it.
    """

    factors: dict[str, Factors]
    remarks: tuple[str, ...] = ()


def _shared(model: Model) -> _Shared | None:
    """What the engine can add to a base in use; None if the model has to be loaded alone."""
    opened, device = model.opened, pick_device()
    config = LLaMAConfig.from_folder(opened.base)
    if model.quantize is not None or device.type != "cpu" or not packs(config, pick_dtype(model.precision, device)):
        return None
    if not model.adapted:
        return _Shared({}, opened.remarks)
    if trained_on(opened.folder) is not None or tokenizer_home(opened.folder, opened.base) != opened.base:
        return None
    if not all(map(_PLAIN.fullmatch, read_adapter_weights(opened.folder))):
        return None
    with torch.device("meta"):
        skeleton = LLaMA(config)
    placed = load_adapter(skeleton, opened.folder)
    return _Shared(factors_of(skeleton), (*placed.remarks, *opened.remarks))


def _together(members: Sequence[tuple[Model, _Shared]], max_sequences: int) -> Iterator[tuple[Model, LLM]]:
    """One base with all its adapters, as one model after another."""
    first = members[0][0]
    whole = replace(first.opened, folder=first.opened.base, remarks=())
    base = whole.load(precision=first.precision, max_sequences=max_sequences)
    for model, shared in members:
        if shared.factors:
            base.engine.add_adapter(model.name, shared.factors)
            stderr().print(f"{model.folder} on {first.opened.base}, which is loaded already")
        for remark in shared.remarks:
            stderr().print(remark)
    for model, shared in members:
        opened = model.opened
        base.engine.default_adapter = model.name if shared.factors else None
        end = end_id(opened.tokenizer, opened.style) if opened.style else None
        yield (
            model,
            replace(
                base,
                tokenizer=opened.tokenizer,
                style=opened.style,
                stop_ids=opened.ends if end is None else opened.ends | {end},
                opening=answer_opening(opened.tokenizer, opened.style) if opened.style else "",
            ),
        )
