"""What is attacked: a folder of each kind that the commands write, and the commands as processes that begin quickly.

Each process is a fork of this one, which has imported all that the commands need. Its time is limited in seconds of
the processor, so that a busy machine fails no trial.
"""

import functools
import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from delta_files import delta_of, folder_of, state_of
from forks import become, ended, import_all
from killed_runs import count_calls
from small_runs import ROWS, flags_of, outcome

from lit_llama.folder.manifest import check_folder

SECONDS = 120
"""Of the processor, for one command; the slowest takes about three."""
Act = Callable[[int], None]


@dataclass
class Result:
    """What came of an attack.

    Attributes:
        trials: How many there were.
        counts: How many of them ended in which way.
        wrong: Those that ended as none may.
    """

    name: str
    trials: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


@dataclass(frozen=True)
class Command:
    """A command with one destination.

    Args:
        name: For people.
        words: The script and its flags.
        made: The destination, a file or a folder.
        again: Statuses of the same command where the destination is whole already.
        contents: What every run has to give again, bit by bit.
    """

    name: str
    words: tuple[object, ...]
    made: Path
    again: tuple[int, ...] = (0,)
    contents: Callable[[Path], Any] = lambda made: bytes_of(made)

    @property
    def kept(self) -> Path:
        """Copy of what a run gives that nobody disturbs, which `straight` makes."""
        return self.made.parent.parent / f"kept-{self.name}"

    def start(self, act: Act = lambda number: None, log: Path | None = None) -> int:
        """Begin it in a fork that calls `act` at each call that changes a file here; gives its process id."""
        pid = os.fork()
        if not pid:
            self.become(act, log)
        return pid

    def become(self, act: Act, log: Path | None = None) -> NoReturn:
        """Be the command and end with its status."""
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        if log is not None:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
        count_calls(self.made.parent, act)
        script, *flags = map(str, self.words)
        become(script, flags)

    def run(self, log: Path, act: Act = lambda number: None) -> int:
        """Begin it and wait for its end; gives its status."""
        return ended(self.start(act, log))

    def remove(self) -> None:
        """Make the place of the destination as it was."""
        shutil.rmtree(self.made.parent)
        self.made.parent.mkdir()

    def faults(self, wanted: Any, *, last: bool) -> list[str]:
        """What is wrong with the destination: half of a result, or, after the last run, anything else than wanted."""
        whole = (
            self.made.is_file()
            if self.made.suffix
            else any((self.made / name).exists() for name in ("config.json", "meta.json", "adapter_config.json"))
        )
        if "lora" in self.name:
            whole = (self.made / "adapter_config.json").exists()
        found = []
        if whole and self.made.is_dir():
            check_folder(self.made)
        if (whole or last) and self.contents(self.made) != wanted:
            found.append("the result differs")
        if last:
            left = {path.name for path in self.made.parent.rglob(".*")}
            found += [f"{name} is left" for name in sorted(left)]
        return found


def bytes_of(made: Path) -> dict[str, bytes]:
    """All files of a folder, or the one file."""
    paths = [made] if made.is_file() else [path for path in sorted(made.rglob("*")) if path.is_file()]
    return {str(path.relative_to(made.parent)): path.read_bytes() for path in paths}


@dataclass(frozen=True)
class World:
    """Folders that commands read, and the commands that write them.

    Args:
        home: Where all lies; each command has a folder of its own for its destination.
    """

    home: Path
    base: Path
    data: Path
    adapter: Path
    other_adapter: Path
    merged: Path
    other_merged: Path
    converted: Path
    commands: tuple[Command, ...]


def build(home: Path) -> World:
    """Make the world with the commands themselves."""
    torch.set_num_threads(1)
    import_all()
    base = folder_of(home / "base", state_of(0, 384))
    delta = folder_of(home / "difference", delta_of("add"))
    rows, prompts = home / "rows.json", home / "prompts.json"
    rows.write_text(json.dumps([*ROWS, *ROWS[:4]]))
    prompts.write_text(json.dumps([{"instruction": row["instruction"]} for row in ROWS[:6]]))
    log = home / "log"

    def command(name: str, made: str, script: str, *flags: object, **how: Any) -> Command:
        """One whose destination, the value of its last flag, is in a folder of its own."""
        (home / name).mkdir()
        return Command(name, (script, *flags, home / name / made), home / name / made, **how)

    def done(command: Command) -> Path:
        straight(command, log)
        return command.kept

    to = "--destination_path"
    encoded = ("--tokenizer_path", base, "--prompt_style", "alpaca", "--near_duplicates", 0, "--test_split_size", 0.2)
    prepare = command("prepare", "data", "prepare/records.py", "--source", rows, *encoded, to)
    data = done(prepare)
    course = flags_of(base, data, home)
    course = [
        *course[: course.index("--out_dir")],
        *course[course.index("--out_dir") + 2 :],
        "--train.save_interval",
        2,
    ]

    def tune(name: str, *more: object) -> Command:
        flags = (*course, "--train.max_steps", 4, "--resume", "auto", *more, "--out_dir")
        return command(name, "out", "finetune/lora.py", *flags, contents=outcome)

    lora, other = tune("lora"), tune("other-lora", "--seed", 1)
    adapter, other_adapter = done(lora), done(other)

    def merge(name: str, adapter: Path) -> Command:
        return command(name, "model", "finetune/merge.py", "--adapter_dir", adapter, to, again=(2,))

    merged, other_merged = merge("merge", adapter), merge("other-merge", other_adapter)
    widened = ("--source", base, "--dtype", "float32", to)
    convert = command("convert", "model", "prepare/checkpoint.py", *widened, again=(2,))
    packed = ("--adapter_dir", adapter, "--format", "gguf", to)
    gguf = command("gguf", "model.gguf", "finetune/merge.py", *packed, again=(2,))
    summed = ("apply", "--base_dir", base, "--delta_dir", delta, "--policy", "add", "--prompt_style", "alpaca")
    sums = command("delta", "model", "prepare/delta.py", *summed, "--max_shard_size", "60KB", to, again=(2,))
    asked = ("--checkpoint_dir", adapter, "--input_file", prompts, "--max_new_tokens", 4, "--temperature", 0)
    answers = ("--batch_size", 2, "--output_file")
    instruct = command("instruct", "answers.jsonl", "generate/instruct.py", *asked, *answers)
    kept = (done(merged), done(other_merged), done(convert))
    return World(
        home, base, data, adapter, other_adapter, *kept, (prepare, lora, merged, convert, gguf, sums, instruct)
    )


@functools.cache
def straight(command: Command, log: Path) -> tuple[Any, int]:
    """What a run gives that nobody disturbs, and its number of calls that change a file; it is made once for all."""
    calls = log.with_suffix(".calls")
    calls.write_text("0")
    command.remove()
    # By the descriptor: opening a file is a call that is counted where it lies in the folder that is watched.
    status = command.run(log, lambda number: None if number < 1 else _note(calls, number))
    assert status == 0, f"{command.name}: {log.read_text()}"
    wanted = command.contents(command.made)
    if command.made.is_dir():
        shutil.copytree(command.made, command.kept)
    command.remove()
    return wanted, int(calls.read_text())


def _note(path: Path, number: int) -> None:
    path.write_text(str(number))
