"""A short, seeded part of `make attack`; and its judges, which have to be able to find fault."""

import os
import random
import resource
from pathlib import Path

import pytest
from damage import judge
from forked_groups import in_forks
from fuzz import Target, _Case, _run
from fuzz import judge as fuzz_judge
from world import Command, Result

from lit_llama.errors import CheckpointError, IntegrityError
from lit_llama.objects import read_object

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(1800)  # its commands are limited in seconds of the processor
def test_nothing_is_lost_accepted_or_left_behind() -> None:
    """Catches half results after a kill, damage that nobody notices, two commands on one place, and tracebacks."""
    trials = ["--kills", 7, "--flips", 60, "--swaps", 20, "--races", 5, "--terminals", 6, "--fuzz", 300, "--seed", 3]
    found = in_forks("tests/attack/run.py", *trials)
    assert found.returncode == 0, found.stdout + found.stderr
    table = [line.split(" | ") for line in found.stdout.splitlines()[3:]]
    assert [line[0] for line in table] == ["| kills", "| flips", "| swaps", "| races", "| terminals", "| fuzz"]
    assert all(int(line[1]) >= 5 and line[2] == "0" for line in table)


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (None, "accepted"),
        (IntegrityError("something is damaged"), "something is damaged"),
        (IntegrityError("x/weights is damaged"), None),
        (CheckpointError("a config.json that says nonsense"), None),
        (KeyError("bits"), "KeyError"),
    ],
)
def test_damage_that_is_accepted_or_not_named_counts_as_wrong(error: Exception | None, wrong: str | None) -> None:
    """Catches an attack that cannot fail."""
    result = Result("flips")

    def read() -> None:
        if error:
            raise error

    judge(result, Path("x/weights"), read, "bit 1")
    assert result.trials == 1 and (wrong is None) == (result.wrong == []), result
    assert wrong is None or wrong in result.wrong[0]


def test_whatever_is_no_error_of_ours_counts_as_wrong(tmp_path: Path) -> None:
    """Catches a fuzzer that believes all; a case that ends its process spoils none of the others."""
    (home := tmp_path / "home").mkdir()
    ways = {
        "used": lambda at: None,
        "refused": lambda at: read_object(at / "x", CheckpointError),
        "traceback": lambda at: {}["x"],
        "crash": lambda at: os._exit(9),
        "hang": lambda at: resource.setrlimit(resource.RLIMIT_CPU, (1, 2)) or [None for _ in iter(int, 1)],
    }
    cases = [_Case(0, Target(name, home, [], read), random.Random(1)) for name, read in ways.items()]
    (home / "x").write_text("[]")
    assert [what for what, _ in _run(cases[:4], tmp_path / "case")] == ["used", "refused", "traceback", "crash"]
    assert [what for what, _ in _run(cases[4:], tmp_path / "case")] == ["hang"]
    assert fuzz_judge(CheckpointError(" "))[0] == "silence"


def test_a_result_that_differs_or_leaves_something_behind_counts_as_wrong(tmp_path: Path) -> None:
    """Catches an attack that believes whatever is there."""
    made = tmp_path / "made" / "x.gguf"
    command = Command("gguf", (), made)
    made.parent.mkdir()
    assert command.faults({"x.gguf": b"whole"}, last=False) == []
    made.write_bytes(b"half")
    assert command.faults({"x.gguf": b"whole"}, last=False) == ["the result differs"]
    made.write_bytes(b"whole")
    (made.parent / ".x.gguf.partial-00000000").touch()
    assert command.faults({"x.gguf": b"whole"}, last=True) == [".x.gguf.partial-00000000 is left"]
