"""Deltas: the publishers' arithmetic, and the way back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_here, tiny_config
from delta_files import ROWS, assert_same, delta_of, folder_of, plain_sum, read, state_of
from delta_files import base as base  # a fixture

import lit_llama
from lit_llama.conversion.delta import apply, make, verify
from lit_llama.conversion.delta_config import DeltaConfig
from lit_llama.conversion.delta_writing import Policy, blocks, mean_row
from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.model.files.checkpoint import fingerprint, load_model
from lit_llama.model.files.weights import INDEX_FILE, Stored, Weights


@pytest.mark.parametrize("policy", ["ziya", "vicuna", "alpaca"])
def test_a_sum_is_bit_for_bit_that_of_the_publishers_scripts(base: Path, tmp_path: Path, policy: Policy) -> None:
    """Catches sums that are rounded twice, new rows that start wrong, and a vocabulary that is added to a whole one."""
    delta = folder_of(tmp_path / "delta", delta_of(policy))
    apply(base, delta, tmp_path / "merged", DeltaConfig(policy=policy))
    assert_same(read(tmp_path / "merged"), plain_sum(read(base), read(delta), policy))
    assert load_model(tmp_path / "merged").config.vocab_size == ROWS


def test_torch_files_are_added_as_safetensors_are(base: Path, tmp_path: Path) -> None:
    """Catches a base or delta refused for being stored as Ziya's is, and an identity that depends on the container."""
    folders = {"base": base, "delta": folder_of(tmp_path / "delta", delta_of("ziya"))}
    apply(*folders.values(), tmp_path / "merged")
    make(base, tmp_path / "merged", tmp_path / "made")
    for name, folder in folders.items():
        old = Path(shutil.copytree(folder, tmp_path / f"{name}-bin"))
        torch.save(read(folder), old / "pytorch_model.bin")
        (old / "model.safetensors").unlink()
    apply(tmp_path / "base-bin", tmp_path / "delta-bin", tmp_path / "again")
    verify(tmp_path / "again", tmp_path / "base-bin", tmp_path / "delta-bin")
    assert_same(read(tmp_path / "again"), read(tmp_path / "merged"))
    origins = [json.loads((tmp_path / name / "meta.json").read_text())["delta"] for name in ("merged", "again")]
    assert [[origin[side].pop("path") for side in ("base", "delta")] for origin in origins] and origins[0] == origins[1]
    apply(tmp_path / "base-bin", tmp_path / "made", tmp_path / "third")  # which says from which base it was made
    assert fingerprint(base) == origins[0]["base"]["fingerprint"]


def test_equal_shapes_are_added(tmp_path: Path) -> None:
    """Catches a policy `add` that does anything else, and an `auto` that finds another one."""
    base = folder_of(tmp_path / "base", state_of(0, ROWS))
    delta = folder_of(tmp_path / "delta", delta_of("add"))
    for policy in ("add", "auto"):
        apply(base, delta, tmp_path / policy, DeltaConfig(policy=policy))  # type: ignore[arg-type]
        assert_same(read(tmp_path / policy), plain_sum(read(base), read(delta), "add"))


def test_auto_finds_a_whole_embedding_and_never_guesses_how_a_base_grows(base: Path, tmp_path: Path) -> None:
    """Catches a silent choice between zeros and mean rows, which no weight can tell apart."""
    ziya = folder_of(tmp_path / "ziya", delta_of("ziya"))
    apply(base, ziya, tmp_path / "merged")
    assert_same(read(tmp_path / "merged"), plain_sum(read(base), read(ziya), "ziya"))
    other = folder_of(tmp_path / "other", delta_of("vicuna"))
    with pytest.raises(CheckpointError, match=r"384 .* 370: .*--policy vicuna.*--policy alpaca"):
        apply(base, other, tmp_path / "other-merged")
    assert not (tmp_path / "other-merged").exists()


def test_all_bits_survive_extreme_values(tmp_path: Path) -> None:
    """Catches sums that pass through another dtype: every pair of exponents, subnormals and signed zeros included."""
    generator = torch.Generator().manual_seed(0)
    states = [state_of(0, ROWS), delta_of("add")]
    for state in states:
        shape = state["model.layers.0.mlp.up_proj.weight"].shape
        bits = torch.randint(-32768, 32767, shape, generator=generator, dtype=torch.int32).to(torch.int16)
        value = bits.view(torch.float16)
        state["model.layers.0.mlp.up_proj.weight"] = torch.where(value.abs() < 30000, value, torch.zeros(()).half())
    base, delta = (folder_of(tmp_path / name, state) for name, state in zip(("base", "delta"), states, strict=True))
    apply(base, delta, tmp_path / "merged", DeltaConfig(policy="add"))
    assert_same(read(tmp_path / "merged"), plain_sum(*states, "add"))


def test_a_sum_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Catches an infinity that a file would carry to every program that reads it."""
    base, delta = state_of(0, ROWS), delta_of("add")
    base["model.layers.1.mlp.up_proj.weight"][3, 4] = delta["model.layers.1.mlp.up_proj.weight"][3, 4] = 60000
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*not finite in float16"):
        apply(
            folder_of(tmp_path / "b", base),
            folder_of(tmp_path / "d", delta),
            tmp_path / "merged",
            DeltaConfig(policy="add"),
        )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("policy", "rows"), [("ziya", 370), ("vicuna", 370), ("alpaca", 370), ("add", ROWS)])
def test_make_is_the_inverse_of_apply(tmp_path: Path, policy: Policy, rows: int) -> None:
    """Catches a difference with the wrong sign, and rows taken from the wrong side."""
    base = folder_of(tmp_path / "base", state_of(0, rows), tokenizer=False)
    target = folder_of(tmp_path / "target", plain_sum(state_of(0, rows), delta_of(policy), policy))
    make(base, target, tmp_path / "delta", DeltaConfig(policy=policy))
    apply(base, tmp_path / "delta", tmp_path / "again", DeltaConfig(policy=policy))
    again, wanted = read(tmp_path / "again"), read(target)
    for name, value in wanted.items():  # the difference itself was rounded: half a unit of it, and one rounding more
        assert (again[name].float() - value.float()).abs().max() <= 2e-3 * max(1.0, float(value.abs().max())), name
    exact = sum(int((again[name] == wanted[name]).sum()) for name in wanted) / sum(v.numel() for v in wanted.values())
    assert exact > 0.9
    verify(tmp_path / "delta")
    with pytest.raises(IntegrityError, match="made from other weights"):
        other = folder_of(tmp_path / "other", state_of(7, rows), tokenizer=False)
        apply(other, tmp_path / "delta", tmp_path / "wrong", DeltaConfig(policy=policy))


def test_memory_holds_a_block_and_not_a_model(tmp_path: Path) -> None:
    """Catches whole models in memory: a pair of 200 MB each is added with little more than one tensor of 13 MB."""
    shape = {"vocab_size": 4096, "hidden_size": 1600, "intermediate_size": 4096, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 100}
    code = f"""
import resource, sys
from pathlib import Path
import lit_llama.conversion.delta as folders
from lit_llama.conversion.delta_config import DeltaConfig
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folders.apply(*map(Path, {[str(tmp_path / n) for n in ("base", "delta", "sum")]!r}), DeltaConfig(policy="add"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    size = 0
    for name, scale in (("base", 1.0), ("delta", 0.01)):
        with torch.device("meta"):
            from lit_llama.model.llama import LLaMA

            shapes = {key: value.shape for key, value in LLaMA(tiny_config(**shape)).state_dict().items()}
        drawn = (torch.randn(4096 * 1600) * scale).half()  # as large as the largest; new ones for each take seconds
        state = {key: drawn[: value.numel()].reshape(value).clone() for key, value in shapes.items()}
        folder_of(tmp_path / name, state, **{key: value for key, value in shape.items() if key != "vocab_size"})
        size = sum(value.nbytes for value in state.values())
    assert size > 200e6
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 100e6


def test_blocks_cover_every_row_once_and_a_mean_is_a_mean(tmp_path: Path) -> None:
    """Catches rows lost or read twice at the edges of blocks."""
    for shape in ((5, 3), (4_194_305, 2), (1, 1), (0, 4), (7,)):
        rows = [row for start, stop in blocks(shape) for row in range(start, stop)]
        assert rows == list(range(shape[0]))
    value = torch.randn(3000, 5000).half()
    (tmp_path / "raw").write_bytes(value.numpy().tobytes())
    stored = Stored(tmp_path / "raw", 0, torch.float16, (3000, 5000))
    assert len(list(blocks(stored.shape))) > 2
    torch.testing.assert_close(mean_row(stored), value.double().mean(0).float(), rtol=0, atol=1e-8)


def test_the_door_adds_makes_and_verifies(base: Path, tmp_path: Path) -> None:
    """Catches flags that do not reach the functions, and results that go to the wrong stream; a call in Python that
    takes any word for a policy, a dtype or a style and goes on with it."""
    folder_of(tmp_path / "delta", delta_of("ziya"))
    sides = ["--base_dir", base, "--delta_dir", tmp_path / "delta"]
    added = run_here(
        "prepare/delta.py", "apply", *sides, "--destination_path", tmp_path / "sum", "--max_shard_size", "60KB"
    )
    assert added.returncode == 0 and added.stdout == "", added
    assert "policy ziya: embedding and head as they are" in added.stderr
    assert (tmp_path / "sum" / INDEX_FILE).is_file() and len(Weights(tmp_path / "sum")) == 21
    again = lit_llama.add_delta(base, str(tmp_path / "delta"), tmp_path / "again", max_shard_size="60KB")
    for wrong in ({"policy": "zija"}, {"dtype": "bf16"}, {"prompt_style": "zia"}, {"max_shard_size": "many"}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(UserError, match=f"--{name} is '?{value}'?, expected"):
            lit_llama.add_delta(base, tmp_path / "delta", tmp_path / "wrong", **wrong)
    with pytest.raises(UserError, match="did you mean policy"):
        lit_llama.add_delta(base, tmp_path / "delta", tmp_path / "wrong", polices="ziya")
    assert_same(read(again.folder), read(tmp_path / "sum"))
    checked = run_here("prepare/delta.py", "verify", "--merged_dir", tmp_path / "sum", *sides)
    assert checked.returncode == 0 and "bit for bit" in checked.stderr, checked
    made = run_here(
        "prepare/delta.py",
        "make",
        "--base_dir",
        base,
        "--target_dir",
        tmp_path / "sum",
        "--destination_path",
        tmp_path / "d",
    )
    assert made.returncode == 0 and (tmp_path / "d" / "SHA256SUMS").is_file(), made
    wrong = run_here("prepare/delta.py", "apply", *sides, "--destination_path", base)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong
    size = run_here(
        "prepare/delta.py", "apply", *sides, "--destination_path", tmp_path / "x", "--max_shard_size", "many"
    )
    assert size.returncode == 2 and "--max_shard_size is 'many'" in size.stderr


def test_a_delta_of_equal_shapes_needs_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a delta as many are published, weights and config alone, that is refused though the base has all."""
    base = folder_of(tmp_path / "base", state_of(0, ROWS))
    delta = folder_of(tmp_path / "delta", delta_of("add"), tokenizer=False)
    apply(base, delta, tmp_path / "sum")
    assert f"{delta} has no tokenizer: that of {base} is taken" in " ".join(capsys.readouterr().err.split())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "sum" / name).read_bytes() == (base / name).read_bytes()
    assert_same(read(tmp_path / "sum"), plain_sum(read(base), read(delta), "add"))
