"""Adapters on a built model: which modules they take the place of, and what an optimizer is given."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from lit_llama.errors import UserError
from lit_llama.model.adapters.low_rank import Adapter, DoRALinear, LoRAEmbedding, LoRALinear, LoRAOnQuantized
from lit_llama.model.adapters.rows import whole
from lit_llama.model.config import ALL_LINEAR, LINEARS, LoRAConfig, matches_pattern
from lit_llama.model.patterns import matches_whole
from lit_llama.model.quantize import QuantizedLinear
from lit_llama.wording import param, params

MANY = 1000
"""Adapted matrices of a mixture of experts from which on it is said."""


def apply_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freeze `model` and put adapters on the modules that `config` names, in place.

    Returns:
        The full names of the modules with an update of low rank; those trained whole are not among them.

    Raises:
        UserError: A name or pattern means no module that can be adapted, or two things are asked of one module.
    """
    model.requires_grad_(False)
    adapted = _adapted(adaptable(model), config)
    copied = _copied(model, config)
    if both := [name for name in copied if name in adapted]:
        raise UserError(
            f"{param('lora.modules_to_save')} and {param('lora.target_modules')} both name {both[0]}: it is trained "
            "whole or by an "
            "update of low rank, name it once"
        )
    last = sorted({name.rpartition(".")[2] for name in adapted})
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if not any(matches_pattern(name, key) for name in adapted):
                raise UserError(f"{param(f'lora.{option}')}: {key!r} matches no adapted module{_nearest(key, last)}")
    adapt(model, config, adapted, copied)
    return adapted


def adapt(model: nn.Module, config: LoRAConfig, names: Sequence[str], copied: Sequence[str] = ()) -> None:
    """Put updates of low rank on the modules of these names, and whole copies in place of others.

    Raises:
        UserError: A module is of a kind that cannot carry it.
    """
    for name in names:
        _replace(model, name, _update(model.get_submodule(name), name, config))
    for name in copied:
        copy = whole(model.get_submodule(name))
        if copy is None:
            raise UserError(
                f"{param('lora.modules_to_save')}: {name} is no embedding, norm, or linear layer without bias and in "
                "full "
                "precision, of which a copy could be trained; name for example embed_tokens, lm_head or norm"
            )
        _replace(model, name, copy)


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that can carry an update of low rank, by their full names."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) or isinstance(module, QuantizedLinear)
    }


def _update(base: nn.Module, name: str, config: LoRAConfig) -> Adapter:
    rank, scale = config.shape_of(name)
    if isinstance(base, nn.Embedding):
        if config.use_dora:
            raise UserError(
                f"{param('lora.use_dora')}: {name} is an embedding, on which it is not implemented; leave it out of "
                f"{param('lora.target_modules')}, or train it whole with {param('lora.modules_to_save')}"
            )
        return LoRAEmbedding(base, rank, scale)
    assert isinstance(base, nn.Linear | QuantizedLinear)
    if config.use_dora:
        return DoRALinear(base, rank, scale, config.dropout)
    if isinstance(base, QuantizedLinear):
        return LoRAOnQuantized(base, rank, scale, config.dropout)
    return LoRALinear(base, rank, scale, config.dropout)


def _adapted(able: Iterable[str], config: LoRAConfig) -> list[str]:
    """Those of the modules that `target_modules` names, each of whose names or its pattern has to mean one."""
    able = list(able)
    if config.pattern is not None:
        if found := [name for name in able if matches_whole(config.pattern, name)]:
            return found
        raise UserError(
            f"{param('lora.target_modules')}: the regular expression {config.pattern!r} matches no linear layer or "
            "embedding of "
            f"the model; it is for whole names such as {next(name for name in able if 'layers' in name)}, so begin it "
            "with .* where any beginning will do"
        )
    named = [] if config.target_modules in ALL_LINEAR else config.targets
    word = next((target for target in named if target in ALL_LINEAR), None)
    for target in named:
        if target != word and not any(_matches(name, target) for name in able):
            near = _nearest(target, sorted({name.rpartition(".")[2] for name in able}))
            raise UserError(
                f"{param('lora.target_modules')}: {target!r} matches no linear layer or embedding of the model{near}"
            )
    if word is not None:
        raise _beside(word, able, config)
    return [name for name in able if any(_matches(name, target) for target in config.targets)]


def _beside(word: str, able: list[str], config: LoRAConfig) -> UserError:
    """Build the error for names beside the word that stands for every linear layer of the decoder."""
    linears = list(dict.fromkeys(short for name in able if (short := name.rpartition(".")[2]) in LINEARS))
    others = [target for target in config.targets if target not in ALL_LINEAR]
    beyond = [target for target in others if target.rpartition(".")[2] not in linears]
    shown = ",".join(config.targets)
    if not beyond:
        return UserError(
            f"is {shown}, but {word} stands for {', '.join(others)}, too",
            parameter="lora.target_modules",
            remedy=f"give {param('lora.target_modules', word)} alone",
        )
    whole = ",".join([*config.saved, *beyond])
    return UserError(
        f"is {shown}, but {word} stands alone, for the linear layers of the decoder",
        parameter="lora.target_modules",
        remedy=f"name all of them, {param('lora.target_modules', ','.join([*linears, *beyond]))}, or have "
        f"{', '.join(beyond)} train whole, {params(**{'lora.target_modules': word, 'lora.modules_to_save': whole})}",
    )


def _copied(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Modules whose names end in one of `modules_to_save`, as PEFT decides it: `norm` is every norm."""
    names = [name for name, module in model.named_modules() if name and type(module) is not nn.Identity]
    for wanted in config.saved:
        if not any(name.endswith(wanted) for name in names):
            near = _nearest(wanted, sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(f"{param('lora.modules_to_save')}: {wanted!r} matches no module of the model{near}")
    return [name for name in names if name.endswith(tuple(config.saved))]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _nearest(name: str, known: Sequence[str]) -> str:
    """What was probably meant: the letters, not their case, decide, and the first of them most."""
    word = name.rpartition(".")[2].lower()
    alike = [other for other in known if other.lower()[:1] == word[:1]]
    close = difflib.get_close_matches(word, alike, n=1) or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield the adapted modules with their full names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))


def many(model: nn.Module) -> str:
    """Say that a model has so many adapters that they are what takes time, and what to do; "" if it has not."""
    names = [name for name, _ in adapters(model)]
    of_experts = sum(".experts." in name for name in names)
    if len(names) <= MANY or not of_experts:
        return ""
    attention = param("lora.target_modules", "q_proj,k_proj,v_proj,o_proj")
    return (
        f"{len(names):,} matrices are adapted, {of_experts:,} of them of experts, each with few tokens to learn by and "
        f"products of its own: {attention} adapts attention alone"
    )


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return all that adapters train."""
    return [parameter for _, module in adapters(model) for parameter in module.parts().values()]


def parameter_groups(
    model: nn.Module, loraplus_lr_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Group the parameters that adapters train for an optimizer.

    B learns faster than A by a ratio (LoRA+, Hayou et al. 2024, arXiv:2402.12354). Both factors of an embedding, whose
    A takes the part that B has elsewhere, and whole copies learn as A does. Vectors (norms, DoRA's magnitudes) do not
    decay.

    Returns:
        Groups that are not empty, with their `params`, `weight_decay`, and `lr_ratio`: by how much the learning rate of
        the schedule is multiplied.
    """
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for _, module in adapters(model):
        for stored, parameter in module.parts().items():
            ratio = loraplus_lr_ratio if stored == "lora_B.weight" else 1.0
            kinds.setdefault((ratio, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr_ratio": ratio, "weight_decay": decay} for (ratio, decay), parameters in kinds.items()
    ]
