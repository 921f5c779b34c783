"""A contender: a process of its own that does one task at a time, a line of JSON in and a line out.

Between tasks it waits for its next line and computes nothing, so that rounds can be interleaved. What libraries print
is no answer: from the import of this module on it goes to stderr.
"""

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

Result = dict[str, Any]
_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def peak_memory() -> int:
    """Most bytes that this process held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(tasks: Mapping[str, Callable[..., Result]]) -> None:
    """Do tasks until the input ends.

    Args:
        tasks: By their names; each takes the other fields of its line and returns what goes into the answer.
    """
    print(json.dumps({"ready": sorted(tasks)}), file=_ANSWERS, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            made = tasks[asked.pop("task")](**asked)
        except Exception as error:
            made = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(made | {"peak": peak_memory()}), file=_ANSWERS, flush=True)
