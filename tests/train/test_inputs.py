"""What does not fit a run is refused before its first step, and leaves nothing behind."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Sample, write_splits
from small_runs import LORA, ROWS, SHORT, prepare, run
from small_runs import short_run as short_run  # a fixture
from small_runs import twenty_rows as twenty_rows  # a fixture

from lit_llama.errors import CheckpointError, DataError, ResourceError, UserError
from lit_llama.folder.manifest import MANIFEST
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from lit_llama.model.config import LoRAConfig
from lit_llama.text.message import IGNORE_INDEX
from lit_llama.train.config import RunConfig
from lit_llama.train.loop import Trainer
from lit_llama.train.methods.method import LoRA
from lit_llama.train.run import finetune


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
    (folder / MANIFEST).unlink()
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
    (copied / MANIFEST).unlink()
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


@pytest.mark.usefixtures("no_training")
def test_what_the_adapter_folder_needs_is_read_before_training(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a run that is lost at its end because a file of the data folder is gone."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "chat_template.jinja").unlink()
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"chat_template\.jinja does not exist"):
        run(tiny_folder, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_absent_logger_is_said_before_anything_is_made(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that stops after minutes of loading because a package is missing."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = RunConfig(
        checkpoint_dir=tiny_folder, data_dir=data, out_dir=tmp_path / "out", train=SHORT, loggers="wandb"
    )
    with pytest.raises(ResourceError, match=r"lit_llama\[wandb\]"):
        finetune(LoRA(LORA), config)
    assert not (tmp_path / "out").exists()
