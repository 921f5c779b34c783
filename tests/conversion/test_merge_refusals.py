"""Merges that are refused or fail: what is told, and that nothing is left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here, write_adapter
from merged_folders import base as base  # a fixture
from merged_folders import base16 as base16  # a fixture
from merged_folders import read, read_adapter, run
from safetensors.torch import load_file, save_file

import lit_llama.conversion.merge as module
from lit_llama.errors import CheckpointError, IntegrityError, ResourceError, UserError


def assert_nothing_left(folder: Path, *known: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(known)


def edit_adapter(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_an_adapter_too_small_for_bfloat16_is_refused_with_the_way_out(base16: Path, tmp_path: Path) -> None:
    """A merged folder in which rounding has undone the training."""
    adapter = write_adapter(tmp_path / "adapter", base16, std=2e-3)
    with pytest.raises(IntegrityError, match="--dtype float32") as caught:
        run(adapter, tmp_path / "merged")
    assert caught.value.exit_status == 6
    assert_nothing_left(tmp_path, "base16", "adapter")
    assert run(adapter, tmp_path / "merged", "float32").mean_difference < 1e-5


def test_an_adapter_that_holds_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    """A copy of the base under a new name."""
    adapter = write_adapter(tmp_path / "adapter", base)
    edit_adapter(adapter, lambda tensors: {n: v * (0 if "lora_B" in n else 1) for n, v in tensors.items()})
    with pytest.raises(CheckpointError, match="only zeros"):
        run(adapter, tmp_path / "merged")
    edit_adapter(adapter, lambda _: {})
    with pytest.raises(CheckpointError, match="is empty"):
        run(adapter, tmp_path / "merged")
    (adapter / "adapter_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(adapter, tmp_path / "merged")
    assert_nothing_left(tmp_path, "base", "adapter")


def test_an_adapter_of_another_base_is_refused(base: Path, base16: Path, tmp_path: Path) -> None:
    """Weights that fit in shape and in nothing else."""
    adapter = write_adapter(tmp_path / "adapter", base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base16)}))
    with pytest.raises(IntegrityError, match="not the base"):
        run(adapter, tmp_path / "merged")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "meta/nowhere"}))
    with pytest.raises(CheckpointError, match="meta/nowhere"):
        run(adapter, tmp_path / "merged")
    assert_nothing_left(tmp_path, "base", "base16", "adapter")


@pytest.mark.parametrize("key", ["model.layers.5.mlp.up_proj", "model.layers.0.mlp.other", "model.norm"])
def test_an_adapter_that_does_not_fit_is_refused(base: Path, tmp_path: Path, key: str) -> None:
    """Updates left out in silence because the model has no such layer."""
    adapter = write_adapter(tmp_path / "adapter", base)
    pair = {f"base_model.model.{key}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    edit_adapter(adapter, lambda tensors: tensors | pair)
    with pytest.raises(CheckpointError, match=f"adapts {key}, which is no linear layer"):
        run(adapter, tmp_path / "merged")
    assert_nothing_left(tmp_path, "base", "adapter")


def test_a_whole_destination_is_refused_before_the_work(base: Path, tmp_path: Path) -> None:
    """The base, or an older model, or what the adapter's folder says of itself, written over."""
    adapter = write_adapter(tmp_path / "adapter", base)
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is the adapter's own folder; name another"):
        run(adapter, tmp_path / "base" / ".." / "adapter")
    with pytest.raises(UserError, match=r"already holds config\.json"):
        run(adapter, base)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        run(adapter, tmp_path / "file")
    assert (base / "model.safetensors").read_bytes() == before
    assert_nothing_left(tmp_path, "base", "adapter", "file")


def test_too_little_memory_is_told_before_the_work(
    base16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an hour of writing that ends in a killed process, and a plan that counts another model."""
    adapter = write_adapter(tmp_path / "adapter", base16)
    weights = sum(value.numel() for value in read(base16).values())
    added = sum(value.numel() for pair in read_adapter(adapter).values() for value in pair)
    needed = 4 * (weights + added)
    held = module.resident_memory()
    monkeypatch.setattr(module, "resident_memory", lambda: held)
    monkeypatch.setattr(module, "total_memory", lambda device: held + needed - 1)
    with pytest.raises(ResourceError, match=r"takes [\d,]+ bytes of the [\d,]+ bytes .* free; --precision bf16-true"):
        run(adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base16", "adapter"}
    monkeypatch.setattr(module, "total_memory", lambda device: held + needed)
    run(adapter, tmp_path / "merged")
    assert "comparing the models takes" in capsys.readouterr().err


def test_a_failure_half_way_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with weights and no proof that looks like a checkpoint."""
    adapter = write_adapter(tmp_path / "adapter", base)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lit_llama.conversion.merge._prove", fail)
    with pytest.raises(OSError, match="disk full"):
        run(adapter, tmp_path / "merged")
    assert_nothing_left(tmp_path, "base", "adapter")


@pytest.mark.parametrize("text", ["", "[1]", '{"model_type": "gpt2"}'])
def test_a_broken_base_is_named(base: Path, tmp_path: Path, text: str) -> None:
    """A traceback out of the JSON module."""
    adapter = write_adapter(tmp_path / "adapter", base)
    (base / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"base/config\.json"):
        run(adapter, tmp_path / "merged")


def test_a_base_in_another_dtype_is_named(base: Path, tmp_path: Path) -> None:
    """A KeyError for a dtype that cannot be merged into."""
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "meta.json").unlink()
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(F64\) is stored in another dtype"):
        run(adapter, tmp_path / "merged")
    assert_nothing_left(tmp_path, "base", "adapter")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--format", "gguf"], "should end in .gguf"),
        (["--dtype", "q8_0"], "needs --format gguf"),
    ],
)
def test_gguf_options_that_do_not_fit_are_told(base: Path, tmp_path: Path, flags: list[str], named: str) -> None:
    """Catches a folder of GGUF's name, and a type that safetensors has not."""
    adapter = write_adapter(tmp_path / "adapter", base)
    for door, source in (
        ("finetune/merge.py", ["--adapter_dir", adapter]),
        ("prepare/checkpoint.py", ["--source", base]),
    ):
        refused = run_here(door, *source, "--destination_path", tmp_path / "made", *flags)
        assert refused.returncode == 2 and named in refused.stderr and not (tmp_path / "made").exists(), refused


def test_a_model_without_a_form_in_gguf_is_refused_before_the_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of merging and comparing that end in a refusal."""
    adapter = write_adapter(tmp_path / "adapter", base)
    path = base / "config.json"
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    }  # whose weights are not normalised
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen3_moe", **experts}))
    monkeypatch.setattr(module, "Merged", None)
    with pytest.raises(
        CheckpointError, match=r"norm_topk_prob is false, which the architecture 'qwen3moe' of llama.cpp"
    ):
        module.merge_into_gguf(adapter, tmp_path / "model.gguf", dtype=None, precision="32-true")
    assert_nothing_left(tmp_path, "base", "adapter")
