"""Signals to a run: the state is saved, the way on is said, and a second one ends it at once."""

import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here
from small_runs import DROPOUT, TWELVE, flags_of, outcome, run
from small_runs import twenty_two_rows as twenty_two_rows  # a fixture
from stopped_runs import straight as straight  # a fixture

from lit_llama.train.logs.metrics import read_metrics
from lit_llama.train.loop import Trainer
from lit_llama.train.state import STATES_DIR, find_states


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_the_state_and_says_how_to_go_on(
    tiny_folder: Path,
    data: Path,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """Catches a step that is lost, a status that hides the signal, and a command that does not continue the run: the
    one that is printed is run."""
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    out, step = tmp_path / "o u t", Trainer.step

    def struck(self: Trainer) -> dict[str, Any]:
        if self.progress.step == 6:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Trainer, "step", struck)
    result = run_here("finetune/lora.py", *flags_of(tiny_folder, data, out), "--train.save_interval", 100)
    signal.signal(signal.SIGINT, ignored)
    assert result.returncode == 128 + number, result.stderr
    last = result.stderr.splitlines()[-1]
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert last.startswith(f"Stopped{by} after step 7 of 12; saved. Continue with: python finetune/")
    assert [state.name for state in find_states(out / STATES_DIR)] == ["step-000000", "step-000007"]
    assert [step for step, _ in read_metrics(out)["loss"]] == list(range(1, 8))
    monkeypatch.setattr(Trainer, "step", step)
    python, *words = shlex.split(last.partition("Continue with: ")[2])
    assert python == "python"
    again = run_here(*words)
    assert again.returncode == 0, again.stderr
    assert outcome(out) == outcome(straight)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_second_interrupt_stops_at_once(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a Ctrl-C that cannot be repeated, here while the state is being saved: nothing half written stays."""
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(
        "lit_llama.train.state.write_manifest", lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    )
    out = tmp_path / "out"
    result = run_here("finetune/lora.py", *flags_of(tiny_folder, data, out), "--train.save_interval", 3)
    signal.signal(signal.SIGINT, ignored)
    last = f"Stopped at once; nothing is saved yet. Continue with: python finetune/lora.py --config {out}/run.yaml"
    assert result.returncode == 130 and result.stderr.endswith(f"{last} --resume auto\n"), result.stderr
    assert list((out / STATES_DIR).iterdir()) == [] and not (out / ".lock").exists()


def test_a_signal_that_is_ignored_stays_ignored(
    tiny_folder: Path, data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a job in the background that is ended by the Ctrl-C of another one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: (os.kill(os.getpid(), signal.SIGINT), step(self))[1])
    out = run(tiny_folder, data, tmp_path / "out", DROPOUT, TWELVE)
    signal.signal(signal.SIGINT, before)
    assert outcome(out) == outcome(straight)
