"""Whole training runs on the tiny model: they learn, repeat, replay, and refuse what does not fit before they start."""

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Container
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Sample, write_splits
from safetensors.torch import load_file
from small_runs import LORA, ROWS, SHORT, prepare, run

from lit_llama.errors import CheckpointError, DataError, IntegrityError, NumericalError, ResourceError, UserError
from lit_llama.generate.answer import answer_all
from lit_llama.generate.load import load
from lit_llama.generate.sampling import Sampling
from lit_llama.model.adapter import CONFIG_FILE, META_FILE, WEIGHTS_FILE, base_of
from lit_llama.model.checkpoint import fingerprint, load_model
from lit_llama.model.config import LINEARS, LoRAConfig
from lit_llama.text.dataset import Split, epoch_order
from lit_llama.text.encode import IGNORE_INDEX
from lit_llama.text.formats import Example
from lit_llama.train import loop
from lit_llama.train.config import TrainConfig
from lit_llama.train.loop import Trainer, evaluate
from lit_llama.train.loss import TokenLoss
from lit_llama.train.method import LoRA
from lit_llama.train.metrics import METRICS_FILE, TIMING_FILE, read_metrics
from lit_llama.train.optimizer_state import OPTIMIZER_FILE
from lit_llama.train.report.run_report import REPORT_HTML, REPORT_JSON
from lit_llama.train.run import RUN_FILE, finetune
from lit_llama.train.sampler import SAMPLES_FILE
from lit_llama.train.state import STATES_DIR, find_states

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def data(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows to train on, and 4 of them again to test on. Do not change it."""
    return prepare(tmp_path_factory.mktemp("loop") / "data", tiny_folder, [*ROWS, *ROWS[:4]])


@pytest.fixture(scope="module")
def short_run(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of a small adapter. Do not change it."""
    return run(tiny_folder, data, tmp_path_factory.mktemp("loop") / "short")


def test_twenty_rows_are_learned_by_heart(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches whatever keeps a model from learning: a wrong shift, a lost gradient, a frozen adapter, an end that is
    never trained. Loss falls to nearly nothing, and generation gives the answers back and stops by itself."""
    train = TrainConfig(epochs=40, batch_size=10, learning_rate=1e-2, schedule="linear", eval_interval=1000)
    # With the head, as a random one cannot speak out: its logits stay so small that the loss ends above 0.05.
    lora = LoRAConfig(r=16, alpha=32, target_modules=[*LINEARS, "lm_head"])
    out = run(tiny_folder, data, tmp_path / "out", lora, train)
    series = read_metrics(out)
    assert series["loss"][0][1] > 3 and series["loss"][-1][1] < 0.05
    assert [step for step, _ in series["loss"]] == list(range(1, 81))
    speaker = load(out, precision="32-true")
    trained = [row for row in ROWS if row not in held_out(data)]
    examples = [Example(row["instruction"], row["input"], row["output"]) for row in trained]
    answers = answer_all(speaker, examples, 60, Sampling(), 8)
    assert [answer.text for answer in answers] == [row["output"] for row in trained]
    assert all(answer.stopped for answer in answers)


def held_out(data: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_folder_that_describes_itself(tiny_folder: Path, data: Path, short_run: Path) -> None:
    """Catches a file that is missing, and a folder from which the run cannot be told."""
    names = {path.name for path in short_run.iterdir()}
    assert names == {
        CONFIG_FILE,
        WEIGHTS_FILE,
        META_FILE,
        METRICS_FILE,
        TIMING_FILE,
        REPORT_HTML,
        REPORT_JSON,
        RUN_FILE,
        STATES_DIR,
        "loss.png",
        "chat_template.jinja",
    }
    meta = json.loads((short_run / META_FILE).read_text())
    assert meta["base"] == {"path": str(tiny_folder), "fingerprint": fingerprint(tiny_folder)}
    assert meta["data"] == json.loads((data / META_FILE).read_text()) and meta["steps"] == 5
    assert base_of(short_run) == tiny_folder
    assert (short_run / "chat_template.jinja").read_text() == (data / "chat_template.jinja").read_text()
    assert yaml.safe_load((short_run / RUN_FILE).read_text())["train"] == asdict(SHORT)
    assert not list(short_run.parent.glob(".*")), "no partial folder is left"


def test_metrics_account_for_every_token(data: Path, short_run: Path) -> None:
    """Catches samples that are skipped or seen twice in an epoch, and evaluations at the wrong steps."""
    series, counts = read_metrics(short_run), json.loads((data / META_FILE).read_text())["splits"]["train"]
    assert sum(value for _, value in series["trained_tokens"]) == counts["trained_tokens"]
    # The last token of a sample is nobody's input.
    assert sum(value for _, value in series["tokens"]) == counts["tokens"] - counts["rows"]
    assert [step for step, _ in series["test_loss"]] == [0, 2, 4, 5]
    assert series["epoch"][-1] == (5, 1.0)


def test_the_same_seed_gives_the_same_bytes(tiny_folder: Path, data: Path, short_run: Path, tmp_path: Path) -> None:
    """Catches randomness that does not come from the seed, such as an order of files, of hashes or of threads."""
    torch.manual_seed(99)  # whatever ran before must not matter
    again = run(tiny_folder, data, tmp_path / "again")
    assert (again / WEIGHTS_FILE).read_bytes() == (short_run / WEIGHTS_FILE).read_bytes()
    assert (again / METRICS_FILE).read_bytes() == (short_run / METRICS_FILE).read_bytes()


def test_another_seed_gives_another_adapter(tiny_folder: Path, data: Path, short_run: Path, tmp_path: Path) -> None:
    """Catches a seed that is ignored by the start of A or by the order of the samples."""
    other = run(tiny_folder, data, tmp_path / "other", seed=1)
    ours, theirs = load_file(other / WEIGHTS_FILE), load_file(short_run / WEIGHTS_FILE)
    assert all(not torch.equal(ours[name], theirs[name]) for name in theirs)
    tokens = [read_metrics(folder)["trained_tokens"] for folder in (other, short_run)]
    assert tokens[0] != tokens[1], "the order of the samples must differ"


def test_dropout_repeats_with_the_seed(tiny_folder: Path, data: Path, short_run: Path, tmp_path: Path) -> None:
    """Catches dropout drawn from elsewhere, and dropout that never acts in training."""
    lora = LoRAConfig(r=2, alpha=4, dropout=0.3)
    first, second = (run(tiny_folder, data, tmp_path / name, lora) for name in ("a", "b"))
    assert (first / WEIGHTS_FILE).read_bytes() == (second / WEIGHTS_FILE).read_bytes()
    assert (first / WEIGHTS_FILE).read_bytes() != (short_run / WEIGHTS_FILE).read_bytes()


def test_evaluation_covers_all_rows_however_they_are_cut(tiny_folder: Path, data: Path) -> None:
    """Mean over all trained tokens, against transformers sample by sample; catches a last batch that is dropped, a mean
    of means, and evaluation with dropout."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tiny_folder)
    split = Split(data, "train")
    total, count = 0.0, 0
    for row in range(len(split)):
        ids, labels = (torch.from_numpy(x.copy()).long()[None] for x in split[row])
        trained = int((labels[:, 1:] != IGNORE_INDEX).sum())
        total += other(ids, labels=labels).loss.item() * trained
        count += trained
    loss_of = TokenLoss(load_model(tiny_folder)).train()
    for tokens in (1, 100, 300, 100_000):
        assert evaluate(loss_of, split, tokens) == pytest.approx(total / count, rel=1e-5)
    assert loss_of.training, "training goes on as before"


def test_weight_decay_reaches_the_optimizer(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """In the first step B is zero, so A has no gradient and only decays: by learning rate * decay, and not at all
    without; catches a setting that is read and forgotten."""
    decayed = []
    for decay in (0.0, 0.5):
        train = TrainConfig(max_steps=1, learning_rate=0.1, warmup_ratio=0, weight_decay=decay)
        tensors = load_file(run(tiny_folder, data, tmp_path / str(decay), LORA, train) / WEIGHTS_FILE)
        decayed.append({name: value for name, value in tensors.items() if "lora_A" in name})
    for name, value in decayed[0].items():
        torch.testing.assert_close(decayed[1][name], value * (1 - 0.1 * 0.5), atol=1e-7, rtol=1e-6)


def test_gradients_are_clipped_to_the_norm(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logged norm is that before clipping; catches a clip that cuts nothing, and 0 that cuts everything. AdamW
    hardly sees the scale, so the gradients that it is given are looked at."""
    given: list[float] = []
    adamw_step = torch.optim.AdamW.step

    def step(self: Any, *rest: Any) -> Any:
        gradients = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        given.append(torch.stack(gradients).norm().item())
        return adamw_step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for limit in (0.0, 1e-3):
        run(tiny_folder, data, tmp_path / str(limit), LORA, TrainConfig(max_steps=1, max_grad_norm=limit))
    whole, clipped = (read_metrics(tmp_path / str(limit))["grad_norm"][0][1] for limit in (0.0, 1e-3))
    assert whole == clipped > 0.01
    assert given == [pytest.approx(whole, rel=1e-4), pytest.approx(1e-3, rel=1e-3)]


def poison(monkeypatch: pytest.MonkeyPatch, good: Container[int], value: float = torch.nan) -> None:
    """The losses of all training batches are `value`, but for those with numbers in `good`, and the two that try out
    the largest batch."""
    forward, calls = TokenLoss.forward, itertools.count(-2)

    def poisoned(self: TokenLoss, *batch: Any) -> Any:
        bad = self.training and (number := next(calls)) >= 0 and number not in good
        return forward(self, *batch) * (value if bad else 1.0)

    monkeypatch.setattr(TokenLoss, "forward", poisoned)


WHOLE = replace(SHORT, epochs=2, micro_batch_tokens=10_000)  # ten steps of one micro-batch


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_steps_that_are_not_finite_are_skipped_and_at_last_end_the_run(
    tiny_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: float,
) -> None:
    """Catches a run that goes on with NaN for hours, an adapter of NaN that looks whole, and rows that are not named.
    What is known of the run up to there stays: the state of the last good step can still be read, and is finite."""
    poison(monkeypatch, range(3), value)
    out = tmp_path / "out"
    with pytest.raises(NumericalError, match=r"step 8: loss (nan|inf), .*rows \d.* 5 steps in a row were not finite"):
        run(tiny_folder, data, out, train=replace(WHOLE, save_interval=3))
    said = capsys.readouterr().err
    named = re.findall(r"step (\d+): loss \S+, gradient norm \S+; rows ([\d, ]+) of the train split\. The step", said)
    order = epoch_order(20, 0, 0).tolist() + epoch_order(20, 0, 1).tolist()
    expected = [(str(n + 1), ", ".join(map(str, sorted(order[4 * n : 4 * n + 4])))) for n in range(3, 7)]
    assert named == expected
    assert not (out / CONFIG_FILE).exists() and not list(tmp_path.glob(".*"))
    assert [step for step, _ in read_metrics(out)["loss"]] == [1, 2, 3]
    states = find_states(out / STATES_DIR)
    assert [state.name for state in states] == ["step-000003", "step-000006"]
    weights = [load_file(state / WEIGHTS_FILE) for state in states]
    assert all(tensor.isfinite().all() for part in weights for tensor in part.values())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "a skipped step changes nothing"
    assert (states[0] / OPTIMIZER_FILE).read_bytes() == (states[1] / OPTIMIZER_FILE).read_bytes()


def test_a_run_survives_steps_that_are_not_finite_here_and_there(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a count that is not set back by a good step, and a NaN that stays in the gradients for the next one."""
    good = [0, 1, 5, 6]  # not 2, 3, 4, nor 7, 8, 9: six in all
    poison(monkeypatch, good)
    out = run(tiny_folder, data, tmp_path / "out", train=WHOLE)
    assert [step for step, _ in read_metrics(out)["loss"]] == [n + 1 for n in good]
    report = json.loads((out / REPORT_JSON).read_text("utf-8"))
    assert any("6 steps skipped" in warning["what"] for warning in report["warnings"]), "the page says so, too"
    assert base_of(out) == tiny_folder
    assert all(tensor.isfinite().all() for tensor in load_file(out / WEIGHTS_FILE).values())


def test_weights_that_are_not_finite_are_never_written(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a state, or a result, of values that overflowed in the optimizer although every gradient was finite."""
    out = tmp_path / "out"

    def overflow(self: Any, *rest: Any) -> None:
        for group in self.param_groups:
            group["params"][0].data.fill_(torch.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        with pytest.raises(NumericalError, match="is not finite after step 1: no state of it is written"):
            run(tiny_folder, data, out, train=replace(SHORT, max_steps=1))
    assert [state.name for state in find_states(out / STATES_DIR)] == ["step-000000"] and not (
        out / CONFIG_FILE
    ).exists()


def test_a_loss_that_jumps_is_remarked(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a warning at every step, none at all, and one that does not say which rows it is about."""
    forward, calls = TokenLoss.forward, itertools.count(-1)  # the largest batch is tried out twice before

    def jumping(self: TokenLoss, *batch: Any) -> Any:
        return forward(self, *batch) * (10 if self.training and next(calls) == 30 else 1)

    monkeypatch.setattr(TokenLoss, "forward", jumping)
    run(tiny_folder, data, tmp_path / "out", train=replace(WHOLE, epochs=7, learning_rate=1e-5, eval_interval=1000))
    said = capsys.readouterr().err
    losses = np.array([loss for _, loss in read_metrics(tmp_path / "out")["loss"]])
    far = []
    for step in range(21, 36):
        before = losses[: step - 1]
        if losses[step - 1] > np.median(before) + 6 * np.median(abs(before - np.median(before))):
            far.append(step)
    assert [int(step) for step in re.findall(r"step (\d+): loss \S+ stands far above", said)] == far
    rows = epoch_order(20, 0, 5)[16:].tolist()
    assert 30 in far and len(far) < 8, "the jump, and little else"
    assert re.search(
        rf"step 30: loss 6\S+ stands far above the last 29 steps \(median 6\..*rows "
        rf"{', '.join(map(str, sorted(rows)))} of the train split",
        said,
    )


def never_fits(*arguments: Any) -> None:
    raise AssertionError("training began")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors must come before the first step."""
    monkeypatch.setattr(Trainer, "step", never_fits)
    monkeypatch.setattr(Trainer, "evaluate", never_fits)


@pytest.mark.usefixtures("no_training")
def test_a_folder_that_holds_a_run_is_not_written_over(tiny_folder: Path, data: Path, short_run: Path) -> None:
    """Catches an adapter that is lost to a second run under its name."""
    before = (short_run / WEIGHTS_FILE).read_bytes()
    with pytest.raises(UserError, match=f"already holds {CONFIG_FILE}"):
        run(tiny_folder, data, short_run)
    assert (short_run / WEIGHTS_FILE).read_bytes() == before


@pytest.mark.usefixtures("no_training")
def test_data_of_another_tokenizer_is_refused(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches training on ids that mean other words to this model."""
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|other|>"))
    settings = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(settings.replace("<|im_start|>", "<|other|>"))
    with pytest.raises(DataError, match="prepare it again with --tokenizer_path"):
        run(other, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_training")
def test_a_sample_longer_than_the_model_reads_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches positions that the model was never trained on."""
    rows = [*ROWS, {"instruction": "Count. " * 120, "input": "", "output": "1"}]
    data = prepare(tmp_path / "data", tiny_folder, rows, max_seq_length=2048)
    with pytest.raises(DataError, match=r"longest sample has \d+ tokens.*reads 256; prepare the data with a smaller"):
        run(tiny_folder, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", ["train", "test"])
def test_a_split_without_a_trained_token_is_refused(tiny_folder: Path, data: Path, tmp_path: Path, name: str) -> None:
    """Catches a division by zero at the first step, after the model was loaded and evaluated."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    samples = {"train": [Sample([5, 6, 7], [5, 6, 7])] * 8, "test": [Sample([5, 6, 7], [5, 6, 7])] * 2}
    samples[name] = [Sample([5, 6, 7], [5, IGNORE_INDEX, IGNORE_INDEX])] * 8  # the first is never predicted
    for split in ("train", "test"):
        shutil.rmtree(folder / split)
    write_splits(folder, samples)
    with pytest.raises(DataError, match=f"no token of the {name} split carries a loss"):
        run(tiny_folder, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def lose_meta(checkpoint: Path, data: Path) -> None:
    (data / "meta.json").unlink()


def lose_split(checkpoint: Path, data: Path) -> None:
    shutil.rmtree(data / "train")


def lose_weights(checkpoint: Path, data: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


def lose_config(checkpoint: Path, data: Path) -> None:
    (checkpoint / "config.json").unlink()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("damage", "error"),
    [(lose_meta, DataError), (lose_split, DataError), (lose_weights, CheckpointError), (lose_config, CheckpointError)],
)
def test_missing_parts_are_named(
    tiny_folder: Path, data: Path, tmp_path: Path, damage: Callable[[Path, Path], None], error: type[UserError]
) -> None:
    """Catches a traceback, and a folder that is left behind."""
    checkpoint, copied = tmp_path / "checkpoint", tmp_path / "data"
    shutil.copytree(tiny_folder, checkpoint)
    shutil.copytree(data, copied)
    damage(checkpoint, copied)
    with pytest.raises(error, match=str(tmp_path)):
        run(checkpoint, copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_training")
def test_a_target_that_matches_nothing_is_refused(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a folder that is left behind by a wrong setting."""
    with pytest.raises(UserError, match="did you mean q_proj"):
        run(tiny_folder, data, tmp_path / "out", LoRAConfig(target_modules=["q_porj"]))
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_not_loaded_on_a_base_that_was_changed(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a base that is replaced after training, in the folder that the adapter names."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    out = run(base, data, tmp_path / "out", LORA, TrainConfig(max_steps=1))
    load(out, precision="32-true")
    from safetensors.torch import save_file

    tensors = load_file(base / "model.safetensors")
    save_file({name: value * 1.5 for name, value in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="is not the base that"):
        load(out, precision="32-true")


@pytest.mark.usefixtures("no_training")
def test_what_the_adapter_folder_needs_is_read_before_training(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a run that is lost at its end because a file of the data folder is gone."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"chat_template\.jinja does not exist"):
        run(tiny_folder, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_sample_prompts_answers_none(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches answers that cost time although nobody wants them, and training that depends on them."""
    short = replace(SHORT, max_steps=2)
    with_them, without = (
        run(tiny_folder, data, tmp_path / name, train=train)
        for name, train in (("with", replace(short, sample_prompts=4)), ("without", replace(short, sample_prompts=0)))
    )
    assert (with_them / WEIGHTS_FILE).read_bytes() == (without / WEIGHTS_FILE).read_bytes()
    assert not (without / SAMPLES_FILE).exists() and read_metrics(without)["stopped"] == []
    assert read_metrics(with_them)["loss"] == read_metrics(without)["loss"]
    assert len((with_them / SAMPLES_FILE).read_text("utf-8").splitlines()) == 2 * 4


def test_a_data_folder_without_test_rows_trains_and_says_so(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that ends, or is silent, because a file for people is missing."""
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "test.jsonl").unlink()
    out = run(tiny_folder, tmp_path / "data", tmp_path / "out", train=replace(SHORT, max_steps=1, sample_prompts=4))
    assert "no sample answers: " in capsys.readouterr().err and (out / CONFIG_FILE).exists()


def test_an_absent_logger_is_said_before_anything_is_made(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that stops after minutes of loading because a package is missing."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    options: dict[str, Any] = {"train": SHORT, "precision": "32-true", "seed": 0, "arguments": {}}
    with pytest.raises(ResourceError, match=r"lit_llama\[wandb\]"):
        finetune(LoRA(LORA), tiny_folder, data, tmp_path / "out", loggers=["wandb"], **options)
    assert not (tmp_path / "out").exists()


def test_the_best_adapter_is_left_and_the_run_stops(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test losses are made up, so that step 4 is the best; catches an adapter of another step under `keep best`, and
    patience that is not kept. With `keep last` the same run leaves other bytes."""
    for keep in ("best", "last"):
        losses = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0, 1.0])
        monkeypatch.setattr(loop, "evaluate", lambda *_, losses=losses: next(losses))
        train = TrainConfig(epochs=4, batch_size=4, learning_rate=1e-3, eval_interval=2, patience=3)
        train = replace(train, keep=keep)  # type: ignore[arg-type]
        run(tiny_folder, data, tmp_path / keep, LORA, train)
        assert [step for step, _ in read_metrics(tmp_path / keep)["loss"]] == list(range(1, 11))
    kept, last = (load_file(tmp_path / keep / WEIGHTS_FILE) for keep in ("best", "last"))
    assert any(not torch.equal(kept[name], last[name]) for name in last)
