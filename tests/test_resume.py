"""A run that was stopped goes on as if it never had been: the same bytes, nothing repeated, nothing changed unseen."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, run_door, run_here
from small_runs import DROPOUT, ROWS, STEPS, TWELVE, flags_of, outcome, prepare, run

from lit_llama.errors import IntegrityError, ResourceError, UserError
from lit_llama.generate.load import load
from lit_llama.model.adapter import CONFIG_FILE, WEIGHTS_FILE
from lit_llama.train.loop import Trainer
from lit_llama.train.metrics import METRICS_FILE, TIMING_FILE, read_metrics
from lit_llama.train.optimizer_state import OPTIMIZER_FILE
from lit_llama.train.run import RUN_FILE
from lit_llama.train.sampler import SAMPLES_FILE
from lit_llama.train.state import STATE_FILE, STATES_DIR, find_states

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def data(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 rows to train on. Do not change it."""
    return prepare(tmp_path_factory.mktemp("resume") / "data", tiny_folder, [*ROWS, *ROWS[:6]])


@pytest.fixture(scope="module")
def straight(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps without a stop. Do not change it."""
    return run(tiny_folder, data, tmp_path_factory.mktemp("resume") / "straight", DROPOUT, TWELVE)


class Killed(BaseException):
    """Stands for the end of the process."""


def stop_after(patch: pytest.MonkeyPatch, last: int) -> list[int]:
    """The process ends in the step after `last`; gives the list of steps that are begun."""
    step, begun = Trainer.step, []

    def counted(self: Trainer) -> dict[str, Any]:
        begun.append(self.progress.step + 1)
        if self.progress.step == last:
            raise Killed
        return step(self)

    patch.setattr(Trainer, "step", counted)
    return begun


def begin(checkpoint: Path, data: Path, out: Path, last: int, **changes: Any) -> Path:
    """A run of which `last` steps are done."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, last)
        with pytest.raises(Killed):
            run(checkpoint, data, out, DROPOUT, replace(TWELVE, **changes))
    return out


@pytest.mark.parametrize("last", range(1, STEPS))
def test_a_run_that_goes_on_ends_with_the_same_bytes(
    tiny_folder: Path, data: Path, straight: Path, tmp_path: Path, last: int
) -> None:
    """Catches whatever a state forgets: moments, the count of steps, the place in the epoch, dropout, the learning
    rate; rows of metrics.csv that are lost or doubled; and steps that are done again."""
    out = begin(tiny_folder, data, tmp_path / "out", last)
    torch.manual_seed(last)  # another process has drawn other numbers
    torch.rand(100)
    with pytest.MonkeyPatch.context() as patch:
        begun = stop_after(patch, -1)
        run(tiny_folder, data, out, DROPOUT, TWELVE, resume="auto")
    assert begun == list(range(last + 1, STEPS + 1))
    assert outcome(out) == outcome(straight)
    assert [step for step, _ in read_metrics(out)["seconds"]] == list(range(1, STEPS + 1))


def test_the_run_has_what_this_file_is_to_test(straight: Path, data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a test that proves nothing: there are two epochs, several micro-batches a step, and dropout that acts."""
    series = read_metrics(straight)
    assert [step for step, _ in series["loss"]] == list(range(1, STEPS + 1)) and series["epoch"][-1][1] == 2
    longest = max(value for _, value in series["tokens"])
    assert longest > 2 * TWELVE.micro_batch_tokens
    plain = run(tiny_folder, data, tmp_path / "plain", replace(DROPOUT, dropout=0.0), TWELVE)
    assert outcome(plain)[WEIGHTS_FILE] != outcome(straight)[WEIGHTS_FILE]


def test_the_steps_since_the_last_state_are_done_again(
    tiny_folder: Path, data: Path, straight: Path, tmp_path: Path
) -> None:
    """Catches rows of metrics.csv of the first attempt that stay, a torn last row, and what a killed save has left."""
    out = begin(tiny_folder, data, tmp_path / "out", 9, save_interval=4)
    assert [state.name for state in find_states(out / STATES_DIR)] == ["step-000004", "step-000008"]
    for name in (METRICS_FILE, TIMING_FILE):
        with (out / name).open("a") as file:
            file.write("1")  # of 10
    half = out / STATES_DIR / ".step-000012.partial-1"
    half.mkdir()
    (half / OPTIMIZER_FILE).write_bytes(b"half")
    run(tiny_folder, data, out, DROPOUT, replace(TWELVE, save_interval=4), resume="auto")
    assert outcome(out) == outcome(straight)
    assert [step for step, _ in read_metrics(out)["seconds"]] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (out / STATES_DIR).iterdir()) == ["step-000008", "step-000012"]


def test_a_run_killed_before_its_first_state_begins_again(
    tiny_folder: Path, data: Path, straight: Path, tmp_path: Path
) -> None:
    """Catches a run that cannot be continued because there is nothing yet to continue from."""
    out = begin(tiny_folder, data, tmp_path / "out", 3, save_interval=100)
    shutil.rmtree(out / STATES_DIR)
    run(tiny_folder, data, out, DROPOUT, TWELVE, resume="auto")
    assert outcome(out) == outcome(straight)


def test_a_run_killed_after_its_last_state_writes_its_result(
    tiny_folder: Path, data: Path, straight: Path, tmp_path: Path
) -> None:
    """Catches a run whose steps are all done and whose adapter is never written."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_llama.train.run.draw_curve", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(tiny_folder, data, out, DROPOUT, TWELVE)
    assert not (out / CONFIG_FILE).exists()
    run(tiny_folder, data, out, DROPOUT, TWELVE, resume="auto")
    assert outcome(out) == outcome(straight) and (out / "loss.png").exists()


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_finished_run_is_left_as_it_is(
    tiny_folder: Path, data: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a file that is written again, an error where nothing is wrong, and settings that are not the run's."""
    before = contents(straight)
    for resume in ("auto", straight / STATES_DIR / "step-000011"):
        run(tiny_folder, data, straight, DROPOUT, TWELVE, resume=resume)
        assert "the run is finished, there is nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--train\.epochs was 2, is 3"):
        run(tiny_folder, data, straight, DROPOUT, replace(TWELVE, epochs=3), resume="auto")
    assert contents(straight) == before


def test_a_folder_that_holds_a_run_is_not_begun_anew(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a run that is lost to another one, and a message that does not say how to go on."""
    out = begin(tiny_folder, data, tmp_path / "out", 2)
    before = contents(out)
    with pytest.raises(UserError, match=rf"holds a run that has not ended.*--config {out}/run.yaml --resume auto"):
        run(tiny_folder, data, out, DROPOUT, TWELVE)
    assert contents(out) == before


@pytest.fixture
def stopped(tiny_folder: Path, data: Path, tmp_path: Path) -> Path:
    """A run of which three steps are done; states of steps 2 and 3."""
    return begin(tiny_folder, data, tmp_path / "out", 3)


def test_changed_settings_are_refused_with_every_difference(tiny_folder: Path, data: Path, stopped: Path) -> None:
    """Catches a run that goes on as another one, and an error that names the first difference only."""
    before = contents(stopped)
    train = replace(TWELVE, learning_rate=5e-3, batch_size=5)
    with pytest.raises(UserError) as caught:
        run(tiny_folder, data, stopped, replace(DROPOUT, alpha=8), train, seed=1, resume="auto")
    for difference in (
        "--train.learning_rate was 0.01, is 0.005",
        "--train.batch_size was 4, is 5",
        "--lora.alpha was 4, is 8",
        "--seed was 0, is 1",
    ):
        assert difference in str(caught.value)
    assert str(caught.value).count(" was ") == 4
    assert contents(stopped) == before


def test_changed_data_base_and_tokenizer_are_refused(
    tiny_folder: Path, data: Path, stopped: Path, tmp_path: Path
) -> None:
    """Catches a base that is replaced under its name, and data that is prepared again with other rows."""
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    save_file({name: value * 1.5 for name, value in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    other = prepare(tmp_path / "data", tiny_folder, [*ROWS[1:], *ROWS[:6]])
    with pytest.raises(UserError, match=r"the data \(fingerprint\) was .*; the base \(fingerprint\) was ") as caught:
        run(base, other, stopped, DROPOUT, TWELVE, resume="auto")
    assert "tokenizer" not in str(caught.value)
    state = find_states(stopped / STATES_DIR)[-1]
    record = json.loads((state / STATE_FILE).read_text())
    assert set(record["identity"]) >= {f"the {name} (fingerprint)" for name in ("data", "base", "tokenizer")}


def test_what_changes_no_weight_may_change(
    tiny_folder: Path, data: Path, straight: Path, stopped: Path, tmp_path: Path
) -> None:
    """Catches a run that cannot go on because its inputs were moved, or because states are wanted less often."""
    moved = Path(shutil.copytree(tiny_folder, tmp_path / "moved"))
    train = replace(TWELVE, save_interval=6, eval_interval=50)
    run(moved, Path(shutil.copytree(data, tmp_path / "data")), stopped, DROPOUT, train, resume="auto")
    assert (stopped / WEIGHTS_FILE).read_bytes() == (straight / WEIGHTS_FILE).read_bytes()


def damage(state: Path, name: str) -> None:
    content = bytearray((state / name).read_bytes())
    content[len(content) // 2] ^= 1
    (state / name).write_bytes(content)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE, "meta.json", "SHA256SUMS"])
def test_a_damaged_state_is_named_and_the_one_before_taken_when_asked_for(
    tiny_folder: Path, data: Path, straight: Path, stopped: Path, name: str
) -> None:
    """Catches one flipped bit that is trained on, and a step back that nobody agreed to. The error's own command is the
    consent, and the damaged state is out of the way from then on."""
    before, newest = find_states(stopped / STATES_DIR)
    damage(newest, name)
    what = rf"{name} is damaged" if name != "SHA256SUMS" else r"\S+ is (damaged|missing)"
    with pytest.raises(IntegrityError, match=rf"step-000003/{what}.*go on from step 2") as caught:
        run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume="auto")
    assert find_states(stopped / STATES_DIR) == [before, newest]
    asked = re.search(r"--resume (\S+)$", str(caught.value))
    assert asked is not None and Path(asked[1]) == before
    run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume=Path(asked[1]))
    assert outcome(stopped) == outcome(straight)


def test_a_state_set_aside_does_not_come_back(tiny_folder: Path, data: Path, straight: Path, stopped: Path) -> None:
    """Catches a run that went back to step 2, was killed again at once, and then goes on from the step 3 it left."""
    before, _ = find_states(stopped / STATES_DIR)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume=before)
    assert find_states(stopped / STATES_DIR) == [before]
    run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume="auto")
    assert outcome(stopped) == outcome(straight)


def test_a_file_gone_from_a_state_and_a_path_that_is_none(tiny_folder: Path, data: Path, stopped: Path) -> None:
    """Catches a traceback, and a state of another run."""
    before, newest = find_states(stopped / STATES_DIR)
    (newest / OPTIMIZER_FILE).unlink()
    with pytest.raises(IntegrityError, match=rf"{OPTIMIZER_FILE} is missing"):
        run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume="auto")
    (before / OPTIMIZER_FILE).unlink()
    with pytest.raises(IntegrityError, match="no other state is whole"):
        run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume="auto")
    with pytest.raises(UserError, match=r"is no state of .*step-000002, .*step-000003"):
        run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume=Path("states/step-000003"))


def test_answers_to_sample_prompts_go_on_as_well(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches answers that stand there twice, or that change what is drawn after them."""
    train = replace(TWELVE, max_steps=6, eval_interval=2, save_interval=3, sample_prompts=1)
    whole = run(tiny_folder, data, tmp_path / "whole", DROPOUT, train)
    out = begin(tiny_folder, data, tmp_path / "out", 4, **asdict(train))
    run(tiny_folder, data, out, DROPOUT, train, resume="auto")
    assert (out / SAMPLES_FILE).read_bytes() == (whole / SAMPLES_FILE).read_bytes()
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize("change", ["gone", "short"])
def test_metrics_that_are_not_the_runs_are_refused(tiny_folder: Path, data: Path, stopped: Path, change: str) -> None:
    """Catches a curve with a hole in it that looks whole."""
    path = stopped / METRICS_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    if change == "gone":
        path.unlink()
    with pytest.raises(IntegrityError, match=r"metrics\.csv is not as the run left it: it lacks the steps"):
        run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume="auto")


def test_a_state_is_an_adapter_that_can_be_tried_out(stopped: Path, tiny_folder: Path) -> None:
    """Catches a state that only this program reads: PEFT loads it too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    state = find_states(stopped / STATES_DIR)[-1]
    ids = torch.arange(5, 40)
    with torch.no_grad():
        ours = load(state, precision="32-true").model(ids)
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), state)(ids[None]).logits
    torch.testing.assert_close(ours, theirs[0], atol=1e-4, rtol=1e-4)


def test_other_threads_are_remarked(
    tiny_folder: Path, data: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches bits that differ without a word."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume="auto")
    assert "was written with threads 1 (now 2): the last bits of what follows may differ" in capsys.readouterr().err


def full_disk(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["optimizer_state.save_file", "state.write_json", "state.write_manifest"])
def test_a_full_disk_leaves_the_state_before(
    tiny_folder: Path, data: Path, straight: Path, tmp_path: Path, place: str
) -> None:
    """Catches half a state that stays, an older one that is removed too early, and a traceback."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.step

        def fill(self: Trainer) -> dict[str, Any]:
            if self.progress.step == 3:
                patch.setattr(f"lit_llama.train.{place}", full_disk)
            return step(self)

        patch.setattr(Trainer, "step", fill)
        with pytest.raises(ResourceError, match=r"step-000004 cannot be written: .*No space left.*step-000003 stays"):
            run(tiny_folder, data, out, DROPOUT, TWELVE)
    assert sorted(path.name for path in (out / STATES_DIR).iterdir()) == ["step-000002", "step-000003"]
    run(tiny_folder, data, out, DROPOUT, TWELVE, resume="auto")
    assert outcome(out) == outcome(straight)


def test_a_file_that_may_not_grow_is_one_line(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """The system's own refusal, through the door: exit status 5, one line, nothing half written. The report, which does
    not fit either, ends no run."""
    program = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = ["--checkpoint_dir", tiny_folder, "--data_dir", data, "--out_dir", "out", "--train.batch_size", 4]
    command = [sys.executable, "-c", program, ROOT / "finetune" / "lora.py", *flags, "--train.max_steps", 2]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 5, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: out/states/step-000000 cannot be written: ") and "Traceback" not in result.stderr
    assert list((tmp_path / "out" / STATES_DIR).iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
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
    assert last.startswith(f"error: {number.name} after step 7 of 12; its state is saved. Continue: python finetune/")
    assert [state.name for state in find_states(out / STATES_DIR)] == ["step-000000", "step-000007"]
    assert [step for step, _ in read_metrics(out)["loss"]] == list(range(1, 8))
    monkeypatch.setattr(Trainer, "step", step)
    python, *words = shlex.split(last.partition("Continue: ")[2])
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
    assert result.returncode == 130 and result.stderr.endswith("error: interrupted\n"), result.stderr
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


def test_a_second_run_in_one_folder_is_turned_away(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches two runs that mix their files; the holder is named, and a dead one holds nothing."""
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom lit_llama.lock import claim\n"
        "with claim(Path(sys.argv[1])):\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, str(out)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        holder = int(other.stdout.readline())
        for resume in ("never", "auto"):
            result = run_here("finetune/lora.py", *flags_of(tiny_folder, data, out), "--resume", resume)
            assert result.returncode == 75, result
            assert re.match(
                rf"error: another run is at work on {out}: process {holder} on \S+ since \d{{4}}-", result.stderr
            )
        other.kill()
    assert (out / ".lock").exists()
    assert run_here("finetune/lora.py", *flags_of(tiny_folder, data, out), "--train.max_steps", 1).returncode == 0
    assert not (out / ".lock").exists()


def test_a_run_repeats_from_its_run_file_with_the_same_bytes(straight: Path, tmp_path: Path) -> None:
    """Catches a setting that is not written down, or one that the door does not read back."""
    out = tmp_path / "again"
    done = run_door("finetune/lora.py", "--config", straight / RUN_FILE, "--out_dir", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert outcome(out) == outcome(straight)
    first, second = (yaml.safe_load((folder / RUN_FILE).read_text()) for folder in (straight, out))
    assert second == first | {"out_dir": str(out)}


def test_a_run_killed_anywhere_ends_with_the_same_bytes(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """kill -9 through the door: at random moments, and at each kind of call that changes a file. Catches a state that
    looks whole and is not, two halves of different steps, and a lock that outlives its process."""
    program = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(program), tiny_folder, data, tmp_path, 1]
    result = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["killed"] >= 4 and found["calls"] > 100
    assert found["wrong"] == []
