"""Embeddings that grow, against transformers on the folder that is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model, write_tokenizer
from torch import Tensor

from lit_llama.conversion.source import NAMES, Source, write_folder
from lit_llama.conversion.tensors import resize
from lit_llama.errors import CheckpointError
from lit_llama.model.files.checkpoint import load_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def source_of(
    tmp_path: Path, *, rows: int = 300, dtype: torch.dtype = torch.float32, tied: bool = False, **more: Any
) -> Source:
    """A random model, with its tensors by Hugging Face's names and no tokenizer unless one is given."""
    state = {name: tensor.to(dtype) for name, tensor in tiny_model(vocab_size=rows).state_dict().items()}
    if tied:
        del state[HEAD]
    return Source(
        path=tmp_path / "model.bin",
        kind="test",
        config=tiny_config(vocab_size=rows, tie_word_embeddings=tied).to_dict("float32"),
        specs={name: (NAMES[dtype], tuple(tensor.shape)) for name, tensor in state.items()},
        read=state.__getitem__,
        **more,
    )


def written(source: Source, folder: Path) -> Any:
    """The folder in transformers."""
    from transformers import AutoModelForCausalLM

    write_folder(source, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()


def mean(rows: Tensor) -> Tensor:
    """In double precision."""
    return rows.double().mean(0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_old_rows_stay_and_new_ones_are_the_mean(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    """Catches rows written at the wrong place, a head forgotten or untied, and a mean in low precision."""
    source = source_of(tmp_path, dtype=dtype, tied=tied)
    before = written(source, tmp_path / "before")
    after = written(resize(source, 307), tmp_path / "after")
    assert after.config.vocab_size == 307 and after.config.tie_word_embeddings == tied
    for old, new in (
        (before.get_input_embeddings().weight, after.get_input_embeddings().weight),
        (before.get_output_embeddings().weight, after.get_output_embeddings().weight),
    ):
        assert new.shape == (307, 64) and new.dtype == dtype and torch.equal(new[:300], old)
        assert torch.equal(new[300:], new[300].expand(7, -1))
        rounding = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
        torch.testing.assert_close(new[300].double(), mean(old), rtol=rounding, atol=1e-7)
    shared = after.get_input_embeddings().weight.data_ptr() == after.get_output_embeddings().weight.data_ptr()
    assert shared == tied
    ids = torch.tensor([[1, 5, 299, 80]])
    with torch.inference_mode():
        wanted, found = before(ids).logits, after(ids).logits
    torch.testing.assert_close(found[..., :300], wanted, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 0.1)
    assert load_model(tmp_path / "after").lm_head.weight.shape == (307, 64)
    others = [name for name in source.specs if name not in (EMBEDDING, HEAD)]
    assert all(torch.equal(after.state_dict()[name], before.state_dict()[name]) for name in others)


def test_the_mean_is_rounded_once(tmp_path: Path) -> None:
    """Catches a sum in float16, which runs over at 65504, and in bfloat16, which stands still."""
    for dtype, value in ((torch.float16, 60000.0), (torch.bfloat16, 1.0)):
        source = source_of(tmp_path, dtype=dtype)
        full = torch.full((300, 64), value, dtype=dtype)
        read = source.read
        grown = resize(
            Source(**vars(source) | {"read": lambda name, read=read, full=full: full if name == HEAD else read(name)}),
            301,
        ).read(HEAD)
        assert torch.equal(grown[300], full[0])


def test_rows_without_a_token_are_left_out_of_the_mean(tmp_path: Path) -> None:
    """Catches a mean over padding that was never trained, and padding that is overwritten."""
    write_tokenizer(tmp_path)
    files = {name: tmp_path / name for name in ("tokenizer.json", "tokenizer_config.json")}
    source = source_of(tmp_path, rows=400, files=files)  # 384 tokens
    grown = resize(source, 410)
    for name in (EMBEDDING, HEAD):
        old, new = source.read(name), grown.read(name)
        assert torch.equal(new[:400], old)
        torch.testing.assert_close(new[400:].double(), mean(old[:384]).expand(10, -1), rtol=1e-6, atol=1e-7)
        assert (new[400].double() - mean(old)).abs().max() > 1e-4
    assert grown.notes["resized_vocab"] == {"from": 400, "to": 410, "mean_of_rows": 384}
    write_folder(grown, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["source"]["resized_vocab"]["to"] == 410


def test_a_tokenizer_that_cannot_be_read_is_no_obstacle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a model that cannot grow because its tokenizer is of another kind."""
    source = source_of(tmp_path, files={"tokenizer.model": b"IQ== 0\n"})
    assert resize(source, 301).read(HEAD).shape == (301, 64)
    assert "not a sentencepiece model" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_embedding_gets_its_rows(tmp_path: Path) -> None:
    """Catches the mean taken over ids that have no row, and a folder that still cannot be loaded."""
    write_tokenizer(tmp_path)
    files = {name: tmp_path / name for name in ("tokenizer.json", "tokenizer_config.json")}
    source = source_of(tmp_path, rows=380, files=files)
    with pytest.raises(CheckpointError, match=r"--resize_vocab is 383, but the tokenizer of .* has 384 tokens"):
        resize(source, 383)
    write_folder(resize(source, 384), tmp_path / "out")
    from lit_llama.generate.llm import load

    assert load(tmp_path / "out").config.vocab_size == 384


@pytest.mark.parametrize(
    ("rows", "reason"), [(300, "already has that many"), (299, "has 300, and rows that were trained"), (0, "has 300")]
)
def test_it_only_grows(rows: int, reason: str, tmp_path: Path) -> None:
    """Catches tokens that lose their rows in silence."""
    with pytest.raises(CheckpointError, match=f"--resize_vocab is {rows}, but the embedding of .*model.bin {reason}"):
        resize(source_of(tmp_path), rows)


def test_rows_stay_the_same_for_a_source_that_is_cast_first(tmp_path: Path) -> None:
    """Catches the order of --dtype and --resize_vocab: the mean is of the rows that are written."""
    source = source_of(tmp_path)
    grown = resize(source.cast("bfloat16"), 302)
    assert grown.specs[HEAD] == ("BF16", (302, 64)) and grown.dtype == "bfloat16"
    assert torch.equal(grown.read(HEAD)[:300], source.read(HEAD).bfloat16())
