"""Errors that a user can cause, each kind with its own exit status.

A door prints these as one line without a traceback; any other exception is our own defect and keeps its traceback.
Their messages name parameters and calls as Python has them, and as flags and commands within a door (`wording`).
"""

from lit_llama.wording import param

_LONGEST = 200
"""Characters of a value that are shown."""


class UserError(ValueError):
    """Wrong use of a parameter or value. The message says what, where, found against expected, and the way out.

    Args:
        message: What is wrong. With a parameter it goes on from that: "`out_dir='out'` " + "is a file". Left out, it is
            made of what is expected: "`seed` is -1, expected 0 or more".
        parameter: The parameter at fault, as Python has it, such as train.epochs; it opens the text.
        value: Its value, None to leave it out.
        expected: Values that it may have, in words.
        remedy: The way out; it ends the text.
    """

    exit_status = 2

    def __init__(
        self,
        message: str = "",
        *,
        parameter: str | None = None,
        value: object = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        if parameter is not None and message:
            message = f"{param(parameter) if value is None else param(parameter, value)} {message}"
        elif parameter is not None:
            found = repr(value) if isinstance(value, str) else str(value)
            found = found if len(found) <= _LONGEST else f"{found[: _LONGEST - 3]}..."
            message = f"{param(parameter)} is {found}, expected {expected}"
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.parameter, self.value, self.expected, self.remedy = parameter, value, expected, remedy


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that generators of random numbers do not take."""
    if not 0 <= seed < 2**64:
        raise UserError(parameter="seed", value=seed, expected=f"0 to {2**64 - 1}")


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
