"""GGUF models in parts, as the gguf package splits them: whole again, or refused with the name of what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import tiny_model, write_tokenizer
from gguf_files import SHAPE, write_gguf
from safetensors.torch import load_file

from lit_llama.conversion import convert, open_source
from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.gguf.scan import first_parts, model_name, part_names
from lit_llama.errors import CheckpointError
from lit_llama.model.llama import LLaMA

NAME = "tiny-{:05}-of-00003.gguf"


@pytest.fixture
def parts(tmp_path: Path) -> tuple[list[Path], LLaMA]:
    """A model in three files, and that model."""
    write_tokenizer(tmp_path)
    model = tiny_model(**SHAPE)
    write_gguf(tmp_path / "tiny.gguf", model, tmp_path, split=8)
    made = [tmp_path / NAME.format(number) for number in (1, 2, 3)]
    assert all(path.is_file() for path in made) and not (tmp_path / "tiny.gguf").exists()
    return made, model


@pytest.mark.parametrize("named", [0, 2])
def test_parts_are_the_whole_model(parts: tuple[list[Path], LLaMA], named: int) -> None:
    """Catches tensors of the other files that are lost, or read from the file that was named."""
    paths, model = parts
    source = open_gguf(paths[named])
    assert set(source.specs) == set(model.state_dict())
    assert all(torch.equal(source.read(name), value) for name, value in model.state_dict().items())
    assert json.loads(bytes(source.files["tokenizer.json"]))["model"]["vocab"]  # type: ignore[arg-type]


def test_the_folder_of_a_download_is_a_source(parts: tuple[list[Path], LLaMA], tmp_path: Path) -> None:
    """Catches a folder that has to be searched by hand, and values rounded twice on their way out of it."""
    paths, model = parts
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for path in paths:
        path.rename(folder / path.name)
    convert(folder, tmp_path / "made", dtype="bfloat16")
    for name, value in load_file(tmp_path / "made" / "model.safetensors").items():
        assert torch.equal(value, model.state_dict()[name].bfloat16()), name
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"several GGUF models, .*: other\.gguf, tiny-00001-of-00003\.gguf$"):
        open_source(folder)


def change_key(path: Path, key: str, value: Any) -> None:
    """Overwrite a number in the head of a file."""
    reader = gguf.GGUFReader(path, "r+")
    reader.fields[key].parts[-1][0] = value


WRONG: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "a part is missing": (lambda paths: paths[1].unlink(), r"1 of 3 parts are not beside it: tiny-00002-of-00003"),
    "another name": (
        lambda paths: paths[0].rename(paths[0].with_name("a.gguf")),
        r"should end in -NNNNN-of-00003\.gguf",
    ),
    "in another order": (
        lambda paths: change_key(paths[2], "split.no", 1),
        r"3-of-00003\.gguf: split\.no is 1, expected 2",
    ),
    "of another model": (lambda paths: change_key(paths[1], "split.count", 4), r"split\.count is 4, expected 3"),
    "tensors too few": (
        lambda paths: change_key(paths[0], "split.tensors.count", 22),
        r"3 parts hold 21 tensors, expected 22",
    ),
    "the same again": (
        lambda paths: (paths[2].write_bytes(paths[1].read_bytes()), change_key(paths[2], "split.no", 2)),
        r"tensor .* is in tiny-00002-of-00003\.gguf, too",
    ),
    "cut off": (lambda paths: paths[1].write_bytes(paths[1].read_bytes()[:-64]), r"tiny-00002-of-00003\.gguf cannot"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_parts_that_are_no_whole_are_refused(
    parts: tuple[list[Path], LLaMA], change: Callable[[list[Path]], Any], message: str
) -> None:
    """Catches a model made of two models, or of a part of one."""
    paths, _ = parts
    change(paths)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(next(path for path in (paths[0], paths[0].with_name("a.gguf")) if path.is_file()))


def test_names_of_parts() -> None:
    """Catches a model listed once for each of its parts, and a name that keeps a part's number."""
    names = ["m-Q4_K_M.gguf", *(f"big-{i:05}-of-00012.gguf" for i in range(1, 13)), "v-2-of-3.gguf"]
    assert first_parts(names) == ["big-00001-of-00012.gguf", "m-Q4_K_M.gguf", "v-2-of-3.gguf"]
    assert part_names(names[5]) == names[1:13] and part_names("a.gguf") == ["a.gguf"]
    assert [model_name(name) for name in names[:2]] == ["m-Q4_K_M", "big"]
    assert part_names("x-00001-of-00000.gguf") == []


def test_biases_that_llama_cpp_leaves_out_are_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a LLaMA with biases of q, k and v alone (Qwen's, renamed) that is refused, and zeros that go unsaid."""
    write_tokenizer(tmp_path)
    model = tiny_model(**SHAPE, attention_bias=True, attention_out_bias=True, mlp_bias=True)
    for name, value in model.state_dict().items():
        if name.endswith(("o_proj.bias", "up_proj.bias")):
            value.zero_()

    def drop(tensors: dict[str, Any]) -> None:
        for layer in (0, 1):
            del tensors[f"blk.{layer}.attn_output.bias"], tensors[f"blk.{layer}.ffn_up.bias"]

    path = write_gguf(tmp_path / "model.gguf", model, tmp_path, change_tensors=drop)
    convert(path, tmp_path / "made", dtype="float32")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert made.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in made.items())
    assert "4 that the file has not are zero" in capsys.readouterr().err
