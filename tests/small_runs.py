"""Training runs of seconds: twenty rows, a tiny model, and the command as its door gives it."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here

from lit_llama.model.adapters.peft_folder import WEIGHTS_FILE
from lit_llama.model.config import LoRAConfig
from lit_llama.text.config import PrepareConfig
from lit_llama.text.pipeline.alpaca import prepare_alpaca
from lit_llama.train.config import Resume, RunConfig, TrainConfig
from lit_llama.train.logs.metrics import METRICS_FILE
from lit_llama.train.loop import Trainer
from lit_llama.train.methods.method import LoRA
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.train.run import finetune
from lit_llama.train.state import STATE_FILE, STATES_DIR, find_states

COLORS = ("red", "blue", "green", "black", "white")
THINGS = ("lamp", "chair", "table", "cup")
ROWS = [
    {
        "instruction": f"Order {i + 2} {color} {thing}s.",
        "input": "",
        "output": f'{{"{thing}": {i + 2}, "c": "{color}"}}',
    }
    for i, (color, thing) in enumerate((color, thing) for color in COLORS for thing in THINGS)
]
SHORT = TrainConfig(
    epochs=1, batch_size=4, learning_rate=1e-3, micro_batch_tokens=256, eval_interval=2, sample_prompts=0
)
LORA = LoRAConfig(r=2, alpha=4)
STEPS = 12  # two epochs of six, the last step of each with two rows in place of four
TWELVE = TrainConfig(
    epochs=2,
    batch_size=4,
    micro_batch_tokens=150,
    learning_rate=1e-2,
    eval_interval=5,
    save_interval=1,
    sample_prompts=0,
)
DROPOUT = LoRAConfig(r=2, alpha=4, dropout=0.1)


def prepare(folder: Path, tokenizer_dir: Path, rows: list[dict[str, str]], **changes: Any) -> Path:
    """A data folder out of rows in Alpaca's format; four of them are for testing."""
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows))
    settings: dict[str, Any] = {"max_seq_length": 256, "overflow": "error", "split": "shuffle", "test_split_size": 4}
    settings |= {"prompt_style": "alpaca", "seed": 0} | changes
    config = PrepareConfig(destination_path=folder, tokenizer_path=tokenizer_dir, **settings)
    prepare_alpaca(config, "rows.json")
    return folder


def run(
    checkpoint: Path,
    data: Path,
    out: Path,
    lora: LoRAConfig = LORA,
    train: TrainConfig = SHORT,
    seed: int = 0,
    resume: Resume = "never",
) -> Path:
    """finetune as the door of LoRA calls it."""
    folders: dict[str, Any] = {"checkpoint_dir": checkpoint, "data_dir": data, "out_dir": out}
    config = RunConfig(**folders, lora=lora, train=train, precision="32-true", seed=seed, resume=resume)
    finetune(LoRA(lora), config)
    return out


@pytest.fixture(scope="module", name="data")
def twenty_rows(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows to train on, and 4 of them again to test on. Do not change it."""
    return prepare(tmp_path_factory.mktemp("twenty") / "data", tiny_folder, [*ROWS, *ROWS[:4]])


@pytest.fixture(scope="module", name="data")
def twenty_two_rows(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 rows to train on: the last step of an epoch has two. Do not change it."""
    return prepare(tmp_path_factory.mktemp("twenty_two") / "data", tiny_folder, [*ROWS, *ROWS[:6]])


@pytest.fixture(scope="module")
def short_run(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of a small adapter. Do not change it."""
    return run(tiny_folder, data, tmp_path_factory.mktemp("short") / "out")


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


def through_the_door(checkpoint: Path, data: Path, out: Path, *flags: object, door: str = "finetune/lora.py") -> str:
    """A run by the command; gives what it says."""
    made = run_here(door, "--checkpoint_dir", checkpoint, "--data_dir", data, "--out_dir", out, "--seed", 0, *flags)
    assert made.returncode == 0, made.stderr
    return made.stderr


def outcome(out: Path) -> dict[str, Any]:
    """What a run and its repetition must share: the bytes of adapter, optimizer and metrics, and the numbers that the
    next step would depend on."""
    last = find_states(out / STATES_DIR)[-1]
    paths = [last / WEIGHTS_FILE, last / OPTIMIZER_FILE, out / METRICS_FILE]
    found: dict[str, Any] = {path.name: path.read_bytes() for path in paths}
    return found | {
        "result": (out / WEIGHTS_FILE).read_bytes(),
        "state": json.loads((last / STATE_FILE).read_text("utf-8")),
    }


def flags_of(checkpoint: Path, data: Path, out: Path) -> list[object]:
    """The command line of a run of TWELVE."""
    given: list[object] = ["--checkpoint_dir", checkpoint, "--data_dir", data, "--out_dir", out, "--seed", 0]
    given += ["--precision", "32-true", "--lora.r", 2, "--lora.alpha", 4, "--lora.dropout", 0.1]
    for name, value in TWELVE.__dict__.items():
        given += [] if value is None else [f"--train.{name}", value]
    return given
