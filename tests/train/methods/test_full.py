"""Full fine-tuning: it learns, goes on exactly, steps as torch does, and leaves a model that others read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file, save_file
from small_runs import ROWS, SHORT, Killed, stop_after
from small_runs import twenty_rows as twenty_rows  # a fixture

from lit_llama import device
from lit_llama.generate.answer import answer_all
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.llm import load
from lit_llama.model.files.checkpoint import load_model
from lit_llama.text.dataset.batches import epoch_order
from lit_llama.text.dataset.folder import Split
from lit_llama.text.message import IGNORE_INDEX, instruct
from lit_llama.train.config import RunConfig, TrainConfig
from lit_llama.train.logs.metrics import METRICS_FILE, read_metrics
from lit_llama.train.loop import Trainer, evaluate
from lit_llama.train.loss import TokenLoss
from lit_llama.train.methods.method import Full
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.train.run import finetune
from lit_llama.train.state import STATES_DIR, find_states

WEIGHTS = "model.safetensors"
STEPS = 6
SIX = TrainConfig(
    epochs=2, batch_size=8, micro_batch_tokens=150, learning_rate=1e-3, eval_interval=2, save_interval=1, keep="best"
)
IDS = torch.tensor([[5, 80, 200, 31, 7, 7, 340]])


def run(
    checkpoint: Path, data: Path, out: Path, train: TrainConfig = SHORT, resume: str = "never", **changes: Any
) -> Path:
    """finetune as the door of full fine-tuning calls it."""
    folders: dict[str, Any] = {"checkpoint_dir": checkpoint, "data_dir": data, "out_dir": out}
    settings: dict[str, Any] = {"precision": "32-true", "resume": resume, "seed": 0, "strategy": "ddp"} | changes
    finetune(Full(changes.get("dtype")), RunConfig(**folders, train=train, **settings))
    return out


def in_bfloat16(source: Path, target: Path) -> Path:
    """The same checkpoint as its publisher would store it."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    save_file({name: value.bfloat16() for name, value in load_file(source / WEIGHTS).items()}, target / WEIGHTS)
    config = json.loads((source / "config.json").read_text())
    name = "dtype" if "dtype" in config else "torch_dtype"
    (target / "config.json").write_text(json.dumps(config | {name: "bfloat16"}))
    return target


def test_twenty_rows_are_learned_by_heart(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches weights that stay frozen, a gradient that is lost, and a folder that is not the model that was trained:
    its answers are the rows', and they stop by themselves."""
    train = TrainConfig(epochs=40, batch_size=10, learning_rate=3e-3, schedule="linear", eval_interval=1000)
    out = run(tiny_folder, data, tmp_path / "out", replace(train, sample_prompts=0))
    series = read_metrics(out)
    assert series["loss"][0][1] > 3 and series["loss"][-1][1] < 0.05
    held = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    rows = [row for row in ROWS if row not in held]
    answers = answer_all(
        load(out, precision="32-true"),
        [instruct(row["instruction"], row["input"], row["output"]) for row in rows],
        Sampling(max_new_tokens=60),
    )
    assert [answer.text for answer in answers] == [row["output"] for row in rows]
    assert all(answer.stopped for answer in answers)


def weights_of(out: Path) -> dict[str, bytes]:
    """The bytes of the result, and of the last state."""
    last = find_states(out / STATES_DIR)[-1]
    paths = [out / WEIGHTS, last / WEIGHTS, last / OPTIMIZER_FILE, last / "best.safetensors", out / METRICS_FILE]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths[1:-1]} | {
        path.name: path.read_bytes() for path in (paths[0], paths[-1])
    }


@pytest.fixture(scope="module")
def half(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in bfloat16. Do not change it."""
    return in_bfloat16(tiny_folder, tmp_path_factory.mktemp("half") / "base")


@pytest.fixture(scope="module")
def straight(half: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in bf16-mixed without a stop. Do not change it."""
    out = tmp_path_factory.mktemp("straight") / "out"
    return run(half, data, out, replace(SIX, sample_prompts=0), precision="bf16-mixed")


@pytest.mark.parametrize("last", [1, 3, STEPS - 1])  # ahead of the first test loss, the end of an epoch
def test_a_run_that_goes_on_ends_with_the_same_bytes(
    half: Path, data: Path, straight: Path, tmp_path: Path, last: int
) -> None:
    """From a base in bfloat16; catches a state that holds the weights rounded to it."""
    settings = {"train": replace(SIX, sample_prompts=0), "precision": "bf16-mixed"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, last)
        run(half, data, tmp_path / "out", **settings)
    torch.manual_seed(last)
    run(half, data, tmp_path / "out", **settings, resume="auto")
    assert weights_of(tmp_path / "out") == weights_of(straight)


def test_the_best_weights_of_before_a_stop_are_kept(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is lowest after step 2, the run is killed in step 4; catches a state without the best weights."""
    losses = {0: 9.0, 2: 1.0, 4: 5.0, 6: 4.0}
    monkeypatch.setattr(Trainer, "evaluate", lambda self: losses[self.progress.step])
    train = replace(SIX, sample_prompts=0)
    straight = run(tiny_folder, data, tmp_path / "straight", train)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 3)
        run(tiny_folder, data, tmp_path / "out", train)
    run(tiny_folder, data, tmp_path / "out", train, resume="auto")
    assert weights_of(tmp_path / "out") == weights_of(straight)
    last = find_states(straight / STATES_DIR)[-1]
    assert (straight / WEIGHTS).read_bytes() != (last / WEIGHTS).read_bytes(), "the best are not the last"


def test_the_result_is_in_the_dtype_of_the_base_and_states_in_theirs(half: Path, straight: Path) -> None:
    """Catches a result twice as large as its base, states that lose bits, and a config.json that says otherwise."""
    state = find_states(straight / STATES_DIR)[-1]
    for folder, dtype in ((straight, torch.bfloat16), (state, torch.float32)):
        stored = load_file(folder / WEIGHTS)
        assert {value.dtype for value in stored.values()} == {dtype}
        assert stored.keys() == load_file(half / WEIGHTS).keys(), "tied weights are stored once"
        config = json.loads((folder / "config.json").read_text())
        assert (config.get("dtype") or config["torch_dtype"]) == str(dtype)[6:] and config["tie_word_embeddings"]
    moved = load_file(state / WEIGHTS)
    assert all(not torch.equal(moved[name], value.float()) for name, value in load_file(half / WEIGHTS).items())


def test_transformers_says_the_same(straight: Path) -> None:
    """The result, and a state, in transformers; catches names, a head or a template that only we understand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (straight, find_states(straight / STATES_DIR)[-1]):
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            theirs = other(IDS).logits[0]
            torch.testing.assert_close(load_model(folder, dtype=torch.float32)(IDS[0]), theirs, atol=1e-4, rtol=1e-4)
        text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": "Zoë"}], tokenize=False
        )
        assert "### Instruction:\nZoë" in text, "the style of the data, not of the base"


def test_a_step_is_that_of_torch_on_transformers_own_model(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Loss, norm and every weight after one step with decay and clipping; catches a weight that is left out or given
    twice, a head whose gradient lacks the embedding's part, and a decay that reaches the norms."""
    from transformers import AutoModelForCausalLM

    config = TrainConfig(
        max_steps=1, batch_size=8, micro_batch_tokens=150, learning_rate=1e-2, warmup_ratio=0, weight_decay=0.1
    )
    out = run(tiny_folder, data, tmp_path / "out", replace(config, sample_prompts=0, eps=1e-3))
    other = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).train()
    split, total, count = Split(data, "train"), torch.zeros(()), 0
    for row in epoch_order(len(split), 0, 0)[:8].tolist():
        ids, labels = (torch.from_numpy(x.copy()).long()[None] for x in split[row])
        trained = int((labels[:, 1:] != IGNORE_INDEX).sum())
        total = total + other(ids, labels=labels).loss * trained
        count += trained
    (total / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    matrices, vectors = ([p for p in other.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-2, eps=1e-3).step()
    series = read_metrics(out)
    assert series["loss"][0][1] == pytest.approx((total / count).item(), rel=1e-5)
    assert series["grad_norm"][0][1] == pytest.approx(norm.item(), rel=1e-4)
    ours, base = load_file(out / WEIGHTS), load_file(tiny_folder / WEIGHTS)
    for name, wanted in other.state_dict().items():
        if name in ours:
            torch.testing.assert_close(ours[name], wanted, atol=2e-5, rtol=0)
            assert not torch.equal(ours[name], base[name]), name


def test_the_best_weights_are_kept(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """A run that goes astray after its start; catches a result that is the last model and not the best one."""
    train = replace(SIX, sample_prompts=0, learning_rate=1.0, schedule="constant", warmup_steps=3, eval_interval=1)
    out = run(tiny_folder, data, tmp_path / "out", train)
    losses = read_metrics(out)["test_loss"][1:]
    best = min(losses, key=lambda pair: pair[1])
    assert best[0] < STEPS
    found = evaluate(TokenLoss(load_model(out)), Split(data, "test"), 256)
    assert found == pytest.approx(best[1], rel=1e-5) and found < 0.99 * losses[-1][1]


def test_mixed_precisions_hold_trained_weights_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches master weights in half, in which most steps of full fine-tuning are lost, chosen unasked."""
    cpu = torch.device("cpu")
    for fast, named in ((True, "float32 and bfloat16"), (False, "float32")):
        able = device.Capabilities(kind="cpu", bfloat16=fast)
        monkeypatch.setattr(device, "capabilities", lambda _, able=able: able)
        assert str(device.numerics("auto", cpu, whole=True)) == named
    for precision in ("auto", "bf16-mixed", "16-mixed", "32-true"):
        found = device.gpu_numerics(precision, whole=True)  # type: ignore[arg-type]
        assert found.linear == found.rest == torch.float32
    assert device.gpu_numerics("bf16-true", whole=True).linear == torch.bfloat16


def test_the_door_trains_and_the_model_answers(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """From the command line to an answer; catches a flag that is lost, a count that is wrong, and a plan that is not
    that of all weights."""
    flags: list[object] = ["--checkpoint_dir", tiny_folder, "--data_dir", data, "--out_dir", tmp_path / "out"]
    flags += ["--precision", "32-true", "--train.max_steps", 2, "--dtype", "bfloat16", "--train.sample_prompts", 1]
    planned = run_here("finetune/full.py", *flags, "--plan")
    count = sum(value.numel() for value in load_file(tiny_folder / WEIGHTS).values())
    assert planned.returncode == 0 and f"{count:,} values, float32" in planned.stdout, planned.stderr
    assert "merging" not in planned.stdout and not (tmp_path / "out").exists()
    done = run_here("finetune/full.py", *flags)
    assert done.returncode == 0, done.stderr
    assert f"{count:,} trainable parameters (all of them)" in done.stderr
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["run"]["trainable"] == count and meta["run"]["method"] == "full"
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    asked = ("--checkpoint_dir", tmp_path / "out", "--prompt", "Order 2 lamps.", "--max_new_tokens", 5)
    answer = run_here("generate/instruct.py", *asked)
    assert answer.returncode == 0 and "tokens in" in answer.stderr, answer.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "finetune/full.py --config" in page and "finetune/merge.py" not in page
    again = run_here("finetune/full.py", "--config", tmp_path / "out" / "run.yaml", "--resume", "auto")
    assert again.returncode == 0 and "the run is finished" in again.stderr, again.stderr
