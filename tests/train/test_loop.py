"""Whole training runs on the tiny model: they learn, repeat, and leave a folder that says what they did."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import LORA, ROWS, SHORT, run
from small_runs import short_run as short_run  # a fixture
from small_runs import twenty_rows as twenty_rows  # a fixture

from lit_llama.errors import IntegrityError
from lit_llama.folder.manifest import MANIFEST
from lit_llama.generate.answer import answer_all
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.llm import load
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, META_FILE, WEIGHTS_FILE, base_of
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import fingerprint, load_model
from lit_llama.text.dataset.folder import Split
from lit_llama.text.message import IGNORE_INDEX, instruct
from lit_llama.train import loop
from lit_llama.train.config import TrainConfig
from lit_llama.train.logs.metrics import METRICS_FILE, TIMING_FILE, read_metrics
from lit_llama.train.logs.report.run_report import REPORT_HTML, REPORT_JSON
from lit_llama.train.logs.sampler import SAMPLES_FILE
from lit_llama.train.loop import Trainer, evaluate
from lit_llama.train.loss import TokenLoss
from lit_llama.train.run import RUN_FILE
from lit_llama.train.state import STATES_DIR


def test_twenty_rows_are_learned_by_heart(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches whatever keeps a model from learning: a wrong shift, a lost gradient, a frozen adapter, an end that is
    never trained. Loss falls to nearly nothing, and generation gives the answers back and stops by itself."""
    train = TrainConfig(
        epochs=40, batch_size=10, learning_rate=1e-2, schedule="linear", eval_interval=1000, sample_prompts=0
    )
    # With the head, as a random one cannot speak out: its logits stay so small that the loss ends above 0.05.
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoRAConfig(r=16, alpha=32, target_modules=[*linears, "lm_head"])
    out = run(tiny_folder, data, tmp_path / "out", lora, train)
    series = read_metrics(out)
    assert series["loss"][0][1] > 3 and series["loss"][-1][1] < 0.05
    assert [step for step, _ in series["loss"]] == list(range(1, 81))
    llm = load(out, precision="32-true")
    trained = [row for row in ROWS if row not in held_out(data)]
    examples = [instruct(row["instruction"], row["input"], row["output"]) for row in trained]
    answers = answer_all(llm, examples, Sampling(max_new_tokens=60))
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
        MANIFEST,
    }
    meta = json.loads((short_run / META_FILE).read_text())
    where = {"path": str(tiny_folder), "absolute": str(tiny_folder.resolve())}
    weights = tiny_folder / "model.safetensors"
    whole = {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "size": weights.stat().st_size}
    assert meta["base"] == where | {"fingerprint": fingerprint(tiny_folder), "files": {weights.name: whole}}
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
        train = TrainConfig(max_steps=1, learning_rate=0.1, warmup_ratio=0, weight_decay=decay, sample_prompts=0)
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
        train = TrainConfig(max_steps=1, max_grad_norm=limit, sample_prompts=0)
        run(tiny_folder, data, tmp_path / str(limit), LORA, train)
    whole, clipped = (read_metrics(tmp_path / str(limit))["grad_norm"][0][1] for limit in (0.0, 1e-3))
    assert whole == clipped > 0.01
    assert given == [pytest.approx(whole, rel=1e-4), pytest.approx(1e-3, rel=1e-3)]


def test_gradients_stay_where_they_are_and_begin_at_zero(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gradients that are made anew among the activations, and those of a step that the next one adds to."""
    places: list[set[int]] = []
    left: list[bool] = []
    trainer_step = Trainer.step

    def step(self: Trainer) -> dict[str, Any]:
        gradients = [parameter.grad for parameter in self.optimizer.param_groups[0]["params"]]
        places.append({gradient.data_ptr() for gradient in gradients})
        left.append(any(bool(gradient.any()) for gradient in gradients))
        return trainer_step(self)

    monkeypatch.setattr(Trainer, "step", step)
    run(tiny_folder, data, tmp_path / "out", LORA, TrainConfig(max_steps=3, sample_prompts=0))
    assert len(places) == 3 and places[0] == places[1] == places[2] and len(places[0]) > 20
    assert left == [False] * 3


def test_an_adapter_is_not_loaded_on_a_base_that_was_changed(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a base that is replaced after training, in the folder that the adapter names."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    out = run(base, data, tmp_path / "out", LORA, replace(SHORT, max_steps=1))
    load(out, precision="32-true")
    from safetensors.torch import save_file

    tensors = load_file(base / "model.safetensors")
    save_file({name: value * 1.5 for name, value in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="is not the base that"):
        load(out, precision="32-true")


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
    for name in ("test.jsonl", MANIFEST):
        (tmp_path / "data" / name).unlink()
    out = run(tiny_folder, tmp_path / "data", tmp_path / "out", train=replace(SHORT, max_steps=1, sample_prompts=4))
    assert "no sample answers: " in capsys.readouterr().err and (out / CONFIG_FILE).exists()


def test_the_best_adapter_is_left_and_the_run_stops(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test losses are made up, so that step 4 is the best; catches an adapter of another step under `keep best`, and
    patience that is not kept. With `keep last` the same run leaves other bytes."""
    for keep in ("best", "last"):
        losses = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0, 1.0])
        monkeypatch.setattr(loop, "evaluate", lambda *_, losses=losses: next(losses))
        train = TrainConfig(epochs=4, batch_size=4, learning_rate=1e-3, eval_interval=2, patience=3, sample_prompts=0)
        train = replace(train, keep=keep)  # type: ignore[arg-type]
        run(tiny_folder, data, tmp_path / keep, LORA, train)
        assert [step for step, _ in read_metrics(tmp_path / keep)["loss"]] == list(range(1, 11))
    kept, last = (load_file(tmp_path / keep / WEIGHTS_FILE) for keep in ("best", "last"))
    assert any(not torch.equal(kept[name], last[name]) for name in last)


def test_a_run_with_noise_is_planned_and_trains(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches noise whose size takes numbers that a plan has not."""
    out = run(tiny_folder, data, tmp_path / "out", train=replace(SHORT, max_steps=1, neftune_noise_alpha=5.0))
    assert (out / CONFIG_FILE).exists()
