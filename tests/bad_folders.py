"""Every kind of folder with weights, whole, for tests to spoil; and what a user is told who hands one to a door."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here, write_adapter
from delta_files import delta_of, folder_of, state_of
from meta_files import write, write_checklist
from plain import Sizes, random_state, write_sentencepiece
from safetensors.torch import load_file, save_file

Folders = dict[str, Path]
Change = Callable[[Folders], Any]
HALF = torch.float16


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Every kind of folder, whole. Do not change it."""
    home = tmp_path_factory.mktemp("originals")
    shutil.copytree(tiny_folder, home / "model")
    state = load_file(tiny_folder / "model.safetensors")
    for name, index, write_part in (
        ("parts", "model.safetensors.index.json", lambda part, path: save_file(part, path, {"format": "pt"})),
        ("torch", "pytorch_model.bin.index.json", torch.save),
    ):
        shutil.copytree(tiny_folder, home / name)
        (home / name / "model.safetensors").unlink()
        weight_map = {}
        for part in (1, 2):
            file = index.replace(".index.json", "").replace(".", f"-{part:05d}-of-00002.")
            names = list(state)[part - 1 :: 2]
            write_part({key: state[key] for key in names}, home / name / file)
            weight_map |= dict.fromkeys(names, file)
        (home / name / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = Sizes()
    write(home / "meta", random_state(sizes, HALF), sizes, write_sentencepiece(home), shards=2)
    (home / "tokenizer.model").unlink()
    write_checklist(home / "meta")
    folder_of(home / "base", state_of(0, 370), tokenizer=False)
    folder_of(home / "delta", delta_of("ziya"))
    write_adapter(home / "adapter", home / "model")
    data = home / "data"
    data.mkdir()
    (data / "rows.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 4))
    rows = ("--data_file_name", "rows.json", "--test_split_size", 2, "--tokenizer_path", home / "model")
    assert run_here("prepare/alpaca.py", "--destination_path", data, *rows).returncode == 0
    return home


@pytest.fixture
def at(originals: Path, tmp_path: Path) -> Folders:
    """Copies that a test may change, by name, and `made`, which is not there."""
    folders = {path.name: Path(shutil.copytree(path, tmp_path / path.name)) for path in originals.iterdir()}
    edit(folders["adapter"] / "adapter_config.json", base_model_name_or_path=str(folders["model"]))
    return folders | {"made": tmp_path / "made"}


def door(name: str, at: Folders, folder: str) -> tuple[object, ...]:
    """The command of a user who takes `folder` for what it is called."""
    made, path = ("--destination_path", at["made"]), at[folder]
    sides = {"base": at["base"], "delta": at["delta"]}
    train = ("--data_dir", at["data"], "--out_dir", at["made"], "--train.max_steps", 1)
    return {
        "convert": ("prepare/checkpoint.py", "--source", path, *made),
        "round": ("prepare/checkpoint.py", "--source", path, *made, "--dtype", "float16"),
        "base": ("prepare/delta.py", "apply", "--base_dir", path, "--delta_dir", sides["delta"], *made),
        "delta": ("prepare/delta.py", "apply", "--base_dir", sides["base"], "--delta_dir", path, *made),
        "merge": ("finetune/merge.py", "--adapter_dir", path, *made, "--precision", "32-true"),
        "finetune": (
            "finetune/lora.py",
            "--checkpoint_dir",
            path,
            *train,
            "--train.batch_size",
            1,
            "--precision",
            "32-true",
        ),
        "generate": ("generate/base.py", "--checkpoint_dir", path, "--max_new_tokens", 1, "--precision", "32-true"),
        "instruct": ("generate/instruct.py", "--checkpoint_dir", path, "--precision", "32-true"),
        "chat": ("generate/chat.py", "--checkpoint_dir", path, "--precision", "32-true"),
    }[name]


def refused(at: Folders, status: int, words: tuple[str, ...], *command: object) -> None:
    """One line with all of these words, the right status, and nothing that looks whole."""
    done = run_here(*command)
    assert done.returncode == status, done
    lines = done.stderr.rstrip("\n").split("\n")
    assert lines[-1].startswith("error: ") and not any("error: " in line for line in lines[:-1]), done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    for word in words:
        assert word.format(**at) in lines[-1], (word, lines[-1])
    made = at["made"]
    assert not made.exists() or not {"config.json", "adapter_config.json", "SHA256SUMS"} & set(os.listdir(made))
    assert not list(made.parent.glob(".made.partial*"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def run(at: Folders) -> None:
        path = next(at[folder].glob("*model.safetensors"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return run
