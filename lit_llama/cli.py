"""Turns typed functions into a command: every parameter a flag, and what a user caused is one line on stderr."""

import contextlib
import dataclasses
import errno
import inspect
import io
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lit_llama.console import as_typed, shown, verbose
from lit_llama.errors import Interrupted, ResourceError, UserError
from lit_llama.flags import plain
from lit_llama.habits import answer, explain


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
    _settle()
    before = verbose()
    try:
        _guarded(mains)
    except KeyboardInterrupt:  # another one, in the middle of the last words
        os._exit(128 + signal.SIGINT)
    finally:
        verbose(before)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)  # threads may still be ending


def _guarded(mains: Sequence[Callable[..., Any]]) -> None:
    """Run, and end as `CLI` says."""
    try:
        _run(mains)
    except Interrupted as error:  # which the user wanted
        _say(error, error.exit_status)
    except UserError as error:
        _fail(error, error.exit_status)
    except OSError as error:
        if _reader_is_gone(error):  # as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        _fail(_system(error), ResourceError.exit_status)
    except KeyboardInterrupt:
        _say("Interrupted", 128 + signal.SIGINT)


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
    """Have signals unwind the command, which clears away what is half made, and do without a stderr that is gone."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, _end)
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        encoding, errors = sys.stderr.encoding, sys.stderr.errors
        sys.stderr = io.TextIOWrapper(
            _Talk(sys.stderr.fileno()),  # as of `python -u`, a file without a buffer
            encoding=encoding,
            errors=errors,
            line_buffering=True,
            write_through=True,
        )
    said = sys.unraisablehook
    sys.unraisablehook = lambda found: None if found.exc_type in (KeyboardInterrupt, SystemExit) else said(found)


def _leave(number: int, frame: object) -> None:
    """End at once: nothing has begun yet, or all is done."""
    os._exit(128 + number)


class _Talk(io.RawIOBase):
    """Stderr, which may go away (`2>&1 | head`, a closed terminal) while the work that is told of goes on."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = bytes(data)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            if error.errno not in _GONE:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._descriptor)
        return len(data)


def _end(number: int, frame: Any) -> None:
    """Unwind, which clears away what is half made; the default action of a signal would not.

    While torch is imported, nothing is; and its C++ code drops exceptions that come while it imports NumPy.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch" and frame.f_code.co_name == "<module>":
            os._exit(128 + number)
        frame = frame.f_back
    sys.exit(128 + number)


def _run(mains: Sequence[Callable[..., Any]]) -> None:
    import jsonargparse

    words = sys.argv[1:]
    _check_groups(mains, words)
    door = _door(mains[0])
    called = as_typed(door)
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


def _lenient(parser: type[Any]) -> type[Any]:
    """A parser to which `--plan` alone means `--plan true`, and which takes lists as people and shells write them."""

    class Parser(parser):  # type: ignore[misc]
        def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:
            for action in self._actions:
                if getattr(action, "_typehint", None) is bool:
                    action.nargs, action.const = "?", True
            words = sys.argv[1:] if args is None else args
            return super().parse_args(_gathered(words, self._actions), *more, **kwargs)

        def format_help(self) -> str:
            return as_typed(super().format_help())

    return Parser


_Held = Literal["text or texts", "texts", "numbers", "pairs", "literal texts"]


def _held(kind: Any) -> _Held | None:
    """What a parameter of this type holds several of.

    In a Sequence[str] every word is a text as it stands; in a list[str], [a,b] is two.
    """
    if get_origin(kind) is Sequence:
        return "literal texts"
    if get_origin(kind) is list:
        return "numbers" if get_args(kind)[0] in (int, float) else "texts"
    if get_origin(kind) is dict:
        return "pairs"
    inside: _Held | None = next(filter(None, map(_held, get_args(kind))), None)
    if inside == "texts" and str in get_args(kind):
        return "text or texts"
    return inside


def _gathered(words: Sequence[str], actions: Sequence[Any]) -> list[str]:
    """A command line in which all that is said of a list or mapping stands behind one flag, as JSON.

    A shell makes several words of a pattern, and of several equal flags argparse would silently keep the last.
    """
    several = {
        option: held
        for action in actions
        if (held := _held(getattr(action, "_typehint", None)))
        for option in action.option_strings
        if not option.endswith("+")
    }
    given: dict[str, list[str]] = {}
    others: list[str] = []
    into = others
    for word in words:
        option, equals, value = word.partition("=")
        if option in several:
            into = given.setdefault(option, [])
            into += [value] if equals else []
        else:
            into = others if re.match("--?[a-zA-Z]", word) else into
            into.append(word)
    return others + [word for option, values in given.items() for word in _flag(option, values, several[option])]


def _flag(option: str, values: Sequence[str], held: _Held) -> list[str]:
    """The flag with all its values; what is no list, mapping or part of one stays as it is."""
    if held == "literal texts" and values:
        return [f"{option}={json.dumps(values)}"]
    if held == "pairs" and values and all(re.match(r"\w+=", value) for value in values):
        pairs = [part.partition("=") for value in values for part in re.split(r",\s*(?=\w+=)", value)]
        return [f"{option}={json.dumps({name: value for name, _, value in pairs})}"]
    if held == "numbers" and values and values != ["null"]:
        return [f"{option}=[{','.join(value.strip('[]') for value in values)}]"]
    alone = held != "texts" or values[:1] == ["null"] or "".join(values).startswith("[")
    if not values or (len(values) == 1 and alone):
        return [option, *values]
    lists = [value[1:-1].split(",") if re.fullmatch(r"\[.*\]", value) else [value] for value in values]
    return [f"{option}={json.dumps([*chain.from_iterable(lists)])}"]


_UNKNOWN = re.compile(r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '?(?P<key>[-\w.]+)")


def _about(message: str, mains: Sequence[Callable[..., Any]], words: Sequence[str]) -> str:
    """What is wrong with a command line, in one line: flags and keys that are not known are explained."""
    door, known = _door(mains[0]), [name for main in mains for name in _names(main)]
    if message.startswith("unrecognized arguments: "):
        flags = re.findall(r"(?<!\S)--?[A-Za-z][\w.-]*", message.partition(": ")[2])
        return explain(door, flags, known) if flags else f"{message}; every value follows its flag"
    if found := _UNKNOWN.search(message):
        key = ".".join(part for part in found.group("group", "key") if part)
        for path, settings in _files(words):
            keys = list(_strangers(settings, known, door))
            if key in keys:
                return explain(door, keys, known, path)
        return explain(door, [key], known, "a --config")
    return plain(message)


def _door(main: Callable[..., Any]) -> str:
    """The script of a function, such as finetune/lora.py."""
    path = Path(inspect.getsourcefile(inspect.unwrap(main)) or main.__name__)
    return f"{path.parent.name}/{path.name}"


def _files(words: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration files of a command line that can be read, with what they hold."""
    import yaml

    for number, word in enumerate(words):
        option, equals, path = word.partition("=")
        if option == "--config" and (path := path if equals else "".join(words[number + 1 : number + 2])):
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
                settings = yaml.safe_load(Path(path).read_text("utf-8"))
                if isinstance(settings, dict):
                    yield path, settings


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
    """Refuse a value in place of a group of settings, over which the parser stumbles."""
    known = [name for main in mains for name in _names(main)]
    for path, settings in _files(words):
        for key, value in settings.items():
            inside = [name for name in known if name.startswith(f"{key}.")]
            if inside and not isinstance(value, Mapping | str):
                raise UserError(
                    f"{key} in {path} is {value!r}, expected settings of its own, such as {inside[0].split('.')[1]}"
                )


def _names(function: Callable[..., Any], prefix: str = "") -> Iterator[str]:
    """Parameters of a function, and the fields of those that are groups, such as train.epochs."""
    for name, parameter in inspect.signature(function).parameters.items():
        yield prefix + name
        if isinstance(kind := parameter.annotation, type) and dataclasses.is_dataclass(kind):
            yield from _names(kind, f"{prefix}{name}.")


def _system(error: OSError) -> str:
    """What the system refused, and where."""
    if error.strerror is None:  # raised by a library
        return str(error)
    places = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if error.errno == errno.ENOSPC and not places:
        free = {folder: shutil.disk_usage(folder).free for folder in (os.getcwd(), tempfile.gettempdir())}
        return "a disk is full: " + ", ".join(f"{folder} has {size:,} bytes free" for folder, size in free.items())
    return ": ".join([*places[:1], error.strerror]) + (f" ({places[1]})" if places[1:] else "")


def _fail(error: object, status: int) -> None:
    _say(f"error: {error}", status)


def _say(text: object, status: int) -> None:
    line = re.sub(r"\s*\n\s*", " ", as_typed(str(text)).strip())  # of other programs; blanks may be part of a path
    print(shown(line, sys.stderr), file=sys.stderr)
    sys.exit(status)


def _begin() -> None:
    """End a script quietly if Ctrl-C comes while it is still importing what it needs."""
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if script.parent.name in ("prepare", "finetune", "generate") and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _leave)


_begin()  # the one thing that an import does: from here on until `CLI`, nothing else could
