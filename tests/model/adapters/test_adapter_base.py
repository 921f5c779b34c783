"""The base of an adapter: found from any working folder, beside the adapter or in the Hub's cache, and proven."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import run_here, write_adapter
from foreign_adapters import edit_config
from safetensors.torch import load_file, save_file

from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.folder import manifest
from lit_llama.folder.manifest import write_manifest
from lit_llama.generate.llm import load
from lit_llama.model.adapters.base import base_record
from lit_llama.model.adapters.peft_folder import META_FILE, base_of, verify_folders
from lit_llama.model.files.checkpoint import fingerprint
from lit_llama.model.files.weights import read_header
from lit_llama.model.places import of_sixteen_bits


@pytest.fixture
def home(tiny_folder: Path, tmp_path: Path) -> Path:
    """A project folder in which a base and an adapter are named as commands name them, seen from there."""
    home = tmp_path / "home"
    shutil.copytree(tiny_folder, home / "checkpoints" / "base")
    with contextlib.chdir(home):
        write_adapter(Path("out/lora/mine"), Path("checkpoints/base"))
    return home


def changed(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_relative_path_is_found_from_another_working_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every notebook: it runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    adapter = home / "out" / "lora" / "mine"
    assert base_of(adapter) == home / "checkpoints" / "base"
    assert "its weights have the recorded fingerprint" in capsys.readouterr().err
    monkeypatch.chdir(home)
    assert base_of(Path("out/lora/mine")) == Path("checkpoints/base") and not capsys.readouterr().err


def test_where_the_base_was_in_training_is_recorded(home: Path, tmp_path: Path) -> None:
    """An adapter that was moved away from its project, on the same machine."""
    with contextlib.chdir(home):
        record = base_record(Path("checkpoints/base"))
    assert record["path"] == "checkpoints/base" and record["absolute"] == str((home / "checkpoints/base").resolve())
    adapter = Path(shutil.copytree(home / "out/lora/mine", tmp_path / "elsewhere" / "mine"))
    with pytest.raises(CheckpointError, match="names the base model 'checkpoints/base'"):
        base_of(adapter)
    (adapter / META_FILE).write_text(json.dumps({"base": record}))
    assert base_of(adapter) == Path(record["absolute"])


@pytest.mark.parametrize("named", ["/home/alice/models/base", r"C:\models\base", "models/base/"])
@pytest.mark.parametrize("place", ["beside", "inside", "checkpoints"])
def test_a_path_of_another_machine_is_looked_for_beside_the_adapter(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, place: str
) -> None:
    """A folder with both that was copied to another machine."""
    monkeypatch.chdir(tmp_path)
    adapter = home / "out" / "lora" / "mine"
    places = {"beside": adapter.parent, "inside": adapter, "checkpoints": home / "checkpoints"}
    if place != "checkpoints":
        shutil.move(home / "checkpoints" / "base", places[place] / "base")
    edit_config(adapter, base_model_name_or_path=named)
    assert base_of(adapter) == places[place] / "base"


def test_the_fingerprint_decides_among_folders_of_one_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first folder of the right name, whatever is in it, or an end at the first wrong one."""
    monkeypatch.chdir(home.parent)
    adapter = home / "out" / "lora" / "mine"
    right = home / "checkpoints" / "base"
    wrong = changed(Path(shutil.copytree(right, adapter.parent / "base")))
    edit_config(adapter, base_model_name_or_path="/gone/base")
    assert base_of(adapter) == right
    shutil.rmtree(right)
    with pytest.raises(IntegrityError, match=r"lora/base is not the base .*--base_dir"):
        base_of(adapter)
    with pytest.raises(IntegrityError, match="another fingerprint"):
        base_of(adapter, wrong)


def test_a_name_on_the_hub_is_found_in_checkpoints_and_in_the_cache(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second download of gigabytes that are there."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    adapter = home / "out" / "lora" / "mine"
    edit_config(adapter, base_model_name_or_path="owner/Base-7B")
    (adapter / META_FILE).unlink()  # PEFT's own has none
    message = r"python prepare/download\.py --repo_id owner/Base-7B brings it; name its folder with --base_dir"
    with pytest.raises(CheckpointError, match=message):
        base_of(adapter)
    commit = "0" * 40
    snapshot = cache / "models--owner--Base-7B" / "snapshots" / commit
    blobs = snapshot.parent.parent / "blobs"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((home / "checkpoints" / "base").iterdir())):  # as the Hub's cache links them
        shutil.copy(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number}")
    try:
        assert base_of(adapter) == snapshot
        assert load(adapter, packed=False).model is not None
        other = Path(shutil.copytree(home / "checkpoints" / "base", home / "checkpoints" / "Base-7B"))
        (other / META_FILE).write_text('{"source": {"repo_id": "someone/Base-7B"}}')
        assert base_of(adapter) == snapshot, "a folder of another repository of that name"
        (other / META_FILE).write_text('{"source": {"repo_id": "Owner/base-7b"}}')
        assert base_of(adapter) == other
    finally:
        monkeypatch.undo()


def test_base_dir_is_taken_by_generation_and_merge(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that one of the commands does not know."""
    monkeypatch.chdir(tmp_path)
    adapter, base = home / "out" / "lora" / "mine", tmp_path / "moved"
    shutil.move(home / "checkpoints" / "base", base)
    with pytest.raises(CheckpointError, match="--base_dir"):
        load(str(adapter))
    assert load(str(adapter), base_dir=str(base), packed=False).model is not None
    with pytest.raises(UserError, match="--base_dir is the base of an adapter"):
        load(base, base_dir=base)
    with pytest.raises(CheckpointError, match=r"--base_dir .*home is no checkpoint folder"):
        load(adapter, base_dir=home)
    flags = ("--base_dir", base, "--precision", "32-true")
    done = run_here("generate/base.py", "--checkpoint_dir", adapter, "--prompt", "a", "--max_new_tokens", 1, *flags)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "merged"
    done = run_here("finetune/merge.py", "--adapter_dir", adapter, "--destination_path", made, *flags)
    assert done.returncode == 0 and (made / "config.json").is_file(), done.stderr


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("unsloth/llama-3-8b-Instruct-bnb-4bit", "unsloth/llama-3-8b-Instruct"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "unsloth/Qwen3-8B"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "TheBloke/Mistral-7B-v0.1"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen3-8B-FP8", "Qwen/Qwen3-8B"),
        ("mlx-community/Llama-3.2-1B-Instruct-4bit", "mlx-community/Llama-3.2-1B-Instruct"),
        ("meta-llama/Llama-3.1-8B", None),
        ("owner/int8-lover", None),
    ],
)
def test_a_quantised_copy_names_the_model_that_it_was_made_from(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, plain: str | None
) -> None:
    """Adapters of unsloth, whose base is a copy in four bits: the advice to download what cannot be read."""
    assert of_sixteen_bits(name) == plain
    monkeypatch.chdir(home.parent)
    adapter = home / "out" / "lora" / "mine"
    edit_config(adapter, base_model_name_or_path=name)
    with pytest.raises(CheckpointError, match=f"--repo_id {plain or name} "):
        base_of(adapter)


def flip(path: Path) -> None:
    """One bit of the embedding, where no fingerprint looks."""
    start, header = read_header(path)
    begin, end = header["model.embed_tokens.weight"]["data_offsets"]
    data = bytearray(path.read_bytes())
    data[start + begin + (end - begin) // 4] ^= 1
    path.write_bytes(data)


@pytest.fixture
def recorded(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter that records its base as a run does; the working folder is where it says."""
    monkeypatch.chdir(home)
    adapter = Path("out/lora/mine")
    (adapter / META_FILE).write_text(json.dumps({"format": 1, "base": base_record(Path("checkpoints/base"))}))
    return adapter


def test_a_bit_of_the_base_that_no_sample_holds_is_found(recorded: Path) -> None:
    """Catches an adapter that answers on other weights than it was trained on, which no fingerprint tells."""
    assert base_of(recorded) == Path("checkpoints/base")
    before = fingerprint(Path("checkpoints/base"))
    flip(Path("checkpoints/base/model.safetensors"))
    assert fingerprint(Path("checkpoints/base")) == before, "the test damages what the fingerprint sees"
    with pytest.raises(IntegrityError, match=r"base/model\.safetensors is damaged: .* when out/lora/mine was trained"):
        base_of(recorded)


def test_a_base_that_was_saved_anew_is_the_same(recorded: Path) -> None:
    """Catches weights that are refused because the header of their file says more, or they lie in shards."""
    path = Path("checkpoints/base/model.safetensors")
    tensors = load_file(path)
    save_file(tensors, path, {"format": "pt", "saved by": "another program"})
    assert base_of(recorded) == Path("checkpoints/base")
    names = sorted(tensors)
    halves = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, path.with_name(file), {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in halves.items() for name in held}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()
    assert base_of(recorded) == Path("checkpoints/base")


def test_verifying_reads_what_a_disk_changed_without_a_trace(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a proof that relies on sizes and times: a disk that rots changes neither."""
    monkeypatch.setattr(manifest, "_checked", {})
    monkeypatch.setattr(manifest, "_status", lambda path: manifest._Status(path.stat().st_size, 1, 1, 1))
    write_manifest(recorded, {})
    verify_folders(recorded)
    said = capsys.readouterr().err
    assert "out/lora/mine: all files are as in SHA256SUMS" in said and "checkpoints/base: no SHA256SUMS" in said
    flip(Path("checkpoints/base/model.safetensors"))
    assert base_of(recorded) == Path("checkpoints/base"), "nothing has told it"
    with pytest.raises(IntegrityError, match=r"base/model\.safetensors is damaged"):
        verify_folders(recorded)
