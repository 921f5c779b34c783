"""Meta's layout: shards cut row by row, joined, and compared with Meta's model as it is written in plain.py."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from meta_files import COLUMNS, IDS, MODELS, ROWS, equal, nothing_left, swapped, write
from meta_files import vocabulary as vocabulary  # a fixture
from plain import Sizes, logits, native, random_state
from safetensors.torch import load_file
from torch import Tensor

from lit_llama.conversion import convert
from lit_llama.conversion.layouts import meta as meta
from lit_llama.conversion.layouts.meta import open_meta
from lit_llama.conversion.tensors import Joined
from lit_llama.errors import CheckpointError
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.files.pth.files import read_pth


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shards", "kv_heads", "embedding"),
    [
        (1, 4, "rows"),
        (2, 4, "columns"),
        (2, 4, "rows"),
        (4, 4, "columns"),
        (4, 2, "rows"),
        (4, 1, "columns"),
        (2, 1, "rows"),
    ],
)
def test_shards_become_the_model_they_were_cut_from(
    tmp_path: Path, vocabulary: Path, shards: int, kv_heads: int, embedding: str, dtype: torch.dtype
) -> None:
    """Catches a wrong dimension, order, permutation or name, a copy of a key/value head that is kept, a value that is
    rounded, and a tensor that drags the storage of its whole shard along."""
    sizes = Sizes(n_kv_heads=kv_heads)
    state = random_state(sizes, dtype)
    source = write(tmp_path / "meta", state, sizes, vocabulary, shards, embedding)
    convert(source, tmp_path / "made")
    assert equal(load_file(tmp_path / "made" / "model.safetensors"), native(state, sizes))
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.") and config["num_key_value_heads"] == kv_heads


@pytest.mark.parametrize("name", MODELS)
def test_the_converted_model_says_what_metas_does(tmp_path: Path, vocabulary: Path, name: str) -> None:
    """Catches a wrong epsilon, theta or scaling of the rotary frequencies; here, and in transformers."""
    from transformers import AutoModelForCausalLM

    sizes = MODELS[name]
    state = random_state(sizes, tied=name == "Llama 3.2")
    wanted = logits(state, sizes, IDS)
    convert(write(tmp_path / "meta", state, sizes, vocabulary, 2), tmp_path / "made")
    assert (load_model(tmp_path / "made")(IDS) - wanted).abs().max() <= 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert (theirs(IDS[None]).logits[0] - wanted).abs().max() <= 1e-4
    other = logits(state, replace(sizes, rope_theta=9000.0, factor=0.0), IDS)
    assert (other - wanted).abs().max() > 0.01, "these positions must tell one theta from another"


@pytest.mark.parametrize("permute", [swapped, lambda weight, heads: weight])
def test_a_wrong_permutation_would_be_seen(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, permute: Callable[[Tensor, int], Tensor]
) -> None:
    """Guards the tests above: with heads of 16 neither direction is its own inverse."""
    sizes = Sizes()
    state = random_state(sizes)
    monkeypatch.setattr("lit_llama.conversion.tensors.halves_from_pairs", permute)
    convert(write(tmp_path / "meta", state, sizes, vocabulary, 2), tmp_path / "made")
    assert (load_model(tmp_path / "made")(IDS) - logits(state, sizes, IDS)).abs().max() > 0.1


@pytest.mark.parametrize("name", [*sorted(COLUMNS), *sorted(ROWS)])
def test_a_wrong_dimension_would_be_seen(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Guards the tests above: no tensor has the shape of its transpose once two shards are laid together wrongly."""
    source = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary, 2)
    monkeypatch.setitem(meta.SPLIT, name, 1 - meta.SPLIT[name])
    with pytest.raises(CheckpointError):
        open_meta(source)


@pytest.mark.parametrize(
    ("params", "context", "factor"),
    [
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-6}, 2048, None),
        ({"dim": 6656, "n_heads": 52, "norm_eps": 1e-5}, 2048, None),
        ({"dim": 8192, "n_heads": 64, "norm_eps": 1e-5}, 2048, None),  # 65B
        ({"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "norm_eps": 1e-5}, 4096, None),  # LLaMA 2 70B
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-5}, 4096, None),
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-5, "rope_theta": 1e6}, 16384, None),
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-5, "rope_theta": 5e5}, 8192, None),
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}, 131072, 8.0),
        ({"dim": 2048, "n_heads": 32, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}, 131072, 32.0),
        ({"dim": 3072, "n_heads": 24, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}, 131072, 32.0),
    ],
)
def test_what_params_leave_unsaid_follows_from_the_family(
    params: dict[str, Any], context: int, factor: float | None
) -> None:
    """Catches a model that is cut off at another's context, or stretched by another's factor."""
    assert meta._family(params).context == context
    rope = meta._rope_scaling(params, tied=False)
    assert (rope.factor if rope else None) == factor


def test_a_head_that_is_the_embedding_is_stored_once(tmp_path: Path, vocabulary: Path) -> None:
    """Catches a matrix stored twice, and two alike but for one value that are taken for one."""
    state = random_state(Sizes(), tied=True)
    convert(write(tmp_path / "meta", state, Sizes(), vocabulary), tmp_path / "made")
    assert "lm_head.weight" not in load_file(tmp_path / "made" / "model.safetensors")
    assert json.loads((tmp_path / "made" / "config.json").read_text())["tie_word_embeddings"]
    state["output.weight"][-1, -1] += 1
    convert(write(tmp_path / "other", state, Sizes(), vocabulary), tmp_path / "apart")
    assert not json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"]


def test_the_folder_opens_in_transformers_with_its_tokenizer(tmp_path: Path, llama_tokenizer: Path) -> None:
    """LLaMA's own tokenizer; catches text that other programs encode otherwise, or without the token that begins it."""
    import sentencepiece
    from transformers import AutoTokenizer, GenerationConfig

    sizes = Sizes(vocab=32000)
    source = write(tmp_path / "7B", random_state(sizes), sizes, None)
    (tmp_path / "tokenizer.model").write_bytes(llama_tokenizer.read_bytes())  # above the weights, as Meta has it
    convert(source, tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    original = sentencepiece.SentencePieceProcessor(model_file=str(llama_tokenizer))
    for text in ("Hello", "Zoë's naïve café, 北京 is a city. 😀", "a\n\n  b", "1 + 23 = 24"):
        assert tokenizer(text)["input_ids"] == [1, *original.encode(text)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert GenerationConfig.from_pretrained(tmp_path / "made").eos_token_id in (2, [2])
    notes = json.loads((tmp_path / "made" / "meta.json").read_text())["source"]
    assert notes["family"] == "LLaMA 2" and notes["tokens"].startswith("32000 in the tokenizer")


def test_the_hubs_folder_of_metas_files_is_found(tmp_path: Path, vocabulary: Path) -> None:
    """Catches `original/` that must be named, and settings nested under "model" that are not seen."""
    write(tmp_path / "hub" / "original", random_state(Sizes()), Sizes(), vocabulary)
    path = tmp_path / "hub" / "original" / "params.json"
    path.write_text(json.dumps({"model": json.loads(path.read_text())}))
    convert(tmp_path / "hub", tmp_path / "made")
    assert load_model(tmp_path / "made").config.num_key_value_heads == 2


def test_nothing_is_rounded_unless_asked_for(tmp_path: Path, vocabulary: Path) -> None:
    """Row 9; catches values that become infinite in float16."""
    state = random_state(Sizes())
    state["layers.1.feed_forward.w2.weight"][5, 7] = 70000.0
    folder = write(tmp_path / "meta", state, Sizes(), vocabulary, 2)
    with pytest.raises(CheckpointError, match=r"1 values of model\.layers\.1\.mlp\.down_proj\.weight are too large"):
        convert(folder, tmp_path / "made", dtype="float16")
    assert nothing_left(tmp_path / "made")
    convert(folder, tmp_path / "made", dtype="bfloat16", max_shard_size=100_000)
    assert load_model(tmp_path / "made").lm_head.weight.dtype == torch.bfloat16
    assert len(list((tmp_path / "made").glob("model-*.safetensors"))) > 1


def test_memory_holds_a_tensor_and_not_the_model(tmp_path: Path, llama_tokenizer: Path) -> None:
    """600 MB in two shards; catches shards that are loaded, or mapped and counted, whole."""
    sizes = Sizes(dim=1024, n_heads=8, n_kv_heads=8, ffn=4096, n_layers=14, vocab=32000)
    base = random_state(replace(sizes, n_layers=1), torch.float16)
    layers = {name: value for name, value in base.items() if name.startswith("layers.")}
    for i in range(1, sizes.n_layers):
        base |= {name.replace("layers.0.", f"layers.{i}."): value.clone() for name, value in layers.items()}
    folder = write(tmp_path / "meta", base, sizes, llama_tokenizer, 2)
    size = sum(path.stat().st_size for path in folder.glob("*.pth"))
    assert size > 5.5e8
    code = f"""
from pathlib import Path
from lit_llama.conversion import convert, native
from lit_llama.conversion.layouts import lit_llama as lit
from lit_llama.conversion.layouts import meta
from lit_llama.conversion.layouts import meta_writer
from lit_llama.conversion import tokens as vocabulary
import torch, sentencepiece, lit_llama.model.llama
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
convert(Path({str(folder)!r}), Path({str(tmp_path / "made")!r}))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    grown = int(done.stdout) * 1024
    assert grown < size / 2, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB, whose largest tensor has 66 MB"


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1), (5, 6), (3, 40), (15, 17), (47, 48), (20, 20)])
@pytest.mark.parametrize("dim", [0, 1])
def test_any_rows_of_a_joined_tensor_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int, start: int, stop: int | None
) -> None:
    """Catches a border between parts, or between the blocks they are read in, that is off by one."""
    whole = torch.randn(48, 12)
    for i, part in enumerate(whole.chunk(3, dim)):
        torch.save({"x": part}, tmp_path / f"{i}.pth")  # a column of parts is a view with strides
    parts = [read_pth(tmp_path / f"{i}.pth")["x"] for i in range(3)]
    monkeypatch.setattr("lit_llama.conversion.tensors._BLOCK", 7 * 48)
    assert torch.equal(Joined("x", parts, dim).read(start, stop), whole[start:stop])
    doubled = Joined("x", [part for part in parts for _ in range(2)], dim, copies=2)
    assert doubled.shape == (48, 12) and torch.equal(doubled.read(start, stop), whole[start:stop])
