"""Turns a typed function into a command: every parameter a flag, and what a user caused is one line on stderr."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def CLI(main: Callable[..., Any]) -> None:
    """Run `main` with the flags of this command line (`--config FILE.yaml` and `--print_config` included).

    Exit status: 0, 2 for usage, 3 data, 4 model or format, 5 resources, 6 integrity, 70 numbers that are not finite,
    128 + n for signal n. Any other exception is a defect of this program and keeps its traceback.
    """
    import jsonargparse

    from lit_llama.errors import ResourceError, UserError

    try:
        jsonargparse.auto_cli(main, as_positional=False, exit_on_error=False, allow_abbrev=False)
    except (UserError, jsonargparse.ArgumentError) as error:
        _fail(error, getattr(error, "exit_status", UserError.exit_status))
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(error, ResourceError.exit_status)
    except KeyboardInterrupt:
        _fail("interrupted", 128 + signal.SIGINT)


def _fail(error: object, status: int) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
