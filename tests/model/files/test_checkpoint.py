"""Checkpoint folders: reading, writing, refusing what is broken, knowing one base from another."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_transformers, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_llama.errors import CheckpointError
from lit_llama.model.files.checkpoint import fingerprint, load_model
from lit_llama.model.files.shards import write_weights
from lit_llama.model.files.weights import INDEX_FILE, SINGLE_FILE, Weights

NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tiny_state(**changes: Any) -> dict[str, Tensor]:
    """Weights of a tiny model that share no storage."""
    return {name: value.clone() for name, value in tiny_model(**changes).state_dict().items()}


def write_folder(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A folder with one file, written by the safetensors package."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes).to_dict("float32")))
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One file."""
    return write_folder(tmp_path / "single", tiny_state())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same weights in several files with an index, written by transformers."""
    folder = tmp_path / "sharded"
    as_transformers(tiny_model()).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_shards_and_a_single_file_give_the_same_model(single: Path, sharded: Path) -> None:
    """Catches a shard that is left out, and names that are translated."""
    wanted = tiny_state()
    for folder in (single, sharded):
        model = load_model(folder)
        found = model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert {value.device.type for value in found.values()} == {"cpu"}


def test_a_dtype_is_converted_and_otherwise_kept(tmp_path: Path) -> None:
    """Catches weights that silently become float32, or a dtype that is not applied to all."""
    half = {name: value.to(torch.bfloat16) for name, value in tiny_state().items()}
    folder = write_folder(tmp_path / "bf16", half)
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}
    loaded = load_model(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in half.items())


def test_an_absent_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """Catches a head left on the meta device, or a copy that goes its own way."""
    tensors = tiny_state(tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    model = load_model(write_folder(tmp_path / "a", tensors, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_a_tied_head_that_is_there_must_be_equal(tmp_path: Path) -> None:
    """Catches one of two different matrices that is dropped in silence."""
    tensors = tiny_state(tie_word_embeddings=True)
    model = load_model(write_folder(tmp_path / "a", tensors, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors["lm_head.weight"][5, 5] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is another matrix"):
        load_model(write_folder(tmp_path / "b", tensors, tie_word_embeddings=True))


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    """Catches an untied model that is given the embedding as its head."""
    tensors = tiny_state()
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head\.weight"):
        load_model(write_folder(tmp_path / "a", tensors))


def test_rotary_frequencies_of_old_files_are_passed_over(tmp_path: Path) -> None:
    """Catches old checkpoints refused for tensors that follow from the configuration."""
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    model = load_model(write_folder(tmp_path / "a", tiny_state() | extra))
    assert model.state_dict().keys() == tiny_state().keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "1 missing (model.layers.1.mlp.up_proj.weight"),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(3), "1 unknown (model.layers.2.mlp.up_proj.weight"),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(64), "1 unknown (model.layers.0.self_attn.q_proj.bias"),
        ("model.norm.weight", torch.ones(63), "model.norm.weight is (63,)"),
        ("model.layers.0.mlp.down_proj.weight", torch.ones(112, 64), "down_proj.weight is (112, 64)"),
        ("model.norm.weight", torch.ones(64, dtype=torch.float64), "of F64"),
        ("model.norm.weight", torch.ones(64, dtype=torch.int8), "of I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str, value: Tensor | None, message: str) -> None:
    """Catches weights ignored, left uninitialised, transposed, or quantised ones read as numbers."""
    tensors = {key: tensor for key, tensor in tiny_state().items() if key != name}
    folder = write_folder(tmp_path / "a", tensors | ({} if value is None else {name: value}))
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("place", ["../outside.safetensors", "{tmp}/outside.safetensors", "..", ".", "", "gone", 7, []])
def test_an_index_names_only_files_beside_it(tmp_path: Path, sharded: Path, place: Any) -> None:
    """Catches a path out of the folder, which comes from data, and a shard that was not downloaded."""
    save_file(tiny_state(), tmp_path / "outside.safetensors")
    place = place.replace("{tmp}", str(tmp_path)) if isinstance(place, str) else place
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": place}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}'])
def test_a_broken_index_is_named(sharded: Path, content: str) -> None:
    """Catches a traceback from the parser."""
    (sharded / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(sharded)


def test_files_must_hold_what_the_index_says(sharded: Path) -> None:
    """Catches a tensor in two files, of which one is used by chance, and one that is in none."""
    edit_index(sharded, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"1 unknown \(model\.norm\.weight"):
        load_model(sharded)
    edit_index(sharded, lambda index: index["weight_map"].update({"no.such": "model-00001-of-00001.safetensors"}))
    with pytest.raises(CheckpointError, match="no file"):
        load_model(sharded)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "short header": lambda content: content[:100],
    "short data": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
    "HTML page": lambda content: b"<!DOCTYPE html>\n<html><body>Not found</body></html>",
    "LFS pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269062936\n",
    "pickle": lambda content: b"PK\x03\x04" + bytes(60),
    "huge header": lambda content: struct.pack("<Q", 2**62) + content[8:],
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_safetensors_is_named(single: Path, sharded: Path, damage: Callable[[bytes], bytes]) -> None:
    """Catches a traceback of the package, and half a model that loads."""
    for folder, name in ((single, SINGLE_FILE), (sharded, sorted(sharded.glob("*.safetensors"))[1].name)):
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
        with pytest.raises(CheckpointError, match=name):
            load_model(folder)


@pytest.mark.parametrize("kind", ["empty", "short header", "HTML page", "LFS pointer", "huge header"])
def test_fingerprint_of_a_broken_file_is_an_error(single: Path, kind: str) -> None:
    """Catches a traceback where an adapter is asked for its base."""
    path = single / SINGLE_FILE
    path.write_bytes(BROKEN[kind](path.read_bytes()))
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        fingerprint(single)


def test_a_folder_without_weights_says_what_is_there(tmp_path: Path) -> None:
    """Catches a bare FileNotFoundError; old folders hold .bin files."""
    shutil.copyfile(write_folder(tmp_path / "a", tiny_state()) / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors.*pytorch_model\.bin"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        Weights(tmp_path / "gone")


def test_fingerprint_does_not_depend_on_sharding(single: Path, sharded: Path, tmp_path: Path) -> None:
    """Catches an identity that is lost by saving the same weights in other files or in another order."""
    backwards = write_folder(tmp_path / "backwards", dict(reversed(tiny_state().items())))
    assert fingerprint(single) == fingerprint(sharded) == fingerprint(backwards)


def test_fingerprint_sees_a_change_in_any_tensor(tmp_path: Path) -> None:
    """Catches tensors, names, dtypes or shapes that do not count. (It samples three places of a large tensor: here the
    first, the middle and the last value are changed.)"""
    tensors = tiny_state()
    seen = {fingerprint(write_folder(tmp_path / "a", tensors))}
    changes = 0
    for name, value in tensors.items():
        for place in (0, value.numel() // 2, -1):
            other = value.clone()
            other.view(-1)[place] += 1
            seen.add(fingerprint(write_folder(tmp_path / "a", tensors | {name: other})))
            changes += 1
    norm = tensors.pop("model.norm.weight")
    for other in ({"renamed": norm}, {"model.norm.weight": norm[None]}, {"model.norm.weight": norm.view(torch.int32)}):
        seen.add(fingerprint(write_folder(tmp_path / "a", tensors | other)))
    assert len(seen) == 1 + changes + 3


def random_tensors() -> dict[str, Tensor]:
    """All dtypes, a scalar, an empty one, one that is not contiguous."""
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(30, 20),
        "b.weight": torch.randn(7, 11).to(torch.bfloat16),
        "c.weight": torch.randn(33).to(torch.float16),
        "d.weight": torch.randn(16, 24).t(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "é.weight": torch.tensor([float("inf"), -0.0, 1e-40]),
    }


def specs_of(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    names = {dtype: name for name, dtype in NAMES.items()}
    return {name: (names[value.dtype], tuple(value.shape)) for name, value in tensors.items()}


@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 2000, 1])
def test_written_weights_are_read_by_the_package_bit_for_bit(tmp_path: Path, max_shard_size: int) -> None:
    """Catches a wrong offset, a header others refuse, an index that points elsewhere, shards that are too large."""
    tensors = random_tensors()
    write_weights(tmp_path, specs_of(tensors), tensors.__getitem__, max_shard_size)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        part = load_file(tmp_path / file)
        size = sum(value.nbytes for value in part.values())
        assert size <= max_shard_size or sum(value.nbytes > 0 for value in part.values()) == 1
        assert not found.keys() & part.keys()
        found |= part
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name], value), name
    assert found["é.weight"].signbit().tolist() == [False, True, False]
    if len(files) == 1:
        assert files == [SINGLE_FILE] and not (tmp_path / INDEX_FILE).exists()
    else:
        index = json.loads((tmp_path / INDEX_FILE).read_text("utf-8"))
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
        assert index["weight_map"].keys() == tensors.keys()
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    """Catches a missing `format` in the metadata, or an index that only we read."""
    from transformers import AutoModelForCausalLM

    tensors = tiny_state()
    write_weights(tmp_path, specs_of(tensors), tensors.__getitem__, 100_000)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict("float32")))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(torch.equal(value, tensors[name]) for name, value in theirs.state_dict().items())


def test_tensors_are_made_and_written_one_at_a_time(tmp_path: Path) -> None:
    """Catches a writer that collects the model in memory: each tensor is on disk before the next is made."""
    tensors = random_tensors()
    order: list[str] = []

    def produce(name: str) -> Tensor:
        # Every file begins with its header, written before; the rest is the data so far.
        written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        headers = sum(8 + struct.unpack("<Q", path.read_bytes()[:8])[0] for path in tmp_path.glob("*.safetensors"))
        assert written - headers == sum(tensors[done].nbytes for done in order)
        order.append(name)
        return tensors[name]

    write_weights(tmp_path, specs_of(tensors), produce, 2000)
    assert order == list(tensors)


def test_a_tensor_of_another_shape_than_announced_is_not_written(tmp_path: Path) -> None:
    """Catches a file whose header lies about its data."""
    for wrong in (torch.ones(3), torch.ones(2, dtype=torch.bfloat16)):
        with pytest.raises(AssertionError, match="a"):
            write_weights(tmp_path, {"a": ("F32", (2,))}, lambda name, value=wrong: value)


def test_reading_does_not_copy_the_file_into_memory(tmp_path: Path) -> None:
    """Catches a reader that loads all tensors to give one: opening 400 MB must not make the process larger by it."""
    path = tmp_path / SINGLE_FILE
    rows = 100_000_000
    header = json.dumps({"a": {"dtype": "F32", "shape": [rows], "data_offsets": [0, 4 * rows]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * rows)  # sparse
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("no /proc here")
    before = int(pages.read_text().split()[1])
    weights = Weights(tmp_path)
    assert weights.spec("a") == ("F32", (rows,)) and list(weights) == ["a"]
    assert fingerprint(tmp_path)
    assert (int(pages.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") < 50_000_000


def test_a_single_file_counts_before_an_index_and_that_is_said(tmp_path: Path) -> None:
    """Catches the shards of an earlier save, taken in silence where transformers takes the file."""
    from transformers import AutoModelForCausalLM

    old = {name: value + 0.1 for name, value in tiny_state().items()}
    folder = write_folder(tmp_path / "a", tiny_state())
    write_weights(folder, {name: ("F32", tuple(value.shape)) for name, value in old.items()}, old.__getitem__, 60_000)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = load_model(folder).state_dict()
    assert all(
        torch.equal(found[name], theirs[name]) and torch.equal(found[name], tiny_state()[name]) for name in found
    )
    assert (
        "is used, as transformers does" in Weights(folder).remarks[0] and "there as well" in Weights(folder).remarks[0]
    )
    assert fingerprint(folder) == fingerprint(write_folder(tmp_path / "b", tiny_state()))
    next(folder.glob("model-*")).unlink()
    assert "names files that are not all there" in Weights(folder).remarks[0]
    assert len(load_model(folder).state_dict()) == len(found)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "base_model.model.base_model.model."])
def test_names_of_wrappers_are_those_of_the_model(tmp_path: Path, prefix: str) -> None:
    """Catches a state that was saved under torch.compile or DDP, refused as "missing" and "unknown"."""
    wrapped = {prefix + name: value for name, value in tiny_state().items()}
    folder = write_folder(tmp_path / "a", wrapped)
    found = load_model(folder).state_dict()
    assert all(torch.equal(value, tiny_state()[name]) for name, value in found.items())
    assert "named as by a wrapper" in Weights(folder).remarks[0]
    twice = write_folder(tmp_path / "b", wrapped | tiny_state())
    with pytest.raises(CheckpointError, match="twice"):
        load_model(twice)


def test_a_decoder_without_head_and_heads_of_reward_models(tmp_path: Path) -> None:
    """Catches AutoModel's names refused for a tied model, and a value head that stops a whole language model."""
    tied = {n: v for n, v in tiny_state(tie_word_embeddings=True).items() if n != "lm_head.weight"}
    bare = {name.removeprefix("model."): value for name, value in tied.items()}
    found = load_model(write_folder(tmp_path / "a", bare, tie_word_embeddings=True)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in tied.items())
    heads = {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}
    folder = write_folder(tmp_path / "b", tiny_state() | heads | {"score.weight": torch.ones(1, 64)})
    assert load_model(folder).state_dict().keys() == tiny_state().keys()
    assert "3 tensors of a reward or value head" in Weights(folder).remarks[0]
