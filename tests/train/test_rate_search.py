"""The search for a learning rate: which rates are tried and chosen, on rigged trials and on a real tiny model."""

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here
from small_runs import LORA, SHORT, run
from small_runs import twenty_rows as twenty_rows  # a fixture

import lit_llama
from lit_llama.errors import NumericalError, UserError
from lit_llama.text.dataset.folder import Split
from lit_llama.train import rate_search
from lit_llama.train.config import RunConfig, TrainConfig
from lit_llama.train.logs.metrics import read_metrics
from lit_llama.train.loop import Trainer
from lit_llama.train.methods.method import LoRA
from lit_llama.train.rate_search import CSV_FILE, PNG_FILE, Trial, check_searchable, choose, find_learning_rate, search

pytestmark = pytest.mark.usefixtures("one_core")

# As the rule would say 5e-3 of a model that narrow, which leaves no room above: the centre is that of the test.
CENTRE = 4e-3


def rigged(loss_of: Callable[[float], float]) -> tuple[Callable[[float], Trial], list[float]]:
    """What stands for short runs, and the rates that were tried."""
    tried: list[float] = []

    def attempt(rate: float) -> Trial:
        tried.append(rate)
        return Trial(rate, 24, 1.0, loss_of(rate))

    return attempt, tried


def valley(lowest: float) -> Callable[[float], float]:
    """Test losses that are lowest at a rate, and grow with the distance in powers of two."""
    return lambda rate: 1 + 0.1 * math.log2(rate / lowest) ** 2


@pytest.mark.parametrize(
    ("lowest", "expected", "count"),
    [(1e-3, 1e-3, 5), (5e-4, 5e-4, 5), (2.5e-4, 2.5e-4, 6), (1.3e-4, 1.3e-4, 7), (1e-5, 6.5e-5, 7), (8e-3, 8e-3, 7)],
)
def test_the_lowest_loss_is_found_also_beyond_an_edge(lowest: float, expected: float, count: int) -> None:
    """Catches a search that ends at an edge though it falls on beyond, one without end, and rates out of order."""
    attempt, tried = rigged(valley(lowest))
    trials = search(attempt, 1e-3)
    assert choose(trials).rate == pytest.approx(expected, rel=0.06)
    assert len(tried) == count == len(trials)
    assert [trial.rate for trial in trials] == sorted(tried)


def test_above_a_rate_that_diverges_none_is_tried() -> None:
    """Catches time that is spent on what diverges for sure."""
    attempt, tried = rigged(lambda rate: math.inf if rate > 6e-4 else 2 - rate)
    trials = search(attempt, 1e-3)
    assert tried == [2.5e-4, 5e-4, 1e-3] and trials[-1].diverged
    assert choose(trials).rate == 5e-4 or choose(trials).rate == 2.5e-4


def test_lower_rates_are_tried_where_the_first_diverges() -> None:
    attempt, tried = rigged(lambda rate: math.inf if rate > 1e-4 else 1.0)
    assert choose(search(attempt, 1e-3)).rate == min(tried) == pytest.approx(6.2e-5, rel=0.05)
    assert len(tried) == 3
    attempt, _ = rigged(lambda rate: math.inf)
    with pytest.raises(NumericalError, match="every learning rate"):
        choose(search(attempt, 1e-3))


def test_of_equal_rates_the_lowest_is_chosen() -> None:
    """Catches the lowest loss of a short run by a hair, which a long one would pay for."""
    trials = [Trial(rate, 24, 1.0, loss) for rate, loss in ((1e-4, 1.02), (2e-4, 1.008), (4e-4, 1.0), (8e-4, 1.005))]
    assert choose(trials).rate == 2e-4


def searched(tiny_folder: Path, data: Path, out: Path, train: TrainConfig = SHORT) -> RunConfig:
    return RunConfig(
        checkpoint_dir=tiny_folder, data_dir=data, out_dir=out, lora=LORA, train=train, precision="32-true", seed=0
    )


def test_a_short_run_is_the_run_of_that_length(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rates that begin with what an earlier one has trained, or meet other rows: each test loss is that of a
    run of its own, and so is that before training. The best of the losses is chosen."""
    monkeypatch.setattr(rate_search, "rule", lambda *_: (CENTRE, "as the test says"))
    found = find_learning_rate(LoRA(LORA), searched(tiny_folder, data, tmp_path / "out"))
    assert [trial.rate for trial in found.trials][:5] == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert len({trial.test_loss for trial in found.trials}) == len(found.trials)
    for trial in (found.trials[0], found.trials[3]):
        alone = run(tiny_folder, data, tmp_path / f"{trial.rate}", train=replace(SHORT, learning_rate=trial.rate))
        measured = dict(read_metrics(alone)["test_loss"])
        assert measured[5] == pytest.approx(trial.test_loss, rel=1e-5) and trial.steps == 5
        assert measured[0] == pytest.approx(found.before, rel=1e-5)
    best = min(trial.test_loss for trial in found.trials)
    assert found.before > best >= found.chosen.test_loss / 1.01
    assert not (tmp_path / "out").exists() and {path.name for path in found.folder.iterdir()} >= {CSV_FILE, PNG_FILE}
    with (found.folder / CSV_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["learning_rate"] for row in rows if row["chosen"]] == [f"{found.chosen.rate:.6g}"]
    assert float(rows[0]["test_loss"]) == pytest.approx(found.before, rel=1e-5) and len(rows) == 1 + len(found.trials)
    assert (found.folder / PNG_FILE).read_bytes().startswith(b"\x89PNG")


def test_a_rate_that_spoils_the_model_is_given_up_early(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a diverged rate that is trained to its end, or chosen. With the head, as without it the logits of a
    random model stay small whatever it learns."""
    monkeypatch.setattr(rate_search, "rule", lambda *_: (0.1, "as the test says"))
    monkeypatch.setattr(rate_search, "STEPS", 10)
    lora = replace(LORA, alpha=64, target_modules=["q_proj", "down_proj", "lm_head"])
    train = replace(SHORT, epochs=20, max_grad_norm=0.0)
    found = find_learning_rate(LoRA(lora), searched(tiny_folder, data, tmp_path / "out", train))
    given_up = [trial for trial in found.trials if trial.diverged]
    assert given_up and all(trial.steps < rate_search.STEPS and trial.rate > found.chosen.rate for trial in given_up)
    assert {trial.steps for trial in found.trials if not trial.diverged} == {rate_search.STEPS}


def test_ctrl_c_leaves_nothing(tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table of some of the rates, and a folder that is reserved for ever."""
    step, done = Trainer.step, []

    def interrupted(self: Trainer) -> dict[str, Any]:
        done.append(1)
        if len(done) == 8:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_learning_rate(LoRA(LORA), searched(tiny_folder, data, tmp_path / "made" / "out"))
    assert not list(tmp_path.iterdir())


def test_the_door_prints_a_table_and_the_choice(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches results on stderr, a mark at another rate than the one that is named, and a run that begins after all."""
    made = run_here(
        *("finetune/lora.py", "--checkpoint_dir", tiny_folder, "--data_dir", data, "--out_dir", tmp_path / "out"),
        *("--find_learning_rate", "--train.batch_size", 4, "--train.max_steps", 3, "--precision", "32-true"),
    )
    assert made.returncode == 0, made.stderr
    chosen = next(line.split()[0] for line in made.stdout.splitlines() if line.rstrip().endswith("chosen"))
    assert f"--train.learning_rate {chosen} in place of --find_learning_rate" in " ".join(made.stdout.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out-rates"]


@pytest.mark.parametrize(
    ("settings", "named"), [({"resume": "auto"}, "--resume"), ({"plan": True}, "--plan"), ({"devices": 2}, "--devices")]
)
def test_what_compares_no_rates_is_refused(settings: Mapping[str, Any], named: str) -> None:
    """Catches a search that ignores a flag beside it."""
    with pytest.raises(UserError, match=named):
        check_searchable(RunConfig(**settings))


def test_the_first_rows_are_a_split_of_their_own(data: Path) -> None:
    """Catches counts and batches of all rows in place of the first ones."""
    whole = Split(data, "train")
    head = whole.head(3)
    assert len(head) == 3 and len(whole) == 20 and len(whole.head(50)) == 20
    assert head.trained_tokens() == whole.trained_tokens([0, 1, 2]) and head.places() == whole.places([0, 1, 2])
    assert head.longest == max(whole.lengths[:3])
    assert head[1][0].tolist() == whole[1][0].tolist()


def test_a_notebook_gets_the_rate(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a face whose settings do not reach the search, one that talks, and other refusals than the command's."""
    settings: dict[str, Any] = {"lora": {"r": 2}, "train": asdict(SHORT) | {"max_steps": 2}, "precision": "32-true"}
    found = lit_llama.find_learning_rate(tiny_folder, data, tmp_path / "out", **settings, verbose=False)
    assert found.chosen in found.trials and {trial.steps for trial in found.trials} == {2}
    assert 2.5e-3 in [trial.rate for trial in found.trials], "half of what the rule says, at most 5e-3"
    settings["train"] |= {"optimizer": "sgd", "learning_rate": 1e-2}
    found = lit_llama.find_learning_rate(tiny_folder, data, tmp_path / "out", **settings, verbose=False)
    assert {5e-3, 1e-2, 2e-2} <= {trial.rate for trial in found.trials}, "around that of the run, for what has no rule"
    with pytest.raises(UserError, match="--plan"):
        lit_llama.find_learning_rate(tiny_folder, data, tmp_path / "out", **settings, plan=True)
