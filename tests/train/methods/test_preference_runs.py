"""Runs on preference data: what they learn and say, how they go on, and what is refused."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from pair_data import PAIRED, Row, pair_rows, prefer, single_answers, write_pairs
from safetensors.torch import load_file
from small_runs import Killed, outcome, prepare, run, stop_after, through_the_door
from small_runs import twenty_rows as twenty_rows  # a fixture

import lit_llama
from lit_llama.errors import DataError, UserError
from lit_llama.generate.llm import load
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from lit_llama.model.assemble import adapted, assemble
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA
from lit_llama.text.dataset.pair_batches import PairRows
from lit_llama.text.dataset.pairs import PairSplit
from lit_llama.train.config import PreferenceConfig, RunConfig, TrainConfig
from lit_llama.train.logs.metrics import METRICS_FILE, PAIR_METRICS, read_metrics
from lit_llama.train.logs.report.run_report import REPORT_JSON
from lit_llama.train.logs.sampler import SAMPLES_FILE
from lit_llama.train.loop import Trainer
from lit_llama.train.methods.method import Preference
from lit_llama.train.methods.preference import REFERENCE_FILE, PairLoss
from lit_llama.train.run import finetune
from lit_llama.train.start import begin
from lit_llama.train.state import STATES_DIR, find_states

STEPS = 8


@pytest.fixture(scope="module", name="pairs")
def fourteen_pairs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 pairs to train on, so that the last step of an epoch has two; 5 to test on. Do not change it."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", tiny_folder, pair_rows(14), pair_rows(5, seed=1))


@pytest.fixture(scope="module", name="single")
def single_rows(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 single answers to train on, and 5 to test on. Do not change it."""
    rows = (single_answers(pair_rows(14)), single_answers(pair_rows(5, seed=1)))
    return write_pairs(tmp_path_factory.mktemp("single") / "data", tiny_folder, *rows)


@pytest.fixture(scope="module")
def straight(tiny_folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped. Do not change it."""
    return prefer(tiny_folder, pairs, tmp_path_factory.mktemp("straight") / "out")


def test_a_run_writes_an_adapter_and_its_measures(straight: Path, tiny_folder: Path) -> None:
    """Catches a folder that generate/ cannot take, columns that stay empty, and a model that begins elsewhere."""
    assert json.loads((straight / CONFIG_FILE).read_text())["peft_type"] == "LORA"
    assert (straight / METRICS_FILE).read_text().split("\n")[0] == ",".join(PAIR_METRICS)
    series = read_metrics(straight)
    assert [step for step, _ in series["loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in series["test_accuracy"]] == [0, 3, 6, 8]
    before = {name: series[f"test_{name}"][0][1] for name in ("loss", "margin", "drift", "chosen_reward")}
    # The reference is the model as it begins: log(2), and nothing moved but by rounding.
    assert before["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert max(abs(before[name]) for name in ("margin", "drift", "chosen_reward")) < 1e-4
    assert series["drift"][-1][1] > 0.1 and series["loss"][-1][1] < series["loss"][0][1] - 0.05
    assert series["margin"][-1][1] > 0.05 and series["perplexity"] == []
    chosen, rejected = (series[f"{side}_reward"][-1][1] for side in ("chosen", "rejected"))
    assert series["margin"][-1][1] == pytest.approx(chosen - rejected, abs=1e-5)
    report = json.loads((straight / REPORT_JSON).read_text())
    assert report["verdict"]["finished"] and report["evaluations"][-1]["test_drift"] > 0.1
    assert report["settings"]["dpo.loss"] == "dpo"
    assert "mean |log p" in (straight / "report.html").read_text()
    with load(straight, base_dir=tiny_folder, precision="32-true") as llm:
        assert llm.generate("Order", max_new_tokens=3) is not None


@pytest.mark.parametrize("last", [1, 4, 6, 7])
def test_a_run_that_goes_on_ends_with_the_same_bytes(
    tiny_folder: Path, pairs: Path, straight: Path, tmp_path: Path, last: int
) -> None:
    """Catches a reference that is taken of the model as it is when the run goes on."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, last)
        prefer(tiny_folder, pairs, out)
    torch.manual_seed(last)
    prefer(tiny_folder, pairs, out, resume="auto")
    assert outcome(out) == outcome(straight)


def test_kto_goes_on_with_the_same_bytes(tiny_folder: Path, single: Path, tmp_path: Path) -> None:
    """Catches a baseline whose reference is not kept."""
    whole = prefer(tiny_folder, single, tmp_path / "whole", loss="kto")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 5)
        prefer(tiny_folder, single, tmp_path / "out", loss="kto")
    prefer(tiny_folder, single, tmp_path / "out", loss="kto", resume="auto")
    assert outcome(tmp_path / "out") == outcome(whole)
    series = read_metrics(whole)
    assert series["accuracy"] == [] and series["margin"][-1][1] > series["margin"][0][1]
    state = load_file(find_states(whole / STATES_DIR)[-1] / REFERENCE_FILE)
    assert state["train.others"][:, 0].abs().min() > 0


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo", "kto"])
def test_every_loss_learns(tiny_folder: Path, pairs: Path, tmp_path: Path, loss: Any) -> None:
    """Catches a loss that the loop takes and that moves nothing, and a reference where none is needed."""
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        refer = Trainer.refer
        patch.setattr(Trainer, "refer", lambda self, tell: refer(self, lambda done: asked.append(done)))
        out = prefer(tiny_folder, pairs, tmp_path / "out", replace(PAIRED, epochs=6), loss=loss)
    assert bool(asked) is (loss in ("ipo", "kto"))
    series = read_metrics(out)
    assert series["margin"][-1][1] > series["margin"][0][1] and series["accuracy"][-1][1] > 0.7
    assert bool(series["drift"]) is (loss in ("ipo", "kto"))


def test_micro_batches_and_the_layout_change_nothing_that_matters(
    tiny_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    """Catches a gradient that depends on the cut, or on prompts that stand before each answer (noise of size nearly 0
    forbids to share them)."""
    train = replace(PAIRED, optimizer="sgd", learning_rate=0.5)  # which goes by the size of gradients, not their sign
    changes: list[dict[str, Any]] = [{}, {"micro_batch_tokens": 60}, {"neftune_noise_alpha": 1e-9}]
    first, other, plain = (
        read_metrics(prefer(tiny_folder, pairs, tmp_path / str(number), replace(train, **change)))
        for number, change in enumerate(changes)
    )
    assert first["loss"][-1][1] < first["loss"][0][1] - 0.01
    for series in (other, plain):
        assert dict(series["loss"]) == pytest.approx(dict(first["loss"]), abs=1e-4)
        assert dict(series["test_loss"]) == pytest.approx(dict(first["test_loss"]), abs=1e-4)
    assert other["tokens"] == first["tokens"]
    assert sum(value for _, value in plain["tokens"]) > sum(value for _, value in first["tokens"])


def test_the_reference_of_an_adapter_is_that_adapter(
    tiny_folder: Path, pairs: Path, data: Path, tmp_path: Path
) -> None:
    """Catches the bare base as the reference of a run that goes on with a supervised adapter."""
    first = run(tiny_folder, data, tmp_path / "first")
    config = RunConfig(
        adapter_dir=first,
        checkpoint_dir=tiny_folder,
        data_dir=pairs,
        out_dir=tmp_path / "out",
        train=replace(PAIRED, max_steps=2),
        precision="32-true",
    )
    method, config = begin(Preference(config.lora, preference=config.dpo), config)
    finetune(method, config)
    series = read_metrics(tmp_path / "out")
    assert series["test_loss"][0][1] == pytest.approx(0.693147, abs=1e-4) and series["test_drift"][0][1] < 1e-3
    bare = prefer(tiny_folder, pairs, tmp_path / "bare", replace(PAIRED, max_steps=2))
    references = [
        load_file(find_states(folder / STATES_DIR)[-1] / REFERENCE_FILE)["train"] for folder in (tmp_path / "out", bare)
    ]
    assert (references[0] - references[1]).abs().max() > 0.1
    values = [load_file(folder / WEIGHTS_FILE) for folder in (first, tmp_path / "out")]
    assert values[0].keys() == values[1].keys()


def test_a_signal_while_the_reference_is_computed_ends_the_run(tiny_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """Catches hours that nobody can end, and a folder that cannot be used again."""
    import os
    import signal

    from lit_llama.errors import Interrupted

    evaluated: list[int] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="nothing is saved yet") as stopped:
        refer = Trainer.refer

        def struck(self: Trainer, tell: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            refer(self, tell)

        patch.setattr(Trainer, "refer", struck)
        patch.setattr(Trainer, "evaluate", lambda self: evaluated.append(1))
        prefer(tiny_folder, pairs, tmp_path / "out")
    assert stopped.value.exit_status == 128 + signal.SIGTERM and not evaluated
    prefer(tiny_folder, pairs, tmp_path / "out", resume="auto")


def test_data_of_another_kind_is_refused(
    tiny_folder: Path, pairs: Path, single: Path, data: Path, tmp_path: Path
) -> None:
    """Catches prompts that are trained on, samples that are taken for pairs, and answers without their rivals."""
    with pytest.raises(DataError, match=r"holds preferences.*finetune/dpo\.py"):
        run(tiny_folder, pairs, tmp_path / "out")
    with pytest.raises(DataError, match=r"holds data for supervised training.*finetune/lora\.py.*--as preference"):
        prefer(tiny_folder, data, tmp_path / "out")
    with pytest.raises(DataError, match=r"row 0 of the train split has one answer.*kto"):
        prefer(tiny_folder, single, tmp_path / "out")
    long = write_pairs(tmp_path / "long", tiny_folder, [([5] * 5000, [6], [7])] * 3, pair_rows(2))
    with pytest.raises(DataError, match="the longest sample has 5001 tokens"):
        prefer(tiny_folder, long, tmp_path / "out")
    strange = write_pairs(tmp_path / "strange", tiny_folder, [([5, 6], [60_000], [7])] * 3, pair_rows(2))
    with pytest.raises(DataError, match="the train split holds 60000"):
        prefer(tiny_folder, strange, tmp_path / "out")
    empty = write_pairs(tmp_path / "empty", tiny_folder, [([5], [6], [7]), ([], [6], [7])], pair_rows(2))
    with pytest.raises(DataError, match="expected rows with a prompt and an answer"):
        prefer(tiny_folder, empty, tmp_path / "out")


def test_another_loss_does_not_go_on(tiny_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """Catches a state that is continued with another beta."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 2)
        prefer(tiny_folder, pairs, tmp_path / "out")
    with pytest.raises(UserError, match=r"--dpo\.beta"):
        prefer(tiny_folder, pairs, tmp_path / "out", resume="auto", beta=0.7)


def test_the_door_trains_plans_and_goes_on(tiny_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """Catches flags that do not arrive, and a run.yaml that the door does not read."""
    door, out = "finetune/dpo.py", tmp_path / "out"
    flags = ["--dpo.loss", "simpo", "--dpo.gamma", 0.3, "--train.batch_size", 4, "--train.sample_prompts", 0]
    said = through_the_door(tiny_folder, pairs, out, *flags, door=door)
    assert "accuracy" in said and "next: python finetune/merge.py" in said
    again = run_here(door, "--config", out / "run.yaml", "--resume", "auto", "--train.epochs", 2)
    assert again.returncode == 0, again.stderr
    assert [step for step, _ in read_metrics(out)["loss"]] == list(range(1, STEPS + 1))
    plan = run_here(door, "--checkpoint_dir", tiny_folder, "--data_dir", pairs, "--out_dir", tmp_path / "no", "--plan")
    assert plan.returncode == 0 and "reference" in plan.stdout and not (tmp_path / "no").exists()


def test_rows_of_preferences_are_asked_as_samples(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a run without sample answers, whose length says whether a preference makes them longer."""
    data = write_pairs(tmp_path / "data", tiny_folder, pair_rows(4), pair_rows(2, seed=1))
    said = [[{"role": role, "content": text}] for role, text in (("user", "Order"), ("assistant", "red lamps"))]
    rows = [
        {"prompt": said[0], "chosen": said[1], "rejected": [{"role": "assistant", "content": "no"}]},
        {"messages": [*said[0], *said[1]], "label": False},
    ]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = prefer(tiny_folder, data, tmp_path / "out", replace(PAIRED, sample_prompts=2, max_steps=1))
    samples = [json.loads(line) for line in (out / SAMPLES_FILE).read_text().splitlines()]
    assert [(row["row"], row["reference"]) for row in samples[:2]] == [(0, "red lamps"), (1, "red lamps")]
    assert [step for step, length in read_metrics(out)["answer_length"] if 0 <= length <= 128] == [0, 1]


def test_the_face_trains_on_pairs(tiny_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """Catches a notebook that cannot do what the command does, and other defaults."""
    train = {"batch_size": 4, "sample_prompts": 0}
    run = lit_llama.finetune(tiny_folder, pairs, tmp_path / "out", method="dpo", dpo={"loss": "orpo"}, train=train)
    assert len(run.losses) == 4 and (tmp_path / "out" / CONFIG_FILE).exists()
    assert "learning_rate: 2.0e-05" in (tmp_path / "out" / "run.yaml").read_text()
    with pytest.raises(UserError, match="--dpo is a setting of --method dpo"):
        lit_llama.finetune(tiny_folder, pairs, tmp_path / "no", dpo={"loss": "orpo"})


def test_the_rows_for_testing_have_a_reference_of_their_own(straight: Path, pairs: Path) -> None:
    """Catches references of train that are read for test."""
    state = load_file(find_states(straight / STATES_DIR)[-1] / REFERENCE_FILE)
    assert state["train"].shape == (14, 2) and state["test"].shape == (5, 2)
    assert (state["train"] < 0).all() and (state["test"] < 0).all()


def test_settings_of_a_run_hold_those_of_its_loss(straight: Path) -> None:
    """Catches a run.yaml from which a run cannot be repeated."""
    import yaml

    settings = yaml.safe_load((straight / "run.yaml").read_text())
    assert PreferenceConfig(**settings["dpo"]) == PreferenceConfig()


def test_the_supervised_run_has_no_such_settings(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches columns and settings of pairs in the folders of other runs."""
    rows = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(12)]
    out = run(tiny_folder, prepare(tmp_path / "data", tiny_folder, rows), tmp_path / "out")
    assert "dpo" not in (out / "run.yaml").read_text() and "margin" not in (out / METRICS_FILE).read_text()


def model_of(folder: Path, base: Path) -> LLaMA:
    """The model of a folder, with its adapter where it is one."""
    model = load_model(base)
    return model if folder == base else assemble(model, adapted(folder)).model


def short_before_long(count: int, seed: int) -> list[Row]:
    """Pairs of drawn answers that both end, of which the shorter one is chosen."""
    draw, end = random.Random(seed), 2

    def answer(low: int, high: int) -> list[int]:
        return [*(draw.randrange(3, 19) for _ in range(draw.randint(low, high))), end]

    return [([draw.randrange(3, 19) for _ in range(8)], answer(2, 5), answer(8, 16)) for _ in range(count)]


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_a_preference_is_learned_for_rows_that_were_never_seen(tiny_folder: Path, tmp_path: Path, loss: Any) -> None:
    """Catches a run whose losses fall and which prefers nothing: short answers to prompts never seen before.

    Of simpo, the higher mean log probability of a token is theirs in half of the pairs before, and in nearly all after.
    The rewards of dpo are all equal before, up to rounding.
    """
    data = write_pairs(tmp_path / "data", tiny_folder, short_before_long(400, 0), short_before_long(100, 1))
    train = TrainConfig(epochs=4, batch_size=16, learning_rate=1e-2, eval_interval=25, sample_prompts=0)
    out = prefer(tiny_folder, data, tmp_path / "out", train, loss=loss)
    series = read_metrics(out)
    assert series["test_accuracy"][-1][1] > 0.9 and series["test_margin"][-1][1] > 0.5
    if loss == "dpo":
        assert series["test_loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
        return
    rows = PairRows(PairSplit(data, "test"))
    batch = rows.batch(range(len(rows)), share=False)
    shares = []
    for folder in (tiny_folder, out):
        loss_of = PairLoss(model_of(folder, tiny_folder), None, PreferenceConfig()).eval()
        with torch.no_grad():
            means = loss_of.log_probs(batch) / torch.from_numpy(batch.counts)
        shares.append(float((means[:, 0] > means[:, 1]).double().mean()))
    assert 0.3 < shares[0] < 0.7 and shares[1] > 0.9, shares
    assert shares == pytest.approx([series["test_accuracy"][place][1] for place in (0, -1)], abs=0.021)
