"""Several models on one engine: a base and adapters of it, each an `LLM` with its own prompt style."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lit_llama.device import Precision
from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.llm import LLM, Opened, open_folder
from lit_llama.model.adapter import CONFIG_FILE, load_adapter
from lit_llama.model.config import Held, LLaMAConfig
from lit_llama.model.kernels.decode import Factors, factors_of
from lit_llama.model.llama import LLaMA
from lit_llama.model.lora import adapters as adapters_of
from lit_llama.model.weights import Weights
from lit_llama.progress import stderr
from lit_llama.text.encode import answer_opening, end_id
from lit_llama.text.prompts import StyleName


def load_models(
    folder: Path,
    adapters: Mapping[str, Path] | None = None,
    *,
    prompt_style: StyleName | None = None,
    base_dir: Path | None = None,
    precision: Precision = "auto",
    quantize: Held | None = None,
    max_sequences: int = 32,
    system: str = "",
    draft_dir: Path | None = None,
) -> dict[str, LLM]:
    """Load a folder and adapters of its model; what is asked first is what the folder is.

    Where the folder is an adapter whose base can answer without it, both are there.

    Args:
        folder: A checkpoint folder or an adapter folder.
        adapters: Folders of further adapters, by the names that they are to have.
        prompt_style: Ask all of them in this style.
        base_dir: Where the base of an adapter is.
        precision: Of weights and activations.
        quantize: How to hold the linear layers.
        max_sequences: Answers that are made together, at most.
        system: Message that conversations will begin with, which the style of the first model has to have.

        draft_dir: A smaller checkpoint of the same tokenizer that guesses tokens.

    Returns:
        Models by their names; all have one engine.

    Raises:
        UserError: A name is taken, or an adapter is more than updates of low rank on linear layers, or the device has
            no kernels for several models.
        CheckpointError: Something is missing or does not fit.
        IntegrityError: An adapter is of another base.
    """
    opened = open_folder(folder, prompt_style=prompt_style, base_dir=base_dir)
    opened.check_style(system)
    given = dict(adapters or {})
    adapted = opened.base != opened.folder
    packs = opened.plan(precision=precision, quantize=quantize, max_sequences=max_sequences).packed
    if given and not packs:
        raise UserError(
            "several models at once need the kernels for CPUs, and weights that these can hold: name one of them "
            "alone, or merge an adapter into its base with finetune/merge.py"
        )
    loading = {
        "precision": precision,
        "quantize": quantize,
        "max_sequences": max_sequences,
        "draft_dir": draft_dir,
    }
    if not adapted and not given:
        return {_name(opened.folder): opened.load(**loading)}  # type: ignore[arg-type]
    own = _factors(opened) if packs and adapted else None
    if adapted and own is None and not given:
        return {_name(opened.folder): opened.load(**loading)}  # type: ignore[arg-type]
    base = open_folder(opened.base, prompt_style=prompt_style) if adapted else opened
    parts: dict[str, tuple[Opened, dict[str, Factors] | None]] = {}
    if adapted:
        parts[_name(opened.folder)] = opened, own
    for name, path in given.items():
        part = _open_adapter(name, path, opened.base, prompt_style)
        parts[name] = part, _factors(part)
    _check(parts, base)
    styled = base if base.style is not None else replace(base, style=opened.style)
    if styled is not base:
        stderr().print(f"{base.folder}: it has no chat template, so it is asked in the style of {opened.folder}")
    llm = styled.load(**loading)  # type: ignore[arg-type]
    models = {_name(base.folder): llm}
    for name, (part, factors) in parts.items():
        assert factors is not None
        llm.engine.add_adapter(name, factors)
        stderr().print(f"adapter {name}: {part.folder}")
        models[name] = _view(llm, part, name)
    first = _name(opened.folder)
    return {first: models[first], **models}


def _name(folder: Path) -> str:
    return folder.resolve().name


def _open_adapter(name: str, path: Path, base: Path, prompt_style: StyleName | None) -> Opened:
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(f"adapter {name}: {path} has no {CONFIG_FILE}, so it is no adapter")
    return open_folder(path, prompt_style=prompt_style, base_dir=base)


def _factors(opened: Opened) -> dict[str, Factors] | None:
    """The updates of an adapter; None if it has more than such of linear layers of the decoder."""
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.from_folder(opened.base))
    load_adapter(model, opened.folder, Weights(opened.base))
    factors = factors_of(model)
    return factors if len(factors) == sum(1 for _ in adapters_of(model)) else None


def _check(parts: Mapping[str, tuple[Opened, dict[str, Factors] | None]], base: Opened) -> None:
    for name, (part, factors) in parts.items():
        if name == _name(base.folder):
            raise UserError(f"{part.folder}: {name!r} is the name of the base already; name another")
        if factors is None:
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


def _view(llm: LLM, part: Opened, name: str) -> LLM:
    """A model of the engine of another one."""
    style = part.style
    end = end_id(part.tokenizer, style) if style else None
    return replace(
        llm,
        tokenizer=part.tokenizer,
        style=style,
        stop_ids=part.ends if end is None else part.ends | {end},
        opening=answer_opening(part.tokenizer, style) if style else "",
        adapter=name,
    )
