"""An adapter of mlx-lm as a PEFT folder, against mlx-lm's formula on the plain matrices."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from foreign_adapters import IDS, peft_logits
from safetensors.torch import save_file
from torch import Tensor

from lit_llama.conversion.layouts.mlx import WEIGHTS_FILE, convert_mlx
from lit_llama.errors import CheckpointError
from lit_llama.generate.llm import load
from lit_llama.model.files.checkpoint import load_model

SCALE, RANK = 3.0, 4
MODULES = ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj")


def write(base: Path, folder: Path, kind: str, **parameters: Any) -> tuple[Path, dict[str, Tensor]]:
    """An adapter as mlx-lm saves it; gives also the matrices that its formula makes of the base's."""
    torch.manual_seed(0)
    weights, tensors, merged = dict(load_model(base).named_parameters()), {}, {}
    for name in MODULES:
        weight = weights[f"{name}.weight"]
        a, b = 0.1 * torch.randn(weight.shape[1], RANK), 0.1 * torch.randn(RANK, weight.shape[0])
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        whole = weight + (SCALE * b.T) @ a.T
        if kind == "dora":
            m = weight.norm(dim=1) * 1.2
            tensors[f"{name}.m"] = m
            whole = (m / whole.norm(dim=1))[:, None] * whole
        merged[f"{name}.weight"] = whole
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_FILE)
    settings = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": {"rank": RANK, "scale": SCALE} | parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, merged


@pytest.mark.parametrize(
    ("kind", "parameters"), [("lora", {}), ("dora", {}), ("lora", {"scale": 1.5, "alpha": 2.0 * RANK})]
)
def test_an_adapter_of_mlx_becomes_a_peft_folder(
    tiny_folder: Path, tmp_path: Path, kind: str, parameters: dict[str, Any]
) -> None:
    """Catches matrices the wrong way round, and a scale that is divided by the rank once more."""
    folder, merged = write(tiny_folder, tmp_path / "mlx", kind, **parameters)
    made = tmp_path / "made"
    done = run_here("prepare/checkpoint.py", "--source", folder, "--base_dir", tiny_folder, "--destination_path", made)
    assert done.returncode == 0, done.stderr
    model = load_model(tiny_folder)
    model.load_state_dict(merged, strict=False)
    wanted = model(IDS)
    assert (load(made, precision="32-true", packed=False).model(IDS) - wanted).abs().max() <= 2e-4
    assert (peft_logits(tiny_folder, made) - wanted).abs().max() <= 2e-4


def test_what_is_no_lora_of_the_base_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a traceback, and an adapter of a larger model put on a small one."""
    folder, _ = write(tiny_folder, tmp_path / "mlx", "full")
    with pytest.raises(CheckpointError, match="fine_tune_type is 'full', expected lora or dora"):
        convert_mlx(folder, tiny_folder, tmp_path / "made")
    folder, _ = write(tiny_folder, tmp_path / "other", "lora")
    save_file({"model.layers.9.self_attn.q_proj.lora_a": torch.ones(64, 4)}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"adapts model\.layers\.9\.self_attn\.q_proj, which is no linear layer"):
        convert_mlx(folder, tiny_folder, tmp_path / "made")
    name = MODULES[0]
    save_file({f"{name}.lora_a": torch.ones(32, 4), f"{name}.lora_b": torch.ones(4, 64)}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"lora_a is \(32, 4\), .* needs \(64, 4\)"):
        convert_mlx(folder, tiny_folder, tmp_path / "made")
    save_file({f"{name}.lora_a": torch.ones(64, 4)}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"1 missing .*lora_b"):
        convert_mlx(folder, tiny_folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()
