"""Names of parameters and calls in texts: as Python has them, or as a door types them.

    f"{param('seed')} is -1"                      `seed` is -1              --seed is -1
    param("lora.dropout", 0)                      `lora.dropout=0`          --lora.dropout 0
    call("merge", adapter_dir="out/lora/mine")    `lit_llama.merge(adapter_dir='out/lora/mine')`
                                                  python finetune/merge.py --adapter_dir out/lora/mine

A text is worded while it is made, name by name, and never read again: what it quotes of a row, a path or an answer
stays as it is, whatever it looks like. So no text with names is made when a module is imported.
"""

from collections.abc import Mapping
from os import PathLike, fspath

_OF_DOORS = ("config", "raw", "inline")


class Wording:
    """Names as Python has them, in backticks. A door puts flags and commands in their place, see `word_as`."""

    def param(self, name: str, *value: object) -> str:
        """Name a parameter, such as train.epochs, alone or with its value."""
        return f"`{name}={literal(value[0])}`" if value else f"`{name}`"

    def call(self, function: str, arguments: Mapping[str, object]) -> str:
        """Name a function of lit_llama, such as merge, alone or called."""
        groups: dict[str, object] = {}
        for name, value in arguments.items():
            group, _, inner = name.partition(".")
            groups |= {group: {inner: value}} if inner else {} if name in _OF_DOORS else {name: value}
        given = ["..."] if "config" in arguments else []
        given += [f"{name}={literal(value)}" for name, value in groups.items() if not given or name != "method"]
        return f"`lit_llama.{function}" + (f"({', '.join(given)})`" if given else "`")

    def params(self, values: Mapping[str, object]) -> str:
        """Name several parameters with their values."""
        return ", ".join(self.param(name, value) for name, value in values.items())


_process = {"wording": Wording()}


def word_as(wording: Wording) -> Wording:
    """Have parameters and calls named in another way from here on, in this process; returns how they were before."""
    before, _process["wording"] = _process["wording"], wording
    return before


def wording() -> Wording:
    """Return the wording of this process, which those that work for it take over with `word_as`."""
    return _process["wording"]


def param(name: str, *value: object) -> str:
    """Name a parameter for who has called.

    Args:
        name: As Python has it; in a group of settings as train.epochs.
        value: At most one: that it has, or should have.
    """
    return _process["wording"].param(name, *value)


def params(**values: object) -> str:
    """Name parameters with values that they are to have together."""
    return _process["wording"].params(values)


def call(function: str, **arguments: object) -> str:
    """Name a call that helps, for who has called.

    Args:
        function: Within lit_llama, such as merge.
        arguments: Of the function, those of groups as train.epochs; without any the function is named alone. `config`
            is a file of settings, which stands for all others; `raw` of load tells that no chat is meant, and `inline`
            that a door is named within a sentence.
    """
    return _process["wording"].call(function, arguments)


def literal(value: object) -> str:
    """Return a value as Python spells it; a path as text."""
    if isinstance(value, PathLike):
        return repr(fspath(value))
    if isinstance(value, Mapping):  # of a group of settings, which may have paths
        return f"{{{', '.join(f'{name!r}: {literal(inner)}' for name, inner in value.items())}}}"
    return repr(value)
