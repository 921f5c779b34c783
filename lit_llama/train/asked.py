"""Request for a run: its settings, the state that it goes on from, and what must not change meanwhile."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_llama.device import Numerics
from lit_llama.errors import IntegrityError, UserError
from lit_llama.folder.publish import check_destination
from lit_llama.objects import read_object
from lit_llama.progress import stderr
from lit_llama.text.dataset.folder import META_FILE
from lit_llama.train.config import RUN_FILE, RunConfig, TrainConfig
from lit_llama.train.distributed.processes import Processes
from lit_llama.train.inputs import Inputs
from lit_llama.train.methods.method import Method
from lit_llama.train.optim import learning_rate
from lit_llama.train.state import (
    SETTING,
    STATES_DIR,
    check_same,
    choose_state,
    find_states,
    is_whole,
    read_record,
    step_of,
)
from lit_llama.train.stopping import Best
from lit_llama.wording import call, param

FREE = (
    *("checkpoint_dir", "adapter_dir", "data_dir", "out_dir", "loggers", "devices", "num_nodes", "strategy", "dtype"),
    *("train.micro_batch_tokens", "train.save_interval", "train.eval_interval", "train.sample_prompts"),
)
"""Settings that a run may go on without: they change no weight, or what rounding does to it (what the paths lead to is
compared by fingerprints)."""
LENGTH = ("epochs", "max_steps", "patience")
"""Of train: how long a run is. It may be made longer, and its learning rate then follows the longer schedule."""


@dataclass(frozen=True)
class Run:
    """A run as it goes on: the configuration, fitted to the data and the machine, and what was asked for.

    Args:
        method: Which weights train, and how they are written.
        config: Settings that hold.
        arguments: Settings as they were given, which run.yaml keeps; but for the learning rate auto, see `with_rate`.
        processes: Those that share the work.
    """

    method: Method
    config: RunConfig
    arguments: Mapping[str, Any]
    processes: Processes

    @property
    def out_dir(self) -> Path:
        """Folder of the result."""
        return self.config.out_dir

    @property
    def train(self) -> TrainConfig:
        """Course of the training."""
        return self.config.train

    def with_train(self, train: TrainConfig) -> "Run":
        """Return the run with another course of the training."""
        return replace(self, config=replace(self.config, train=train))

    def with_rate(self, rate: float) -> "Run":
        """Return the run with a number in the place of the learning rate auto, in run.yaml and the states as well."""
        asked = dict(self.arguments["train"]) | {"learning_rate": rate}
        return replace(
            self.with_train(replace(self.train, learning_rate=rate)), arguments=dict(self.arguments) | {"train": asked}
        )

    @property
    def command(self) -> str:
        """Call that continues this run."""
        return self.continued("auto")

    def continued(self, state: str | Path, **settings: object) -> str:
        """Call that continues this run from a state, with other settings."""
        return call("finetune", config=self.out_dir / RUN_FILE, method=self.method.name, resume=state, **settings)

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
            UserError: It is a file, one of those that the run reads, or a folder of another stage.
        """
        for flag, folder in ((param("checkpoint_dir"), self.config.base), (param("data_dir"), self.config.data_dir)):
            if self.out_dir.resolve() == folder.resolve():
                raise UserError(f"{param('out_dir', self.out_dir)} is {flag}; name another, nothing is written over")
        check_destination(self.out_dir, self.method.marker, replace=True)

    def find_state(self, resume: str | Path) -> Path | None:
        """Find the state to go on from; None to begin, and for a run that is finished and has no state any more.

        Raises:
            UserError: The folder holds a run that is not to be continued, or no such state.
            IntegrityError: The state is damaged.
        """
        states = find_states(self.states)
        if resume != "never":
            if self.is_finished and resume == "auto" and not (states and is_whole(states[-1])):
                return None
            return choose_state(states, resume, self.out_dir, self.continued)
        if self.is_finished:
            raise UserError(
                f"{self.out_dir} already holds {self.method.marker}, the end of a run; name another "
                f"{param('out_dir')}, or "
                f"lengthen it: {self.continued('auto', **{'train.epochs': 'MORE'})}"
            )
        if states or (self.out_dir / RUN_FILE).exists():
            raise UserError(
                f"{self.out_dir} already holds a run that has not ended. Continue it: {self.command}; or name another "
                f"{param('out_dir')}"
            )
        return None

    def has_ended(self, state: Path | None, identity: Mapping[str, Any], rows: int) -> bool:
        """Whether nothing is left to do; says how a run that is made longer goes on.

        Args:
            state: Where the run goes on from.
            identity: What must not have changed since.
            rows: Samples of the training split.

        Raises:
            UserError: The state belongs to another run or lies behind the end that is asked for, or a finished run is
                to be lengthened and its states are gone.
        """
        steps = self.train.steps(rows)
        if state is None:
            if self.is_finished and steps > (done := self._recorded_steps(steps)):
                begun = {"method": self.method.name, self.method.starts_with: self.out_dir, "out_dir": "ANOTHER"}
                raise UserError(
                    f"{self.out_dir} is finished after {done} steps, and there is no state in {self.states} to go on "
                    f"from. Begin a run of its own from the result: {call('finetune', **begun)}"
                )
            return self.is_finished and self._say_ended(None)
        record = read_record(state)
        check_same(state, record["identity"], identity, [f"{SETTING}train.{name}" for name in LENGTH])
        before = {name: record["identity"].get(f"{SETTING}train.{name}", getattr(self.train, name)) for name in LENGTH}
        was = replace(self.train, **before)
        if self.is_finished:  # whether that was the end, its last state says, also where an earlier one is named
            newest = find_states(self.states)[-1]
            with suppress(IntegrityError):
                record = record if newest == state else read_record(newest)
            if record["progress"]["step"] == steps or Best.from_state(record["best"]).exhausted(self.train):
                return self._say_ended(record)
        done = record["progress"]["step"]
        if steps < done:
            raise UserError(
                f"{state} has {done} steps behind it, but {param('train.epochs')} {self.train.epochs:g} and "
                f"{param('train.max_steps')} "
                f"{self.train.max_steps} end after {steps}; go on with more"
            )
        if steps != was.steps(rows):
            stderr().print(_new_schedule(self.train, step_of(state), was.steps(rows), steps))
        return False

    def _recorded_steps(self, unknown: int) -> int:
        """Steps of the result, as its meta.json has them."""
        meta = self.out_dir / META_FILE
        steps = read_object(meta, IntegrityError).get("steps", unknown) if meta.is_file() else unknown
        if type(steps) is not int:
            raise IntegrityError(f"{meta}: steps is {steps!r}, expected how many there were")
        return steps

    def _say_ended(self, record: Mapping[str, Any] | None) -> bool:
        waited = record is not None and Best.from_state(record["best"]).exhausted(self.train)
        more = (
            f"a higher {param('train.patience')} goes"
            if waited
            else f"more {param('train.epochs')} or {param('train.max_steps')} go"
        )
        stderr().print(f"{self.out_dir}: the run is finished, there is nothing to do; {more} on from here")
        return True

    def identity(self, inputs: Inputs, numerics: Numerics) -> dict[str, Any]:
        """Return what must not change when the run goes on, by name."""
        read = {f"the {name} (fingerprint)": value for name, value in inputs.identity.items()}
        settings = {f"{SETTING}{name}": value for name, value in _flat(self.arguments).items() if name not in FREE}
        return read | dict(self.method.origin) | settings | {f"{SETTING}precision": str(numerics)}


def _new_schedule(train: TrainConfig, done: int, before: int, steps: int) -> str:
    """What becomes of a run of `before` steps that is to have `steps`."""
    rate = learning_rate(done, steps, train) if done < steps else 0.0
    last = f" after {learning_rate(done - 1, before, train):.2e}" if done else ""
    return (
        f"the run of {before} steps goes on to {steps}: {param('train.schedule', train.schedule)} is that of {steps} "
        "steps "
        f"from here on, with a learning rate of {rate:.2e} in step {done + 1}{last}"
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names of their flags, such as train.epochs."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
