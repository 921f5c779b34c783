"""Flags of sampling and of loading: typed once in `Sampling` and `Loading`, and given to every door that generates."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from lit_llama.errors import UserError
from lit_llama.flags import config_flags, entries, expanded
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.loading import Loading

EXAMPLE_PROMPT = "What food do llamas eat?"
DRAWING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""What decides how a token is drawn, and what each is where a folder names another of them: nothing narrowed."""
_FOLDERS = (*DRAWING, "repetition_penalty", "stop")
"""Flags in place of which a folder may speak: left out, they are None."""
_FLAGS = (
    "max_new_tokens",
    "min_new_tokens",
    *DRAWING,
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "seed",
)
_SAMPLES = "num_samples"


@dataclass(frozen=True)
class FolderSampling:
    """Sampling that a model's publisher recommends.

    Attributes:
        source: The file that says it.
        values: Fields of `Sampling`.
        ignored: What the file asks for and nobody here does, for people.
    """

    source: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] = ()


@dataclass(frozen=True)
class Asked:
    """Sampling that the flags of a door ask for.

    Args:
        given: Fields of `Sampling` that were set by a flag.
        default: What holds where neither a flag nor the folder says anything.

    Raises:
        UserError: A value is out of its range; found before anything is loaded.
    """

    given: Mapping[str, Any]
    default: Sampling

    def __post_init__(self) -> None:
        replace(self.default, **self.given)

    def alone(self) -> Sampling:
        """Return the sampling of flags, then of the door, whatever a folder says: several models are asked alike."""
        return replace(self.default, **self.given)

    def over(self, folder: FolderSampling) -> Sampling:
        """Return the sampling of flags first, then of the folder, then of the door; what the folder decides is said.

        Raises:
            UserError: Several answers are wanted that would all be the same.
        """
        from lit_llama.progress import stderr

        drawing = {key: value for key, value in folder.values.items() if key in DRAWING}
        values = {**(DRAWING if drawing else {}), **folder.values}
        chosen = {key: value for key, value in values.items() if key not in self.given}
        sampling = replace(self.default, **chosen, **self.given)
        idle = [key for key in DRAWING if key != "temperature" and sampling.greedy]
        if told := [f"{key} {_shown(chosen[key])}" for key in folder.values if key in chosen and key not in idle]:
            stderr().print(f"{folder.source} decides: {', '.join(told)}; flags come first")
        if folder.ignored:
            stderr().print(f"{folder.source} asks for what is not done here: {', '.join(folder.ignored)}")
        if sampling.greedy and sampling.n > 1:
            raise UserError(
                f"--{_SAMPLES} is {sampling.n}, but without chance all answers are the same: add --temperature 0.8"
            )
        if sampling.temperature == 0 and (useless := [f"--{key}" for key in idle if key in self.given]):
            stderr().print(f"{', '.join(useless)}: without effect at temperature 0, which takes the most likely token")
        if r"\n" in "".join(sampling.stop):
            stderr().print(r"--stop holds a backslash and an n; the end of a line is $'\n' in most shells")
        return sampling


def sampling_flags(
    *, samples: bool = True, folders: bool = True, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function the flags of sampling at the place of its parameter `sampling`, which is an `Asked`.

    Args:
        samples: Whether it may be asked for several answers.
        folders: Whether a folder may speak in place of a flag.
        defaults: Fields of `Sampling` where they are other than there.
    """
    default = Sampling(**defaults)

    def asked(values: Mapping[str, Any]) -> Asked:
        given = {_FIELDS.get(name, name): value for name, value in values.items() if value is not None}
        if values["max_new_tokens"] < 1:
            raise UserError(f"--max_new_tokens is {values['max_new_tokens']}, expected 1 or more")
        if values.get(_SAMPLES, 1) < 1:
            raise UserError(f"--{_SAMPLES} is {values[_SAMPLES]}, expected 1 or more")
        return Asked(given, default)

    return expanded("sampling", _flags(default, samples), _help(default, folders), asked)


def loading_flags(*, without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function the flags of loading at the place of its parameter `loading`, which is a `Loading`.

    Args:
        without: Fields of `Loading` that it does not offer.
    """
    return config_flags("loading", Loading, without=(*without, "packed"))


_FIELDS = {_SAMPLES: "n"}


def _flags(default: Sampling, samples: bool) -> dict[str, inspect.Parameter]:
    kinds = get_type_hints(Sampling) | {_SAMPLES: int}
    found = {}
    for name in (*_FLAGS, *([_SAMPLES] if samples else [])):
        open_ = name in _FOLDERS
        value = None if open_ else getattr(default, _FIELDS.get(name, name))
        kind = kinds[name] | None if open_ else kinds[name]
        found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind)
    return found


def _help(default: Sampling, folders: bool) -> dict[str, str]:
    """A line of help for each flag of sampling."""
    texts = entries(Sampling)
    texts["stop"] = "An answer ends before any of these texts."
    texts[_SAMPLES] = "Answers to each prompt, drawn apart."
    first = "what generation_config.json says, else " if folders else ""
    for name in _FOLDERS:
        texts[name] += f" Left out: {first}{_shown(getattr(default, name)) or 'none'}."
    return texts


def _shown(value: Any) -> str:
    if isinstance(value, str | int | float):
        return repr(value) if isinstance(value, str) else f"{value:g}"
    return ", ".join(map(repr, sorted(value) if isinstance(value, frozenset) else value))
