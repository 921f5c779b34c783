"""Attack what the commands write, and print a table of what came of it; the status is 1 where anything went wrong.

PYTHONPATH=.:tests python tests/attack/run.py --kills 500 --flips 500 --swaps 50 --races 100 --terminals 100 --seed 1
PYTHONPATH=.:tests python tests/attack/run.py --fuzz 5000 --seed 1
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import damage
import fuzz
import kills
import known_passes
import races
import terminals
from world import build

from lit_llama.model.operators import kernels

ATTACKS = {
    "kills": kills.attack,
    "flips": damage.flips,
    "swaps": damage.swaps,
    "races": races.attack,
    "terminals": terminals.attack,
    "fuzz": fuzz.attack,
}
"""One line an attack: another file of this folder adds its own."""


def keep_kernels(caches: Path) -> None:
    """Let the commands have caches of their own, with the compiled kernels of this machine."""
    library = kernels.compiled()
    os.environ["XDG_CACHE_HOME"] = str(caches)
    if library is not None:
        (caches / "lit_llama").mkdir(parents=True)
        shutil.copy(library._name, caches / "lit_llama")


def main() -> int:
    asked = argparse.ArgumentParser()
    for name in ATTACKS:
        asked.add_argument(f"--{name}", type=int, default=0)
    asked.add_argument("--seed", type=int, default=1)
    given = asked.parse_args()
    wrong, end = [], known_passes.begin()
    print(f"seed {given.seed}\n| attack | trials | wrong | what came of it |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="attack-") as home:
        keep_kernels(Path(home, "caches"))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
        world = build(Path(home))
        for name, attack in ATTACKS.items():
            if trials := getattr(given, name):
                result = attack(world, trials, given.seed)
                ways = ", ".join(f"{what} {count}" for what, count in sorted(result.counts.items()))
                print(f"| {name} | {result.trials} | {len(result.wrong)} | {ways} |", flush=True)
                wrong += [f"{name}: {line}" for line in result.wrong]
    for line in wrong[:50]:
        print(line.replace(home, "HOME"), file=sys.stderr)
    end()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
