"""Kill runs of finetune/lora.py with SIGKILL, let them go on, and compare them with one that was left alone.

python tests/killed_runs.py CHECKPOINT DATA FOLDER SEED

Each run is a fork of this process, which has imported everything already. stdout gets a JSON object: `calls` that
change files in a run, how many runs were `killed`, and what went `wrong`.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forks import become, ended, import_all
from small_runs import flags_of, outcome

from lit_llama.train.state import STATES_DIR, find_states, is_whole

CALLS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}


def count_calls(out: Path, act: Callable[[int], None]) -> None:
    """Call `act` with 1, 2, 3 ... before each call of this process that changes or syncs something in `out`."""
    number = 0

    def next_call() -> None:
        nonlocal number
        number += 1
        act(number)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS and str(arguments[0]).startswith(str(out)):
            reads = event == "open" and arguments[1] in (None, "r", "rb")
            if not reads:
                next_call()

    fsync = os.fsync
    os.fsync = lambda file: (next_call(), fsync(file))[1]
    sys.addaudithook(hook)


def start(out: Path, flags: list[object], act: Callable[[int], None]) -> int:
    """Run the door in a fork; gives its process id."""
    if pid := os.fork():
        return pid
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count_calls(out, act)
    become("finetune/lora.py", flags)


def main(checkpoint: Path, data: Path, folder: Path, seed: int) -> dict[str, Any]:
    draw, killed, wrong = random.Random(seed), 0, []
    straight, calls = folder / "straight", folder / "calls"
    flags = [*flags_of(checkpoint, data, straight), "--train.save_interval", 2]
    first = [*flags_of(checkpoint, data, folder / "first"), "--train.save_interval", 2]
    assert ended(start(folder / "first", first, lambda number: None)) == 0  # later ones know what its plan found out
    begun = time.monotonic()
    assert ended(start(straight, flags, lambda number: calls.write_text(str(number)) and None)) == 0
    seconds, total = time.monotonic() - begun, int(calls.read_text())
    expected = outcome(straight)
    for attempt in range(3):
        out = folder / f"out{attempt}"
        flags = [*flags_of(checkpoint, data, out), "--train.save_interval", 2, "--resume", "auto"]
        for _ in range(2):
            at = draw.randint(1, total) if attempt % 3 else 0  # every third one is killed by the clock
            pid = start(
                out, flags, lambda number, at=at: os.kill(os.getpid(), signal.SIGKILL) if number == at else None
            )
            if not at:
                time.sleep(draw.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
            killed += ended(pid) == -signal.SIGKILL
            wrong += [
                f"{state} at call {at} is not whole" for state in find_states(out / STATES_DIR) if not is_whole(state)
            ]
        if status := ended(start(out, flags, lambda number: None)):
            wrong.append(f"{out}: exit status {status}: {Path(f'{out}.log').read_text()[-500:]}")
        else:
            wrong += [f"{out}: {name} differs" for name, content in outcome(out).items() if content != expected[name]]
        wrong += [f"{path} is left" for path in [*out.rglob(".*"), *folder.glob(".*")]]
    return {"calls": total, "killed": killed, "wrong": wrong}


if __name__ == "__main__":
    torch.set_num_threads(1)
    import_all()
    *paths, number = sys.argv[1:]
    print(json.dumps(main(*map(Path, paths), int(number))))
