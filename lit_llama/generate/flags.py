"""Flags of sampling and of loading: typed once in `Sampling` and `Loading`, and given to every door that generates.

How its publisher samples a model stands in the generation_config.json of its folder. Doors name this file, so that
nothing here imports torch before it is used.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lit_llama.device import Precision
from lit_llama.errors import CheckpointError, UserError
from lit_llama.flags import config_flags, entries, expanded
from lit_llama.generate.engine.request import Sampling
from lit_llama.model.config import Held, KVCacheType
from lit_llama.text.config import StyleName
from lit_llama.wording import param


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Settings by which a checkpoint folder, or an adapter folder with its base, is loaded to generate.

    Args:
        base_dir: The base model of an adapter, where it is not found where the adapter says.
        merge_adapter: Make an adapter part of the weights of its base as they are loaded, with the numbers that
            merging writes, in place of keeping it apart.
        prompt_style: Ask in this style instead of the one the folder carries.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained. On a
            CPU, int8 and int4 are the fast ones.
        kv_cache: Hold keys and values in the numbers of activations (auto), or in 8 bits (int8), which take half of the
            memory and a little of the accuracy.
        draft_dir: A smaller checkpoint of the same tokenizer that guesses tokens: the same answers, sooner.
        batch_size: Answers that are made together.
        plan: Say what memory the model needs and whether it fits, and load nothing.
        plan_memory: The same for another amount of memory, such as 16GB, in place of what is free here.
        verify: Hash every file that is read, however large, before the work; small ones always are.
        packed: On a CPU, pack the weights for its instructions, which the model then has no more; False keeps
            `LLM.model`, as for a look into it.

    Raises:
        UserError: No answer is to be made, or keys and values are to be held in a way that is not known.
    """

    base_dir: Path | None = None
    merge_adapter: bool = False
    prompt_style: StyleName | None = None
    precision: Precision = "auto"
    quantize: Held | None = None
    kv_cache: KVCacheType = "auto"
    draft_dir: Path | None = None
    batch_size: int = 32
    plan: bool = False
    plan_memory: str | None = None
    verify: bool = False
    packed: bool = True

    def __post_init__(self) -> None:
        for name in ("base_dir", "draft_dir"):
            if (place := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(place))
        if self.kv_cache not in get_args(KVCacheType):
            raise UserError(parameter="kv_cache", value=self.kv_cache, expected=" or ".join(get_args(KVCacheType)))
        if self.batch_size < 1:
            raise UserError(parameter="batch_size", value=self.batch_size, expected="1 or more")

    @property
    def only_planned(self) -> bool:
        """Whether nothing is to be loaded."""
        return self.plan or self.plan_memory is not None


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
_SAMPLES = "num_samples"  # the flag of `n`


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
                f"{param('n')} is {sampling.n}, but without chance all answers are the same: add "
                f"{param('temperature', 0.8)}"
            )
        if sampling.temperature == 0 and (useless := [param(key) for key in idle if key in self.given]):
            stderr().print(f"{', '.join(useless)}: without effect at temperature 0, which takes the most likely token")
        if r"\n" in "".join(sampling.stop):
            stderr().print(f"{param('stop')} holds a backslash and an n; the end of a line is $'\\n' in most shells")
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
            raise UserError(parameter="max_new_tokens", value=values["max_new_tokens"], expected="1 or more")
        if values.get(_SAMPLES, 1) < 1:
            raise UserError(parameter="n", value=values[_SAMPLES], expected="1 or more")
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


_GENERATION_FILE = "generation_config.json"
_NAMES = {
    **{name: name for name in DRAWING},
    "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "suppress_tokens": "banned_ids",
}
_NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "typical_p": 1,
    "top_h": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "sequence_bias": {},
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}
"""Settings that change an answer and are not done here, each with the value that changes nothing."""


def folder_sampling(*folders: Path) -> FolderSampling:
    """Read the sampling in the generation_config.json of the first of these folders that holds one.

    As in transformers, `do_sample: false` is greedy whatever stands beside it. Where it is left out, a temperature,
    top_k, top_p or min_p is meant to be used, as vLLM has it. Lengths are the business of who asks.

    Raises:
        CheckpointError: The file is no JSON object, or a value is out of its range.
    """
    from lit_llama.text.tokenizer.special import read_object

    path = next((folder / _GENERATION_FILE for folder in folders if (folder / _GENERATION_FILE).is_file()), None)
    if path is None:
        return FolderSampling()
    config = {key: value for key, value in read_object(path).items() if value is not None}
    values: dict[str, Any] = {ours: config[key] for key, ours in _NAMES.items() if key in config}
    if config.get("do_sample") is False:
        values = {key: value for key, value in values.items() if key not in DRAWING} | {"temperature": 0.0}
    elif config.get("do_sample") is True:
        values.setdefault("temperature", DRAWING["temperature"])
    values = {key: value for key, value in values.items() if _changes(key, value)}
    for key, value in values.items():
        try:
            Sampling(**{key: value})
        except (UserError, TypeError) as error:
            name = next(theirs for theirs, ours in _NAMES.items() if ours == key)
            raise CheckpointError(f"{path}: {name} is {value!r}: {error}; mend the file, or delete it") from error
    ignored = [f"{key} {config[key]}" for key, neutral in _NEUTRAL.items() if key in config and config[key] != neutral]
    return FolderSampling(str(path), values, ignored)


def _changes(key: str, value: Any) -> bool:
    """Whether a setting says anything; a repetition penalty of 1 and an empty list of stop strings do not."""
    return not (key == "repetition_penalty" and value == 1) and value != []
