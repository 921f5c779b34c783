"""Bases to merge into, and what a merge reads and leaves."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_llama.conversion.merge import Proof, merge
from lit_llama.model.files.weights import Weights

SCALE = 2.0  # alpha 8 / r 4, as write_adapter makes them


def copy_base(source: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    shutil.copytree(source, target)
    tensors = {name: value.to(dtype) for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    return copy_base(tiny_folder, tmp_path / "base")


@pytest.fixture
def base16(tiny_folder: Path, tmp_path: Path) -> Path:
    return copy_base(tiny_folder, tmp_path / "base16", torch.bfloat16)


def run(adapter: Path, destination: Path, dtype: str | None = None) -> Proof:
    return merge(adapter, destination, dtype=dtype, precision="32-true")


def read(folder: Path) -> dict[str, Tensor]:
    return dict(Weights(folder))


def read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    raw = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in raw if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): (raw[f"{name}.lora_A.weight"], raw[f"{name}.lora_B.weight"])
        for name in names
    }
