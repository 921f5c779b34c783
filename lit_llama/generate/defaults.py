"""generation_config.json of a model folder: how its publisher samples it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.flags import DRAWING, FolderSampling
from lit_llama.text.tokenizer.special import read_object

FILE = "generation_config.json"
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
    path = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
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
