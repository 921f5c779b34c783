"""Weights in 8-bit floats with scales, against the product of each element and its scale."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, write_tokenizer
from safetensors.torch import save_file
from torch import Tensor

from lit_llama.conversion import convert
from lit_llama.errors import CheckpointError
from lit_llama.model.files.checkpoint import load_model

SETTINGS: dict[str, dict[str, Any]] = {
    "blocks": {"quant_method": "fp8", "weight_block_size": [48, 16], "activation_scheme": "dynamic"},
    "rows": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "matrix": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


def scale_of(kind: str, weight: Tensor) -> tuple[str, Tensor]:
    """The stored scale, as random as the weights."""
    rows, columns = weight.shape
    shape = {"blocks": (-(-rows // 48), -(-columns // 16)), "rows": (rows, 1), "matrix": ()}[kind]
    end = "_scale_inv" if kind == "blocks" else "_scale"
    return end, torch.rand(shape) * 0.01 + 0.001


def element_scale(kind: str, scale: Tensor, row: int, column: int) -> float:
    index = {"blocks": (row // 48, column // 16), "rows": (row, 0), "matrix": ()}[kind]
    return float(scale[index])


def write(folder: Path, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """A folder of this kind, and the weights that it stands for, element by element."""
    torch.manual_seed(0)
    tensors, wanted = {}, {}
    for name, value in tiny_model().state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = wanted[name] = value.bfloat16()
            continue
        end, scale = scale_of(kind, value)
        small = (value * 100).to(torch.float8_e4m3fn)
        tensors |= {name: small, name + end: scale}
        if kind == "matrix":
            tensors[name.replace(".weight", ".input_scale")] = torch.ones(())
        factors = [[element_scale(kind, scale, i, j) for j in range(value.shape[1])] for i in range(value.shape[0])]
        wanted[name] = (small.float() * torch.tensor(factors)).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = tiny_model().config.to_dict("bfloat16") | {"quantization_config": SETTINGS[kind]}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder, wanted


@pytest.mark.parametrize("kind", SETTINGS)
def test_eight_bit_floats_become_bfloat16(tmp_path: Path, kind: str) -> None:
    """Catches a scale that is divided by, blocks turned round, a last block that is not whole, and scales of
    activations taken for weights."""
    folder, wanted = write(tmp_path / "m-FP8", kind)
    with pytest.raises(CheckpointError, match=r"8-bit floats.*--source \S*m-FP8 --destination_path \S*m-FP8-bf16"):
        load_model(folder)
    convert(folder, tmp_path / "made")
    found = load_model(tmp_path / "made").state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())


def test_scales_that_are_missing_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Catches values taken without their scale, which run and talk nonsense."""
    folder, _ = write(tmp_path / "a", "blocks")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [32, 32]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"its scale \(\d+, \d+\) with blocks of \(32, 32\)"):
        convert(folder, tmp_path / "made")
    small = tiny_model().state_dict()["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file({"lm_head.weight": small}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored as F8_E4M3 without a scale"):
        convert(folder, tmp_path / "made")
