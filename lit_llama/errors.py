"""Errors that a user can cause, each kind with its own exit status.

A door prints these as one line without a traceback; any other exception is our own defect and keeps its traceback.
Their messages name parameters as flags; to a caller in Python, who has none, they are worded without.
"""

import re

_PROCESS = {"flags": False}
_COMMAND_OR_FLAG = re.compile(r"(?P<command>(?:python|lit-llama) [^;,()\n]*)|(?<![^\s(])--(?P<name>[a-z]\w*(?:\.\w+)*)")


def name_flags(on: bool = True) -> bool:
    """Have parameters named as flags from here on, as a command does; tells whether they were before."""
    before, _PROCESS["flags"] = _PROCESS["flags"], on
    return before


def worded(text: str) -> str:
    """Return the text for who has called: parameters are flags of a command, or plain names; commands stay so."""
    if _PROCESS["flags"]:
        return text
    return _COMMAND_OR_FLAG.sub(lambda found: found["command"] or found["name"], text)


class UserError(ValueError):
    """Wrong use of a flag or value. The message says what, where, found against expected, and the way out."""

    exit_status = 2

    def __str__(self) -> str:
        return worded(super().__str__())


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that generators of random numbers do not take."""
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed is {seed}, expected 0 to {2**64 - 1}")


class DataError(UserError):
    """Rows or a data folder that cannot be used; the message names file:row:field."""

    exit_status = 3


class CheckpointError(UserError):
    """Weights, configuration, tokenizer or adapter that cannot be used."""

    exit_status = 4


class ResourceError(UserError):
    """Not enough memory, disk, network, or a device that is not there."""

    exit_status = 5


class LockedError(ResourceError):
    """Another process is at work on the same folder; trying again later helps (EX_TEMPFAIL of sysexits.h)."""

    exit_status = 75


class ClusterError(ResourceError):
    """A cluster that is not there, or was lost; running the same command again later may help (EX_UNAVAILABLE)."""

    exit_status = 69


class IntegrityError(UserError):
    """Something is not what its folder says it is."""

    exit_status = 6


class NumericalError(UserError):
    """Values that are not finite, in training or generation, or rows that could not be answered."""

    exit_status = 70


class WeightsNotFiniteError(NumericalError, CheckpointError):
    """A file of weights that holds values that are not finite; the message names tensor and file."""


class Interrupted(UserError):
    """A signal ended the run, and its state is saved.

    Args:
        number: Of the signal; the exit status is 128 more, as a shell has it.
        message: Where the run stands and what continues it.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number
