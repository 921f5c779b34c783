"""Flags and commands in the place of parameters and calls, as a shell takes them; on the side of the doors."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath

from lit_llama.wording import Wording, word_as, wording

SPELLED = {"data_kind": "as", "n": "num_samples"}
"""Parameters whose flag has another name; files of settings have their own."""

_DOORS = {
    "convert": "prepare/checkpoint.py",
    "add_delta": "prepare/delta.py apply",
    "download": "prepare/download.py",
    "evaluate": "generate/evaluate.py",
    "generate_rows": "generate/rows.py",
    "load": "generate/chat.py",
    "merge": "finetune/merge.py",
    "prepare": "prepare/records.py",
    "text.pipeline.alpaca.prepare_alpaca": "prepare/alpaca.py",
    "show_rows": "prepare/show.py",
}
"""Doors of the functions that texts name; those of `finetune` are called as its methods."""
_FLAGS = {"folder": "checkpoint_dir"}
"""Parameters of these functions whose flag has another name there."""

_ALONE = "lower --max_new_tokens, or hold less: --quantize int8, --kv_cache int8"
_GENERATING = "lower --batch_size or --max_new_tokens, or hold less: --quantize int8, --kv_cache int8"
_PLANS = "; --plan true says what is needed"
_TUNING = "lower --train.micro_batch_tokens, set --train.activation_checkpointing full"
_ROWS = "leave out the search for near duplicates, --near_duplicates 0, or take a machine with more memory"
_REMEDIES = {
    "prepare/alpaca.py": _ROWS,
    "prepare/checkpoint.py": "take smaller files, --max_shard_size 1GB, or a machine with more memory",
    "prepare/delta.py": "take smaller files, --max_shard_size 1GB, or a machine with more memory",
    "prepare/records.py": _ROWS,
    "prepare/show.py": "show fewer rows, --rows 0-2",
    "prepare/text.py": _ROWS,
    "finetune/full.py": f"{_TUNING}, or take finetune/lora.py{_PLANS}",
    "finetune/dpo.py": f"{_TUNING}, or hold the base in 4 bits, --quantize nf4{_PLANS}",
    "finetune/lora.py": f"{_TUNING}, or hold the base in 4 bits, --quantize nf4{_PLANS}",
    "finetune/merge.py": "compare in fewer bits, --precision bf16-true, or take a machine with more memory",
    "generate/base.py": _ALONE + _PLANS,
    "generate/chat.py": _ALONE + _PLANS,
    "generate/evaluate.py": _GENERATING + _PLANS,
    "generate/instruct.py": _GENERATING + _PLANS,
    "generate/rows.py": "lower --batch_size, or hold less: --quantize int8, --kv_cache int8" + _PLANS,
    "generate/serve.py": "lower --batch_size, or hold less: --quantize int8, --kv_cache int8" + _PLANS,
}
"""What takes less memory, door by door."""

_SCRIPT = re.compile(r"(?<![\w./-])(?:python )?(prepare|finetune|generate)/([a-z]+)\.py\b")


@dataclass(frozen=True)
class Commands(Wording):
    """Names as a user of the command line types them.

    Args:
        installed: Call doors as `lit-llama prepare records`, in place of scripts.
    """

    installed: bool = False

    def param(self, name: str, *value: object) -> str:
        """Name a flag, alone or with its value."""
        flag = f"--{SPELLED.get(name, name)}"
        return f"{flag} {_word(value[0])}" if value else flag

    def call(self, function: str, arguments: Mapping[str, object]) -> str:
        """Name the door of a function, alone or as a command."""
        given = dict(arguments)
        python = "" if given.pop("inline", False) else "python "
        if function == "finetune":
            door = f"finetune/{given.pop('method', 'lora')}.py"
        elif function == "load" and given.pop("raw", False):
            door = "generate/base.py"
        elif function == "prepare" and "documents" in given:
            door = "prepare/text.py"
            del given["documents"]
        else:
            door = _DOORS[function]
        flags = self.params({_FLAGS.get(name, name): value for name, value in given.items()})
        return self.typed(f"{python}{door} {flags}" if flags else door)

    def params(self, values: Mapping[str, object]) -> str:
        """Name several flags with their values, as they stand on a command line."""
        return " ".join(self.param(name, value) for name, value in values.items())

    def typed(self, text: str) -> str:
        """Return a text of our own in which scripts are named as the user has called this one."""
        return _SCRIPT.sub(r"lit-llama \1 \2", text) if self.installed else text


def call_as_command() -> None:
    """Name doors as `lit-llama prepare records` from here on, in place of scripts."""
    word_as(Commands(installed=True))


def spoken() -> Commands:
    """Return the wording of this door, as it was called."""
    now = wording()
    return now if isinstance(now, Commands) else Commands()


def remedy(door: str) -> str:
    """Advise what to lower at a door, such as finetune/lora.py, where memory ran out."""
    return spoken().typed(_REMEDIES.get(door, "close other programs, or take a machine with more memory"))


def _word(value: object) -> str:
    """A value as it stands on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(_word, value))
    if isinstance(value, Mapping):
        return shlex.quote(",".join(f"{name}={inner}" for name, inner in value.items()))
    return shlex.quote(fspath(value) if isinstance(value, PathLike) else str(value))
