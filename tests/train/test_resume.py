"""A run that was stopped goes on as if it never had been: the same bytes, and nothing repeated."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from forked_groups import in_forks
from small_runs import DROPOUT, STEPS, TWELVE, Killed, outcome, run, stop_after
from small_runs import twenty_two_rows as twenty_two_rows  # a fixture
from stopped_runs import begin
from stopped_runs import stopped as stopped  # a fixture
from stopped_runs import straight as straight  # a fixture

from lit_llama.generate.llm import load
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from lit_llama.train.logs.metrics import METRICS_FILE, TIMING_FILE, read_metrics
from lit_llama.train.logs.sampler import SAMPLES_FILE
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.train.run import RUN_FILE
from lit_llama.train.state import STATES_DIR, find_states


@pytest.mark.parametrize("last", [1, 5, 6, 10, STEPS - 1])  # 5 and 10 are evaluated, 6 ends an epoch
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


def test_what_changes_no_weight_may_change(
    tiny_folder: Path, data: Path, straight: Path, stopped: Path, tmp_path: Path
) -> None:
    """Catches a run that cannot go on because its inputs were moved, or because states are wanted less often."""
    moved = Path(shutil.copytree(tiny_folder, tmp_path / "moved"))
    train = replace(TWELVE, save_interval=6, eval_interval=50)
    run(moved, Path(shutil.copytree(data, tmp_path / "data")), stopped, DROPOUT, train, resume="auto")
    assert (stopped / WEIGHTS_FILE).read_bytes() == (straight / WEIGHTS_FILE).read_bytes()


def test_answers_to_sample_prompts_go_on_as_well(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches answers that stand there twice, or that change what is drawn after them."""
    train = replace(TWELVE, max_steps=6, eval_interval=2, save_interval=3, sample_prompts=1)
    whole = run(tiny_folder, data, tmp_path / "whole", DROPOUT, train)
    out = begin(tiny_folder, data, tmp_path / "out", 4, **asdict(train))
    run(tiny_folder, data, out, DROPOUT, train, resume="auto")
    assert (out / SAMPLES_FILE).read_bytes() == (whole / SAMPLES_FILE).read_bytes()
    assert outcome(out) == outcome(whole)


def test_a_state_is_an_adapter_that_can_be_tried_out(stopped: Path, tiny_folder: Path) -> None:
    """Catches a state that only this program reads: PEFT loads it too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    state = find_states(stopped / STATES_DIR)[-1]
    ids = torch.arange(5, 40)
    with torch.no_grad():
        ours = load(state, precision="32-true", packed=False).model(ids)
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), state)(ids[None]).logits
    torch.testing.assert_close(ours, theirs[0], atol=1e-4, rtol=1e-4)


def test_other_threads_are_remarked(
    tiny_folder: Path, data: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches bits that differ without a word."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run(tiny_folder, data, stopped, DROPOUT, TWELVE, resume="auto")
    assert "was written with threads 1 (now 2): the last bits of what follows may differ" in capsys.readouterr().err


def test_a_run_goes_on_with_smaller_micro_batches(
    tiny_folder: Path, data: Path, straight: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that ran out of memory and can only begin anew, and bits that differ without a word."""
    train = replace(TWELVE, micro_batch_tokens=100)
    run(tiny_folder, data, stopped, DROPOUT, train, resume="auto")
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"was written with micro_batch_tokens {TWELVE.micro_batch_tokens} (now 100): the last bits" in said
    found, wanted = (read_metrics(folder)["tokens"] for folder in (stopped, straight))
    assert found == wanted


def test_a_run_repeats_from_its_run_file_with_the_same_bytes(straight: Path, tmp_path: Path) -> None:
    """Catches a setting that is not written down, or one that the door does not read back."""
    out = tmp_path / "again"
    done = in_forks("finetune/lora.py", "--config", straight / RUN_FILE, "--out_dir", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert outcome(out) == outcome(straight)
    first, second = (yaml.safe_load((folder / RUN_FILE).read_text()) for folder in (straight, out))
    assert second == first | {"out_dir": str(out)}


def test_a_run_killed_anywhere_ends_with_the_same_bytes(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """kill -9 through the door: at random moments, and at each kind of call that changes a file. Catches a state that
    looks whole and is not, two halves of different steps, and a lock that outlives its process."""
    done = in_forks("tests/killed_runs.py", tiny_folder, data, tmp_path, 1)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] >= 4 and found["calls"] > 100
    assert found["wrong"] == []
