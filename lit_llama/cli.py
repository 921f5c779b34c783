"""Turns typed functions into a command: every parameter a flag, and what a user caused is one line on stderr."""

import dataclasses
import difflib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lit_llama.errors import ResourceError, UserError


def CLI(*mains: Callable[..., Any]) -> None:
    """Run a function with the flags of this command line (`--config FILE.yaml` and `--print_config` included).

    Several functions are subcommands by their names.

    Exit status: 0, 2 for usage, 3 data, 4 model or format, 5 resources, 6 integrity, 70 numbers that are not finite,
    75 another process is at work there, 128 + n for signal n. Any other exception is a defect of this program and keeps
    its traceback.
    """
    # Unwinding clears away what is half made; the default action would not.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _run(mains)
    except UserError as error:
        _fail(error, error.exit_status)
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(error, ResourceError.exit_status)
    except KeyboardInterrupt:
        _fail("interrupted", 128 + signal.SIGINT)


def _run(mains: Sequence[Callable[..., Any]]) -> None:
    import jsonargparse

    try:
        components = mains[0] if len(mains) == 1 else list(mains)
        jsonargparse.auto_cli(
            components,
            as_positional=False,
            exit_on_error=False,
            allow_abbrev=False,
            parser_class=_with_bare_flags(jsonargparse.ArgumentParser),
        )
    except jsonargparse.ArgumentError as error:
        raise UserError(f"{error}{_nearest(str(error), mains)}") from error
    finally:
        sys.stdout.flush()  # here and not at exit, so that a broken pipe is found where it is handled


def _with_bare_flags(parser: type[Any]) -> type[Any]:
    """A parser to which `--plan` alone means `--plan true`, for every parameter that is a bool."""

    class Parser(parser):  # type: ignore[misc]
        def parse_args(self, *args: Any, **kwargs: Any) -> Any:
            for action in self._actions:
                if getattr(action, "_typehint", None) is bool:
                    action.nargs, action.const = "?", True
            return super().parse_args(*args, **kwargs)

    return Parser


_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option|unrecognized arguments:) '?(?P<key>[-\w.]+)"
)


def _nearest(message: str, mains: Sequence[Callable[..., Any]]) -> str:
    """The parameter that was probably meant by an unknown key or flag, as an end of the message."""
    if not (found := _UNKNOWN.search(message)):
        return ""
    key = ".".join(part.lstrip("-") for part in found.group("group", "key") if part)
    names = [name for main in mains for name in _names(main)]
    close = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _names(function: Callable[..., Any], prefix: str = "") -> Iterator[str]:
    """Parameters of a function, and the fields of those that are groups, such as train.epochs."""
    for name, parameter in inspect.signature(function).parameters.items():
        yield prefix + name
        if isinstance(kind := parameter.annotation, type) and dataclasses.is_dataclass(kind):
            yield from _names(kind, f"{prefix}{name}.")


def _fail(error: object, status: int) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
