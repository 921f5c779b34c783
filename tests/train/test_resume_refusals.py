"""What a run does not go on from: other settings or inputs, damaged states, a folder that is taken or full."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here
from small_runs import DROPOUT, ROWS, TWELVE, Killed, flags_of, outcome, prepare, run, stop_after
from small_runs import twenty_two_rows as twenty_two_rows  # a fixture
from stopped_runs import begin, contents
from stopped_runs import stopped as stopped  # a fixture
from stopped_runs import straight as straight  # a fixture

from lit_llama.errors import IntegrityError, ResourceError, UserError
from lit_llama.model.adapters.peft_folder import WEIGHTS_FILE
from lit_llama.train.logs.metrics import METRICS_FILE
from lit_llama.train.loop import Trainer
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.train.state import STATE_FILE, STATES_DIR, find_states


def test_a_finished_run_is_left_as_it_is(
    tiny_folder: Path, data: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a file that is written again, an error where nothing is wrong, and settings that are not the run's."""
    before = contents(straight)
    for resume in ("auto", straight / STATES_DIR / "step-000011"):
        run(tiny_folder, data, straight, DROPOUT, TWELVE, resume=resume)
        assert "the run is finished, there is nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--train\.batch_size was 4, is 3"):
        run(tiny_folder, data, straight, DROPOUT, replace(TWELVE, batch_size=3), resume="auto")
    assert contents(straight) == before


def test_a_folder_that_holds_a_run_is_not_begun_anew(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a run that is lost to another one, and a message that does not say how to go on."""
    out = begin(tiny_folder, data, tmp_path / "out", 2)
    before = contents(out)
    with pytest.raises(UserError, match=rf"holds a run that has not ended.*--config {out}/run.yaml --resume auto"):
        run(tiny_folder, data, out, DROPOUT, TWELVE)
    assert contents(out) == before


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


def full_disk(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["optim.write_tensors", "state.write_json", "state.write_manifest"])
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


def test_a_second_run_in_one_folder_is_turned_away(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches two runs that mix their files; the holder is named, and a dead one holds nothing."""
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom lit_llama.folder.lock import claim\n"
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


def test_a_run_ends_in_a_link_to_another_disk(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a training of days whose result can never be put into its folder, also with --resume; the lock and what
    is half written of report and settings are names of our own, at which no link is followed."""
    disk, out, theirs = tmp_path / "disk", tmp_path / "out", tmp_path / "theirs"
    disk.mkdir()
    theirs.write_text("mine")
    out.symlink_to(disk)
    for name in (".run.yaml.partial", "meta.json", "loss.png", "metrics.csv"):
        (disk / name).symlink_to(theirs)
    run(tiny_folder, data, out)
    assert (disk / "adapter_config.json").is_file() and not (disk / "meta.json").is_symlink()
    assert theirs.read_text() == "mine" and {path.name for path in disk.glob(".*")} == {".run.yaml.partial"}
    (disk / "adapter_config.json").unlink()  # as a run that could not be published left it
    run(tiny_folder, data, out, resume="auto")
    assert (disk / "adapter_config.json").is_file() and out.is_symlink()
    lock = tmp_path / "second"
    lock.mkdir()
    (lock / ".lock").symlink_to(theirs)
    with pytest.raises(UserError, match=r"second/\.lock is a link to"):
        run(tiny_folder, data, lock)
    assert theirs.read_text() == "mine"
