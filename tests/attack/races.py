"""Two commands begin on one destination at once: one does the work, the other is refused in one line."""

import random
import time

from forks import ended
from world import Result, World, straight


def attack(world: World, trials: int, seed: int) -> Result:
    """Begin each command twice, the second a moment after the first."""
    draw, result, log = random.Random(seed), Result("races"), world.home / "log"
    known = {command.name: straight(command, log)[0] for command in world.commands}
    logs = [log.with_name(f"log{number}") for number in range(2)]
    while result.trials < trials:
        command = world.commands[result.trials % len(world.commands)]
        first = command.start(log=logs[0])
        time.sleep(draw.choice((0, 0, draw.uniform(0, 0.3))))
        second = command.start(log=logs[1])
        statuses = [ended(first), ended(second)]
        result.trials += 1
        said = [path.read_text() for path in logs]
        if sorted(statuses) == [0, 75]:
            result.count("the second was refused, status 75")
            refusal = said[statuses.index(75)].splitlines()
            if sum("another run is at work" in line for line in refusal) != 1:
                result.wrong.append(f"{command.name}: {refusal}")
        elif sorted(statuses) in ([0, 2], [0, 0]) and (0 in command.again or 2 in statuses):
            result.count("one after the other")
        else:
            result.wrong.append(f"{command.name}: statuses {statuses}: {said[0][-200:]} | {said[1][-200:]}")
        result.wrong += [f"{command.name}, raced: {fault}" for fault in command.faults(known[command.name], last=True)]
        command.remove()
    return result
