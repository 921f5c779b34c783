"""Pairs of folders that are no base and delta: each is told, and no input is ever written to."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_model, write_tokenizer
from delta_files import assert_same, delta_of, folder_of, plain_sum, read, state_of
from delta_files import base as base  # a fixture
from safetensors.torch import save_file

from lit_llama.conversion.delta import apply
from lit_llama.conversion.delta_config import DeltaConfig
from lit_llama.errors import ResourceError, UserError
from lit_llama.folder.manifest import MANIFEST


def refusal(base: Path, delta: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        apply(base, delta, base.parent / "merged", DeltaConfig(**options))
    assert not (base.parent / "merged").exists()
    return str(caught.value)


def test_swapped_and_whole_and_merged_sides_are_told(base: Path, tmp_path: Path) -> None:
    """Catches the three ways to take the wrong folder, which all run through and give a model that babbles."""
    state = delta_of("add", 370)
    delta = folder_of(tmp_path / "delta", state, tokenizer=False)
    write_tokenizer(base)
    assert "seem swapped" in refusal(delta, base)
    tuned = {name: (value.float() + state[name].float() * 0.2).half() for name, value in read(base).items()}
    assert "whole model" in refusal(base, folder_of(tmp_path / "tuned", tuned))
    ziya = folder_of(tmp_path / "ziya", delta_of("ziya"))
    apply(base, ziya, tmp_path / "sum")
    assert "merged already: its meta.json" in refusal(tmp_path / "sum", ziya)
    for name in ("meta.json", MANIFEST):
        (tmp_path / "sum" / name).unlink()
    assert "same embedding of 384 rows: the base is merged already" in refusal(tmp_path / "sum", ziya)


def test_another_size_is_told_in_layers_and_width(base: Path, tmp_path: Path) -> None:
    """Catches a 7B base under a 13B delta, reported as some tensor's shape or not at all."""
    wide = {name: value.half() for name, value in tiny_model(hidden_size=96).state_dict().items()}
    message = refusal(base, folder_of(tmp_path / "wide", wide, hidden_size=96), policy="add")
    assert "2 layers of width 64" in message and "2 layers of width 96" in message
    deep = {name: value.half() for name, value in tiny_model(num_hidden_layers=3).state_dict().items()}
    assert "3 layers of width 64" in refusal(
        base, folder_of(tmp_path / "deep", deep, num_hidden_layers=3), policy="add"
    )
    narrow = delta_of("add", 384) | {
        "model.layers.0.mlp.up_proj.weight": torch.full((7, 64), 0.01).half(),
    }
    assert "up_proj.weight is (112, 64)" in refusal(base, folder_of(tmp_path / "narrow", narrow), policy="vicuna")


def test_growing_needs_a_policy_and_shrinking_has_none(base: Path, tmp_path: Path) -> None:
    """Catches broadcasting or cutting rows where shapes differ."""
    delta = folder_of(tmp_path / "delta", delta_of("vicuna"))
    assert "needs equal shapes" in refusal(base, delta, policy="add")
    large = folder_of(tmp_path / "large", state_of(0, 400), tokenizer=False)
    assert "more rows than the delta" in refusal(large, delta, policy="vicuna")


def test_a_tensor_on_one_side_only_is_told(base: Path, tmp_path: Path) -> None:
    """Catches a walk over one side's names, which loses what only the other side has."""
    for side in ("base", "delta"):
        folder = shutil.copytree(base, tmp_path / side / "base")
        state = {"base": read(folder), "delta": delta_of("ziya")}
        del state[side]["model.layers.1.self_attn.k_proj.weight"]
        save_file(state["base"], folder / "model.safetensors")
        delta = folder_of(tmp_path / side / "delta", state["delta"])
        assert "on one side only, such as model.layers.1.self_attn.k_proj.weight" in refusal(folder, delta)


def test_a_base_that_went_through_bfloat16_is_told(base: Path, tmp_path: Path) -> None:
    """Catches the converter that loads LLaMA-1 in bfloat16: nothing else shows that 7 of 8 weights are wrong."""
    rounded = {name: value.bfloat16().half() for name, value in read(base).items()}
    folder = folder_of(tmp_path / "rounded", rounded, tokenizer=False)
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    assert "went through bfloat16" in refusal(folder, delta)
    apply(folder, delta, tmp_path / "accepted", DeltaConfig(accept_rounded_base=True))
    assert_same(read(tmp_path / "accepted"), plain_sum(rounded, read(delta), "ziya"))
    stored = folder_of(tmp_path / "stored", {n: v.bfloat16() for n, v in read(base).items()}, tokenizer=False)
    assert "BF16" in refusal(stored, delta) and "--dtype" in refusal(stored, delta)


def test_the_tokenizer_must_be_that_of_the_delta(base: Path, tmp_path: Path) -> None:
    """Catches a merged model with the tokenizer of its base, whose new rows nobody ever reaches."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya", 500))
    larger = folder_of(tmp_path / "larger", state_of(0, 400), tokenizer=False)
    assert "tokenizer in" in refusal(larger, delta) and "published" in refusal(larger, delta)
    bare = folder_of(tmp_path / "bare", delta_of("ziya"), tokenizer=False)
    assert "holds no tokenizer" in refusal(base, bare)


def test_a_missing_shard_is_named(base: Path, tmp_path: Path) -> None:
    """Catches a partial download that is merged as far as it goes."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    apply(base, delta, tmp_path / "sum", DeltaConfig(max_shard_size="50KB"))
    lost = sorted((tmp_path / "sum").glob("model-*.safetensors"))[2]
    lost.unlink()
    assert lost.name in refusal(tmp_path / "sum", delta)


def test_no_input_is_ever_written_to(base: Path, tmp_path: Path) -> None:
    """Catches the published scripts' worst fault: the target folder is removed first, also when it is the base."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    before = {path: path.read_bytes() for folder in (base, delta) for path in folder.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(base)
    for destination in (base, delta, base / "sum", link, link / "deep" / "sum", tmp_path, ROOT):
        with pytest.raises(UserError, match=r"already exists|lie in each other"):
            apply(base, delta, destination)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        apply(base, delta, tmp_path / "file")
    assert before == {path: path.read_bytes() for folder in (base, delta) for path in folder.iterdir()}
    (tmp_path / "empty").mkdir()
    apply(base, delta, tmp_path / "empty")  # an empty folder is nobody's loss


def test_a_full_disk_is_told_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of adding that end in `no space left on device`."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"1\.00 kB free, [\d.]+ kB are needed"):
        apply(base, folder_of(tmp_path / "delta", delta_of("ziya")), tmp_path / "merged")
