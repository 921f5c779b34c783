"""Command line out of typed functions: every parameter a flag, and what a user caused is one line on stderr."""

import contextlib
import dataclasses
import errno
import inspect
import io
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, get_args

from lit_llama import signals
from lit_llama.commands import SPELLED, remedy, spoken
from lit_llama.console import guarded, shown, verbose
from lit_llama.errors import Interrupted, ResourceError, UserError
from lit_llama.flags import gathered, plain
from lit_llama.habits import answer, explain, nearest
from lit_llama.memory import amount, check_addresses, ran_out, wanted
from lit_llama.objects import ObjectError, check_yaml, load_yaml, read_text
from lit_llama.wording import word_as


def CLI(*mains: Callable[..., Any]) -> None:
    """Run a function with the flags of this command line (`--config FILE.yaml` and `--print_config` included).

    Several functions are subcommands by their names.

    Exit status: 0, 2 for usage, 3 data, 4 model or format, 5 resources, 6 integrity, 70 numbers that are not finite,
    75 another process is at work there, 128 + n for signal n. Any other exception is a defect of this program and keeps
    its traceback.
    """
    # Threads of OpenMP wait for each other by spinning, by default for so long that beside other programs most of the
    # time goes there. This is about 20 microseconds; torch, which reads it, is imported later.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ["RUST_BACKTRACE"] = "0"  # of an allocation that fails, it allocates more, and waits for itself for ever
    before, worded = verbose(), word_as(spoken())
    try:
        try:
            signals.unwind()
            _settle()
            _ended(mains)
        finally:
            signals.leave()  # threads may still be ending
    except KeyboardInterrupt:  # another one, in the middle of the last words
        os._exit(128 + signal.SIGINT)
    finally:
        verbose(before)
        word_as(worded)


def _ended(mains: Sequence[Callable[..., Any]]) -> None:
    """Run, and end as `CLI` says."""
    try:
        _run(mains)
    except KeyboardInterrupt:
        _say("Interrupted", 128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, Interrupted):  # which the user wanted
            _say(error, error.exit_status)
        if isinstance(error, OSError) and _reader_is_gone(error):  # as in `... | head`
            _Output(sys.stdout.fileno()).discard()
            sys.exit(0)
        if ran_out(error) and not isinstance(error, ResourceError):  # which says more of it
            _fail(f"out of memory{wanted(error)}; {remedy(_door(mains[0]))}", ResourceError.exit_status)
        if isinstance(error, UserError):
            _fail(error, error.exit_status)
        if isinstance(error, OSError):
            _fail(_system(error), ResourceError.exit_status)
        raise


_GONE = (errno.EPIPE, errno.EIO)
"""Errors of writing to a pipe that nobody reads, and to a terminal that is closed."""


def _reader_is_gone(error: OSError) -> bool:
    """Whether an error is that nobody reads our results any more. A disk that fails has the number of a terminal that
    is closed."""
    if error.errno != errno.EIO:
        return error.errno == errno.EPIPE
    with contextlib.suppress(OSError, ValueError):
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in output.poll(0))
    return False


def _settle() -> None:
    """Have no text act on a terminal, and do without a stderr that is gone."""
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = _stream(_Talk(sys.stderr.fileno()), sys.stderr)  # as of `python -u`, a file without a buffer
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout.flush()
        sys.stdout = _stream(io.BufferedWriter(_Output(sys.stdout.fileno())), sys.stdout)
    if sys.stdout is not None and sys.stderr is not None:
        sys.stdout, sys.stderr = guarded(sys.stdout), guarded(sys.stderr)
    said = sys.unraisablehook
    sys.unraisablehook = lambda found: None if found.exc_type in (KeyboardInterrupt, SystemExit) else said(found)


def _stream(inner: Any, like: TextIO) -> TextIO:
    """A text stream over one of bytes, with the settings of another; one without a buffer keeps nothing back."""
    through = isinstance(inner, _Talk) or bool(getattr(like, "write_through", False))
    lines = isinstance(inner, _Talk) or like.line_buffering
    return io.TextIOWrapper(inner, like.encoding, like.errors, line_buffering=bool(lines), write_through=through)


class _Output(io.RawIOBase):
    """Stdout, whose errors say that it is what cannot be written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if error.errno not in _GONE:
                with contextlib.suppress(OSError):
                    error.filename = f"stdout ({os.readlink(f'/proc/self/fd/{self._descriptor}')})"
                self.discard()  # what is still to be written would fail once more, when Python ends
            raise

    def discard(self) -> None:
        """Let go of all that is written from now on."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._descriptor)


class _Talk(_Output):
    """Stderr, which may go away (`2>&1 | head`, a closed terminal) while the work that is told of goes on."""

    def write(self, data: Any) -> int:
        left = bytes(data)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self.discard()
        return len(data)


def _run(mains: Sequence[Callable[..., Any]]) -> None:
    import jsonargparse

    words = sys.argv[1:]
    if "--help" not in words:
        check_addresses()
    _bound_yaml()
    _check_groups(mains, words)
    door = _door(mains[0])
    called = spoken().typed(door)
    try:
        components = mains[0] if len(mains) == 1 else list(mains)
        jsonargparse.auto_cli(
            components,
            as_positional=False,
            exit_on_error=False,
            allow_abbrev=False,
            prog=None if called == door else called,  # None is the name of the script
            parser_class=_lenient(jsonargparse.ArgumentParser),
        )
    except jsonargparse.ArgumentError as error:
        raise UserError(_about(str(error), mains, words)) from error
    finally:
        sys.stdout.flush()  # here and not at exit, so that a broken pipe is found where it is handled


def _bound_yaml() -> None:
    """Have the parser look at the size and depth of what it reads as YAML, files and values alike, before it does."""
    import jsonargparse
    import yaml

    load = jsonargparse.get_loader("yaml")

    def bounded(text: str) -> Any:
        check_yaml(text)
        return load(text)

    jsonargparse.set_loader("yaml", bounded, (yaml.YAMLError, ObjectError))


def _lenient(parser: type[Any]) -> type[Any]:
    """A parser to which `--plan` alone means `--plan true`, and which takes lists as people and shells write them."""

    class Parser(parser):  # type: ignore[misc]
        def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:
            for action in self._actions:
                if getattr(action, "_typehint", None) is bool:
                    action.nargs, action.const = "?", True
                if (word := SPELLED.get(action.dest)) and f"--{word}" not in action.option_strings:
                    action.option_strings.insert(0, f"--{word}")
                    self._option_string_actions[f"--{word}"] = action
            words = sys.argv[1:] if args is None else args
            try:
                return super().parse_args(gathered(words, self._actions), *more, **kwargs)
            except OverflowError as error:
                raise UserError(f"a value is beyond all numbers that are computed with: {error}") from error

        def format_help(self) -> str:
            return spoken().typed(super().format_help())

    return Parser


_MISSING = "the following arguments are required: "
_UNKNOWN = re.compile(r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '?(?P<key>[-\w.]+)")


def _about(message: str, mains: Sequence[Callable[..., Any]], words: Sequence[str]) -> str:
    """What is wrong with a command line, in one line: flags and keys that are not known are explained."""
    door, known = _door(mains[0]), [name for main in mains for name in _names(main)]
    if message.startswith("unrecognized arguments: "):
        flags = re.findall(r"(?<!\S)--?[A-Za-z][\w.-]*", message.partition(": ")[2])
        return (
            explain(door, flags, known, typed=spoken().typed) if flags else f"{message}; every value follows its flag"
        )
    if message.startswith(_MISSING):
        names = [name.rpartition(".")[2] for name in message.removeprefix(_MISSING).split(", ")]
        return (
            f"{', '.join(f'--{name}' for name in names)} {'are' if names[1:] else 'is'} missing; --help lists all flags"
        )
    if mains[1:] and re.match(r'argument subcommand:|expected "subcommand"', message):
        ways = [main.__name__ for main in mains]
        near = nearest(words[0], ways) if words else None
        first = f", found {words[0]}{f'; did you mean {near}?' if near else ''}" if words else ""
        return f"{spoken().typed(door)}: expected {', '.join(ways[:-1])} or {ways[-1]} as the first word{first}"
    if file := re.search(r"""Parser key "config": File does not exist: '(.*)'""", message):
        return f"--config {file[1]} does not exist (working folder: {os.getcwd()})"
    if found := _UNKNOWN.search(message):
        key = ".".join(part for part in found.group("group", "key") if part)
        for path, settings in _files(words):
            keys = list(_strangers(settings, known, door))
            if key in keys:
                return explain(door, keys, known, path, typed=spoken().typed)
        return explain(door, [key], known, "a --config", typed=spoken().typed)
    return plain(message)


def _door(main: Callable[..., Any]) -> str:
    """The script of a function, such as finetune/lora.py."""
    path = Path(inspect.getsourcefile(inspect.unwrap(main)) or main.__name__)
    return f"{path.parent.name}/{path.name}"


def _files(words: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration files of a command line, with what they hold."""
    for path in _values("--config", words):
        if isinstance(settings := _loaded("--config", path), dict):
            yield path, settings


def _values(flag: str, words: Sequence[str]) -> Iterator[str]:
    """What stands behind a flag."""
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == flag and (value := value if equals else "".join(words[number + 1 : number + 2])):
            yield value


def _loaded(flag: str, path: str) -> Any:
    """What a configuration file holds; the parser finds one that is not there."""
    try:
        return load_yaml(read_text(Path(path)))
    except ObjectError as error:
        raise UserError(f"{flag} {path} {error}") from error
    except (OSError, ValueError):
        return None


def _strangers(settings: Mapping[str, Any], known: Collection[str], door: str, prefix: str = "") -> Iterator[str]:
    """Keys of a configuration file that are no parameter; those of other programs lie in groups, too."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        ours = any(other.startswith(f"{name}.") for other in known)
        theirs = name not in known and answer(door, name) is None
        if isinstance(value, Mapping) and value and (ours or theirs):
            yield from _strangers(value, known, door, f"{name}.")
        elif name not in known:
            yield name


def _check_groups(mains: Sequence[Callable[..., Any]], words: Sequence[str]) -> None:
    """Refuse a value in place of a group of settings, and null for a value: the parser stumbles over both."""
    known = [name for main in mains for name in _names(main)]
    for group in dict.fromkeys(name.partition(".")[0] for name in known if "." in name):
        for path in _values(f"--{group}", words):  # which may be a file of its own
            _loaded(f"--{group}", path)
    needed = {name for main in mains for name, value in _parameters(main) if _needed(value)}
    for path, settings in _files(words):
        if null := next((name for name in _nulls(settings) if name in needed), None):
            raise UserError(f"{null} in {path} is null, expected a value")
        for key, value in settings.items():
            inside = [name for name in known if name.startswith(f"{key}.")]
            if inside and not isinstance(value, Mapping | str):
                raise UserError(
                    f"{key} in {path} is {value!r}, expected settings of its own, such as {inside[0].split('.')[1]}"
                )


def _needed(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is never None, which the parser lets through where a file says null."""
    kind = parameter.annotation
    group = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    return not group and parameter.default is not None and type(None) not in get_args(kind)


def _nulls(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of values that are null, those in groups as train.epochs."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _nulls(value, f"{prefix}{key}.")
        elif value is None:
            yield f"{prefix}{key}"


def _names(function: Callable[..., Any]) -> Iterator[str]:
    """Parameters of a function, and the fields of those that are groups, such as train.epochs."""
    return (name for name, _ in _parameters(function))


def _parameters(function: Callable[..., Any], prefix: str = "") -> Iterator[tuple[str, inspect.Parameter]]:
    for name, parameter in inspect.signature(function).parameters.items():
        yield prefix + name, parameter
        if isinstance(kind := parameter.annotation, type) and dataclasses.is_dataclass(kind):
            yield from _parameters(kind, f"{prefix}{name}.")


def _system(error: OSError) -> str:
    """What the system refused, and where."""
    if error.strerror is None:  # raised by a library
        return str(error)
    places = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    places = places or _open_file(error)
    if error.errno == errno.ENOSPC and not places:
        free = {folder: shutil.disk_usage(folder).free for folder in (os.getcwd(), tempfile.gettempdir())}
        return "a disk is full: " + ", ".join(f"{folder} has {amount(size)} free" for folder, size in free.items())
    return ": ".join([*places[:1], error.strerror]) + (f" ({places[1]})" if places[1:] else "")


def _open_file(error: OSError) -> list[str]:
    """The file that failed where its error does not name one, as those of reading, writing and closing do not: the one
    that was open, or else named, nearest to the failure."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        held = list(frame.f_locals.values())
        held += list(getattr(frame.f_locals.get("self"), "__dict__", {}).values())
        names = [value.name for value in held if isinstance(value, io.IOBase) and hasattr(value, "name")]
        paths = [str(value) for value in held if isinstance(value, Path)]
        if found := [name for name in names if isinstance(name, str)] or paths[-1:]:
            return found[:1]
    return []


def _fail(error: object, status: int) -> None:
    _say(f"error: {error}", status)


_LONGEST = 4000
"""Characters of a message."""


def _say(text: object, status: int) -> None:
    line = re.sub(r"\s*\n\s*", " ", str(text).strip())  # of other programs; blanks may be part of a path
    if len(line) > _LONGEST:  # a value may have any length
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    print(shown(line, sys.stderr), file=sys.stderr)
    sys.exit(status)
