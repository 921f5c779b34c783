"""A draft checkpoint beside the one that answers."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_adapter
from safetensors.torch import load_file, save_file

from lit_llama.errors import CheckpointError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.llm import load, open_draft, open_folder


@pytest.fixture
def smaller(tiny_folder: Path, tmp_path: Path) -> Path:
    """The first layer of the tiny checkpoint."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "smaller"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if ".layers.1." not in name}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_a_draft_folder_guesses_and_changes_no_answer(tiny_folder: Path, smaller: Path, packed: bool) -> None:
    ids, sampling = [5, 80, 200, 31], Sampling(max_new_tokens=30, temperature=1.0)
    guessed: list[int] = []

    def made(**options: Path) -> list[int]:
        llm = load(tiny_folder, precision="32-true", packed=packed, **options)  # type: ignore[arg-type]
        made = [token for new, _ in llm.stream(ids, sampling) for token in new]
        guessed.append(llm.engine.statistics().guessed)
        return made

    adapter = write_adapter(smaller.parent / "adapter", smaller)
    assert made() == made(draft_dir=smaller) == made(draft_dir=adapter)
    assert guessed[1] > guessed[0] and guessed[2] > guessed[0]


def test_a_draft_of_another_vocabulary_is_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    word = next(name for name, index in vocabulary.items() if index == 40)
    vocabulary["changed"] = vocabulary.pop(word)
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"other cannot guess tokens for .*: id 40 is 'changed' and"):
        open_draft(other, open_folder(tiny_folder))
