"""What is asked of a run: its settings, the state that it goes on from, and what must not change meanwhile."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.device import Numerics
from lit_llama.errors import UserError
from lit_llama.folder import check_destination
from lit_llama.model.config import Quantization
from lit_llama.train.config import RUN_FILE, LoggerName, TrainConfig
from lit_llama.train.inputs import Inputs
from lit_llama.train.method import Method
from lit_llama.train.processes import Processes
from lit_llama.train.state import STATES_DIR, choose_state, find_states, is_whole

FREE = (
    *("checkpoint_dir", "data_dir", "out_dir", "loggers", "devices", "num_nodes", "strategy", "dtype"),
    *("train.micro_batch_tokens", "train.save_interval", "train.eval_interval", "train.sample_prompts"),
)
"""Settings that a run may go on without: they change no weight, or what rounding does to it (what the paths lead to is
compared by fingerprints)."""


@dataclass(frozen=True)
class Run:
    """What was asked for; see `finetune`."""

    method: Method
    checkpoint_dir: Path
    data_dir: Path
    out_dir: Path
    train: TrainConfig
    quantize: Quantization | None
    seed: int
    arguments: Mapping[str, Any]
    loggers: Sequence[LoggerName]
    processes: Processes

    @property
    def command(self) -> str:
        """Continues this run."""
        return f"python {self.method.door} --config {shlex.quote(str(self.out_dir / RUN_FILE))} --resume auto"

    @property
    def states(self) -> Path:
        """The folder of its states."""
        return self.out_dir / STATES_DIR

    @property
    def is_finished(self) -> bool:
        """Whether its result is there."""
        return (self.out_dir / self.method.marker).exists()

    def check_out_dir(self) -> None:
        """Refuse a folder that the run would spoil: it writes meta.json and more beside what is there.

        Raises:
            UserError: It is a file, or one of those that the run reads.
        """
        check_destination(self.out_dir, self.method.marker, replace=True)
        for flag, folder in (("--checkpoint_dir", self.checkpoint_dir), ("--data_dir", self.data_dir)):
            if self.out_dir.resolve() == folder.resolve():
                raise UserError(f"--out_dir {self.out_dir} is {flag}; name another, nothing is written over")

    def find_state(self, resume: str | Path) -> Path | None:
        """The state to go on from, or the last one of a run that is finished; None to begin.

        Raises:
            UserError: The folder holds a run that is not to be continued, or no such state.
            IntegrityError: The state is damaged.
        """
        states = find_states(self.states)
        if resume != "never":
            if self.is_finished:
                return states[-1] if states and is_whole(states[-1]) else None
            return choose_state(states, resume, self.out_dir, self.command)
        if self.is_finished:
            raise UserError(
                f"{self.out_dir} already holds {self.method.marker}, the end of a run; name another --out_dir"
            )
        if states or (self.out_dir / RUN_FILE).exists():
            raise UserError(
                f"{self.out_dir} already holds a run that has not ended. Continue it: {self.command}; or name another "
                "--out_dir"
            )
        return None

    def identity(self, inputs: Inputs, numerics: Numerics) -> dict[str, Any]:
        """By name, what must not change when the run goes on."""
        read = {f"the {name} (fingerprint)": value for name, value in inputs.identity.items()}
        settings = {f"--{name}": value for name, value in _flat(self.arguments).items() if name not in FREE}
        return read | settings | {"--precision": str(numerics)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names of their flags, such as train.epochs."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
