"""SIGKILL ahead of any call that changes a file: the next run of the same command gives the same bytes."""

import os
import random
import signal

from world import Act, Result, World, straight


def attack(world: World, trials: int, seed: int) -> Result:
    """Kill each command in turn, once or twice, and let it go on."""
    draw, result, log = random.Random(seed), Result("kills"), world.home / "log"
    known = {command.name: straight(command, log) for command in world.commands}
    while result.trials < trials:
        command = world.commands[result.trials % len(world.commands)]
        wanted, calls = known[command.name]
        kills = draw.choice((1, 1, 2))
        for _ in range(kills):
            at = draw.randint(1, calls)
            status = command.run(log, _killer(at))
            result.trials += 1
            result.count("killed" if status == -signal.SIGKILL else "ended before")
            if status not in (-signal.SIGKILL, 0, *command.again):
                result.wrong.append(f"{command.name} before call {at}: status {status}: {log.read_text()[-300:]}")
            result.wrong += [
                f"{command.name} killed at call {at}: {fault}" for fault in command.faults(wanted, last=False)
            ]
        if (status := command.run(log)) not in (0, *command.again):
            result.wrong.append(f"{command.name} after a kill at call {at}: status {status}: {log.read_text()[-300:]}")
        else:
            faults = command.faults(wanted, last=True)
            result.wrong += [f"{command.name} gone on after a kill at call {at}: {fault}" for fault in faults]
            result.count("gone on, same bytes" if not faults else "gone on, other bytes")
        command.remove()
    return result


def _killer(at: int) -> Act:
    """SIGKILL ahead of the call with this number."""
    return lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == at else None
