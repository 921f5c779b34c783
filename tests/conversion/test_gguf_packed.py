"""Packed types of exported GGUF files: bytes as llama.cpp packs them, and the mixture of types that it chooses."""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_model, write_tokenizer
from gguf_files import Array, gguf_name, pairs_from_halves, write_model
from llama_cpp import LlamaCpp

from lit_llama.conversion import convert
from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.gguf.writer import plan, write_gguf
from lit_llama.conversion.native import open_folder
from lit_llama.conversion.source import Source
from lit_llama.errors import ResourceError, UserError
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA

FILE_TYPES = {"q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # LLAMA_FTYPE_* of llama.h
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}


def folder(path: Path, **changes: Any) -> tuple[Source, LLaMA]:
    path.mkdir()
    write_tokenizer(path)
    model = tiny_model(**SHAPE | changes)
    return open_folder(write_model(path, model, "float32")), model


def packed_by_llama_cpp(values: Array, kind: gguf.GGMLQuantizationType) -> Array:
    """By the function that llama.cpp's quantize calls."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama.cpp is not here: pip install xllamacpp")
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))
    pack = library.ggml_quantize_chunk
    pack.restype = ctypes.c_size_t
    pack.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows = np.ascontiguousarray(values, np.float32)
    out = np.zeros(gguf.quants.quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
    assert pack(int(kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None) == out.size
    return out


@pytest.mark.parametrize("dtype", FILE_TYPES)
def test_bytes_are_those_of_llama_cpp(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches another packing of the type, rows cut within a block, rotary rows that move after packing."""
    monkeypatch.setattr("lit_llama.conversion.gguf.writer.BLOCK", 100 * 256)
    source, model = folder(tmp_path / "model")
    write_gguf(source, tmp_path / "model.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.file_type"].contents() == FILE_TYPES[dtype]
    assert reader.fields["general.quantization_version"].contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, value in model.state_dict().items():
        tensor, array = tensors[gguf_name(name)], value.numpy()
        heads = {"q_proj": 4, "k_proj": model.config.num_key_value_heads}.get(name.split(".")[-2])
        if value.ndim == 1:
            assert tensor.tensor_type.name == "F32" and np.array_equal(tensor.data, array)
            continue
        wanted = packed_by_llama_cpp(pairs_from_halves(array, heads) if heads else array, tensor.tensor_type)
        assert np.array_equal(tensor.data, wanted), name


# By hand from the rule of llama.cpp: the first and the last eighth, and every third layer between.
MORE = {8: [0, 3, 6, 7], 2: [1], 16: [0, 1, 4, 7, 10, 13, 14, 15]}


@pytest.mark.parametrize("layers", MORE)
@pytest.mark.parametrize(("dtype", "plain"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")])
def test_a_mixture_is_that_of_llama_cpp(tmp_path: Path, dtype: str, plain: str, layers: int) -> None:
    """Catches layers that get too few bits, and a head that is packed like the rest."""
    source, _ = folder(tmp_path / "model", num_hidden_layers=layers, vocab_size=384)
    kinds = {name: kind.name for name, kind in plan(source, dtype).kinds.items() if "norm" not in name}
    more = {f"model.layers.{i}.{name}.weight" for i in MORE[layers] for name in ("self_attn.v_proj", "mlp.down_proj")}
    assert {name for name, kind in kinds.items() if kind == "Q6_K"} == more | {"lm_head.weight"}
    assert {kind for name, kind in kinds.items() if name not in more | {"lm_head.weight"}} == {plain}


def test_a_tied_embedding_is_packed_as_the_head(tmp_path: Path) -> None:
    """Catches an output of four bits, which costs more than all else."""
    source, _ = folder(tmp_path / "model", tie_word_embeddings=True)
    for dtype, kind in {"q4_k_m": "Q6_K", "q4_0": "Q8_0", "q8_0": "Q8_0"}.items():
        assert plan(source, dtype).kinds["model.embed_tokens.weight"].name == kind
        assert "lm_head.weight" not in plan(source, dtype).kinds


@pytest.mark.parametrize(("width", "kinds"), [(96, {"Q5_0", "Q8_0"}), (80, {"F16"})])
def test_rows_that_no_block_divides_get_another_type(
    tmp_path: Path, width: int, kinds: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a crash of the library, and a larger file that nobody is told of; llama.cpp chooses the same types."""
    source, _ = folder(tmp_path / "model", intermediate_size=width)
    found = {kind.name for name, kind in plan(source, "q4_k_m").kinds.items() if "down_proj" in name}
    assert found == kinds
    assert "model.layers.0.mlp.down_proj.weight first, have rows that the 256 values of" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["q4_k_m", "q4_0"])
def test_llama_cpp_computes_with_the_packed_values(tmp_path: Path, dtype: str) -> None:
    """Catches a file that loads and talks nonsense: log-probabilities against our model of what the bytes stand for."""
    source, _ = folder(tmp_path / "model")
    write_gguf(source, tmp_path / "model.gguf", dtype)
    convert(tmp_path / "model.gguf", tmp_path / "back", dtype="float32")
    ids = list(range(5, 45))
    ours = load_model(tmp_path / "back")(torch.tensor(ids))[-1].log_softmax(-1)
    theirs = LlamaCpp(tmp_path / "model.gguf").logprobs(ids, 384)
    assert len(theirs) == 384
    # It rounds the inputs of each product to 8 bits.
    assert max(abs(ours[index].item() - logprob) for index, logprob in theirs.items()) < 0.3
    plain = load_model(tmp_path / "model")(torch.tensor(ids))[-1].log_softmax(-1)
    assert (plain - ours).abs().max() > 0.5, "four bits are seen in the comparison"


def test_without_its_library_a_type_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback after an hour, and a way out that does not work; q4_0 needs nothing."""
    source, _ = folder(tmp_path / "model")
    monkeypatch.setitem(__import__("sys").modules, "libgguf", None)
    with pytest.raises(ResourceError, match=r"libgguf is needed for q4_k_m: pip install 'lit_llama\[kquants\]'"):
        convert(tmp_path / "gone", tmp_path / "model.gguf", layout="gguf", dtype="q4_k_m")
    write_gguf(source, tmp_path / "model.gguf", "q4_0")


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_packed_types_are_of_gguf_alone(tmp_path: Path, layout: Any) -> None:
    """Catches a folder in a type that torch does not have."""
    with pytest.raises(UserError, match="--dtype q4_k_m is a type of GGUF files: it needs --format gguf"):
        convert(tmp_path, tmp_path / "made", layout=layout, dtype="q4_k_m")


def test_a_packed_file_written_anew_is_rounded_once(tmp_path: Path) -> None:
    """Catches values that pass through bfloat16 on their way from four bits to float32."""
    source, _ = folder(tmp_path / "model")
    write_gguf(source, tmp_path / "small.gguf", "q4_0")
    convert(tmp_path / "small.gguf", tmp_path / "large.gguf", layout="gguf", dtype="float32")
    small, large = open_gguf(tmp_path / "small.gguf", "float32"), open_gguf(tmp_path / "large.gguf", "float32")
    assert all(torch.equal(small.read(name), large.read(name)) for name in small.specs)
