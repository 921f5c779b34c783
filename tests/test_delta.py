"""Deltas: the publishers' arithmetic, what is refused, what an interruption leaves, and the way back."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_door, run_here, tiny_config, tiny_model, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_llama.convert.delta.folders import apply, make, verify
from lit_llama.convert.delta.policy import Policy, blocks, mean_row
from lit_llama.errors import CheckpointError, IntegrityError, ResourceError, UserError
from lit_llama.folder import read_manifest, resume
from lit_llama.model.checkpoint import fingerprint, load_model
from lit_llama.model.weights import INDEX_FILE, Stored, Weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 384  # of the tokenizer and of every delta
State = dict[str, Tensor]


def state_of(seed: int, rows: int, scale: float = 1.0) -> State:
    """Float16 weights of a tiny model, norms near 1 as in a model, all times `scale` as in a difference."""
    weights = {name: value.clone() for name, value in tiny_model(seed, vocab_size=rows).state_dict().items()}
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            weights[name] = value * 0.1 + (1.0 if scale == 1.0 else 0.0)
    return {name: (value * scale).half() for name, value in weights.items()}


def folder_of(path: Path, state: State, *, tokenizer: bool = True, **config: Any) -> Path:
    """A Hugging Face folder, written by the safetensors package."""
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    settings = tiny_config(vocab_size=len(state[EMBEDDING]), **config).to_dict("float16")
    (path / "config.json").write_text(json.dumps(settings))
    if tokenizer:
        write_tokenizer(path)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of 370 rows, fewer than the tokenizer of the delta has tokens."""
    return folder_of(tmp_path / "base", state_of(0, 370), tokenizer=False)


def delta_of(policy: Policy, rows: int = ROWS) -> State:
    """What a publisher with this policy gives away: small differences, and for ziya a whole embedding and head."""
    state = state_of(1, rows, 0.05)
    if policy == "ziya":
        whole = state_of(2, rows)
        state[EMBEDDING], state[HEAD] = whole[EMBEDDING], whole[HEAD]
    return state


def plain_sum(base: State, delta: State, policy: Policy) -> State:
    """The rules as the publishers wrote them down, in float16 as their scripts add: an independent formula."""
    result = {}
    for name, value in delta.items():
        ground = base[name]
        if name in (EMBEDDING, HEAD) and policy == "ziya":
            result[name] = value
            continue
        if value.shape != ground.shape:
            new = value.shape[0] - ground.shape[0]
            row = torch.zeros_like(ground[:1]) if policy == "vicuna" else ground.double().mean(0, keepdim=True).float()
            ground = torch.cat((ground.to(row.dtype), row.expand(new, -1)))
        result[name] = (ground + value).half()
    return result


def read(folder: Path) -> State:
    """All tensors, by the package."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.int16), value.view(torch.int16)), name  # bits, so -0 is not 0


@pytest.mark.parametrize("policy", ["ziya", "vicuna", "alpaca"])
def test_a_sum_is_bit_for_bit_that_of_the_publishers_scripts(base: Path, tmp_path: Path, policy: Policy) -> None:
    """Catches sums that are rounded twice, new rows that start wrong, and a vocabulary that is added to a whole one."""
    delta = folder_of(tmp_path / "delta", delta_of(policy))
    apply(base, delta, tmp_path / "merged", policy=policy)
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
        apply(base, delta, tmp_path / policy, policy=policy)  # type: ignore[arg-type]
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
    apply(base, delta, tmp_path / "merged", policy="add")
    assert_same(read(tmp_path / "merged"), plain_sum(*states, "add"))


def test_a_sum_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Catches an infinity that a file would carry to every program that reads it."""
    base, delta = state_of(0, ROWS), delta_of("add")
    base["model.layers.1.mlp.up_proj.weight"][3, 4] = delta["model.layers.1.mlp.up_proj.weight"][3, 4] = 60000
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*not finite in float16"):
        apply(folder_of(tmp_path / "b", base), folder_of(tmp_path / "d", delta), tmp_path / "merged", policy="add")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("policy", "rows"), [("ziya", 370), ("vicuna", 370), ("alpaca", 370), ("add", ROWS)])
def test_make_is_the_inverse_of_apply(tmp_path: Path, policy: Policy, rows: int) -> None:
    """Catches a difference with the wrong sign, and rows taken from the wrong side."""
    base = folder_of(tmp_path / "base", state_of(0, rows), tokenizer=False)
    target = folder_of(tmp_path / "target", plain_sum(state_of(0, rows), delta_of(policy), policy))
    make(base, target, tmp_path / "delta", policy=policy)
    apply(base, tmp_path / "delta", tmp_path / "again", policy=policy)
    again, wanted = read(tmp_path / "again"), read(target)
    for name, value in wanted.items():  # the difference itself was rounded: half a unit of it, and one rounding more
        assert (again[name].float() - value.float()).abs().max() <= 2e-3 * max(1.0, float(value.abs().max())), name
    exact = sum(int((again[name] == wanted[name]).sum()) for name in wanted) / sum(v.numel() for v in wanted.values())
    assert exact > 0.9
    verify(tmp_path / "delta")
    with pytest.raises(IntegrityError, match="made from other weights"):
        other = folder_of(tmp_path / "other", state_of(7, rows), tokenizer=False)
        apply(other, tmp_path / "delta", tmp_path / "wrong", policy=policy)


def refusal(base: Path, delta: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        apply(base, delta, base.parent / "merged", **options)
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
    (tmp_path / "sum" / "meta.json").unlink()
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
    apply(folder, delta, tmp_path / "accepted", accept_rounded_base=True)
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
    apply(base, delta, tmp_path / "sum", max_shard_size=50_000)
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
    with pytest.raises(ResourceError, match=r"0\.0 GB free"):
        apply(base, folder_of(tmp_path / "delta", delta_of("ziya")), tmp_path / "merged")


KILLED = """
import os, random, signal, sys
from pathlib import Path
from lit_llama import folder
from lit_llama.convert.delta import writing
from lit_llama.convert.delta.folders import apply
steps, limit = [0], int(sys.argv[4])
def counted(module, name):
    original = getattr(module, name)
    def call(*a, **k):
        steps[0] += 1
        if steps[0] == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*a, **k)
    setattr(module, name, call)
for name in ("combine", "write_shard", "write_index", "_write_settings", "_write_origin", "write_manifest"):
    counted(writing, name)
for name in ("sync", "_line"):
    counted(folder, name)
apply(*map(Path, sys.argv[1:4]), max_shard_size=60_000)
print(steps[0])
"""


def sums(folder: Path) -> dict[str, str]:
    return read_manifest(folder)


def test_a_run_killed_anywhere_goes_on_and_ends_in_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """Catches a folder that looks whole and is not, and a resumed run that keeps a half-written file."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))

    def start(destination: Path, limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, base, delta, destination, limit]
        return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)

    whole = start(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    total = int(whole.stdout)
    draw = random.Random(0)
    for limit in sorted(draw.sample(range(1, total + 1), 5)):
        destination = tmp_path / f"killed-{limit}"
        killed = start(destination, limit)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if destination.exists():  # killed after the commit
            verify(destination)
            continue
        # A second kill, then to the end: more than one interruption in a row must not matter.
        again = start(destination, max(1, limit // 2))
        if again.returncode == 0:
            continue
        apply(base, delta, destination, max_shard_size=60_000)
        assert sums(destination) == sums(tmp_path / "whole") and len(sums(destination)) > 8
        assert not list(tmp_path.glob(".killed*"))


def test_a_resumed_run_does_not_trust_a_damaged_file(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a journal that is believed without looking at the file, and work that is done twice."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    apply(base, delta, tmp_path / "whole", max_shard_size=60_000)
    start = [sys.executable, "-c", KILLED, base, delta, tmp_path / "sum", 40]
    subprocess.run([*map(str, start)], cwd=ROOT, capture_output=True, check=False)
    files = sorted((tmp_path / ".sum.unfinished").glob("model-*.safetensors"))
    assert len(files) > 2
    kept = files[1].stat().st_mtime_ns
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    capsys.readouterr()
    apply(base, delta, tmp_path / "sum", max_shard_size=60_000)
    assert f"going on where it stopped: {len(files) - 1} of" in capsys.readouterr().err
    assert (tmp_path / "sum" / files[1].name).stat().st_mtime_ns == kept
    assert sums(tmp_path / "sum") == sums(tmp_path / "whole")


def test_another_plan_starts_afresh_and_a_second_process_waits_for_nobody(base: Path, tmp_path: Path) -> None:
    """Catches files of another delta in a sum, and two processes that write one folder."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    start = [sys.executable, "-c", KILLED, base, delta, tmp_path / "sum", 40]
    subprocess.run([*map(str, start)], cwd=ROOT, capture_output=True, check=False)
    state = delta_of("ziya")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    other = folder_of(tmp_path / "other", state)
    with resume(tmp_path / "held", "plan"), pytest.raises(ResourceError, match="another run is at work"):
        apply(base, other, tmp_path / "held")
    apply(base, other, tmp_path / "sum", max_shard_size=60_000)
    assert_same(read(tmp_path / "sum"), plain_sum(read(base), state, "ziya"))


def test_the_folder_says_where_it_came_from(base: Path, tmp_path: Path) -> None:
    """Catches provenance that changes with the files' cut, and a manifest that other programs cannot check."""
    delta = folder_of(tmp_path / "delta", delta_of("ziya"))
    apply(base, delta, tmp_path / "one")
    apply(base, delta, tmp_path / "many", max_shard_size=60_000)
    origins = [json.loads((tmp_path / name / "meta.json").read_text())["delta"] for name in ("one", "many")]
    assert origins[0] == origins[1]
    assert origins[0]["policy"] == "ziya" and origins[0]["base"]["path"] == str(base)
    assert origins[0]["base"]["weights_sha256"] != origins[0]["delta"]["weights_sha256"]
    assert set(sums(tmp_path / "many")) == {path.name for path in (tmp_path / "many").iterdir()} - {"SHA256SUMS"}
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "many", check=False)
    assert checked.returncode == 0


@pytest.mark.parametrize("harm", ["bit", "missing", "config", "line"])
def test_verify_finds_any_harm(base: Path, tmp_path: Path, harm: str) -> None:
    """Catches a verification that cannot fail."""
    apply(base, folder_of(tmp_path / "delta", delta_of("ziya")), tmp_path / "sum")
    folder = tmp_path / "sum"
    verify(folder, base, tmp_path / "delta")
    if harm == "bit":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[random.Random(0).randrange(len(data))] ^= 4
        (folder / "model.safetensors").write_bytes(data)
    elif harm == "missing":
        (folder / "tokenizer.json").unlink()
    elif harm == "config":
        (folder / "config.json").write_text((folder / "config.json").read_text().replace("384", "385"))
    else:
        (folder / "SHA256SUMS").write_text("0" * 64 + "  ../base/config.json\n")
    with pytest.raises(IntegrityError, match=r"damaged|missing"):
        verify(folder, base, tmp_path / "delta")


def test_verify_adds_rows_again(base: Path, tmp_path: Path) -> None:
    """Catches a verification by manifest alone: the files are as written, but of another sum."""
    apply(base, folder_of(tmp_path / "delta", delta_of("ziya")), tmp_path / "sum")
    state = delta_of("ziya")
    state["model.layers.1.mlp.down_proj.weight"] *= 0.5
    with pytest.raises(IntegrityError, match=r"down_proj\.weight is not the sum"):
        verify(tmp_path / "sum", base, folder_of(tmp_path / "other", state))


def test_memory_holds_a_block_and_not_a_model(tmp_path: Path) -> None:
    """Catches whole models in memory: a pair of 300 MB each is added with little more than one tensor of 13 MB."""
    shape = {"vocab_size": 4096, "hidden_size": 1600, "intermediate_size": 4096, "num_hidden_layers": 5}
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 100}
    code = f"""
import resource, sys
from pathlib import Path
import lit_llama.convert.delta.folders as folders
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folders.apply(*map(Path, {[str(tmp_path / n) for n in ("base", "delta", "sum")]!r}), policy="add")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    size = 0
    for name, scale in (("base", 1.0), ("delta", 0.01)):
        torch.manual_seed(0)
        with torch.device("meta"):
            from lit_llama.model.llama import LLaMA

            shapes = {key: value.shape for key, value in LLaMA(tiny_config(**shape)).state_dict().items()}
        state = {key: (torch.randn(value) * scale).half() for key, value in shapes.items()}
        folder_of(tmp_path / name, state, **{key: value for key, value in shape.items() if key != "vocab_size"})
        size = sum(value.nbytes for value in state.values())
    assert size > 300e6
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 130e6


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
    """Catches flags that do not reach the functions, and results that go to the wrong stream."""
    folder_of(tmp_path / "delta", delta_of("ziya"))
    sides = ["--base_dir", base, "--delta_dir", tmp_path / "delta"]
    added = run_door(
        "prepare/delta.py", "apply", *sides, "--destination_path", tmp_path / "sum", "--max_shard_size", "60KB"
    )
    assert added.returncode == 0 and added.stdout == "", added
    assert "policy ziya: embedding and head as they are" in added.stderr
    assert (tmp_path / "sum" / INDEX_FILE).is_file() and len(Weights(tmp_path / "sum")) == 21
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
