"""Our GGUF files in llama.cpp itself: log-probabilities, greedy answers and tokens against our own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, write_tokenizer
from gguf_files import EXPERTS, OTHERS, SHAPE, fields_of, write_model
from gguf_files import write_gguf as write_as_llama_cpp
from llama_cpp import LlamaCpp
from tokenizers import Tokenizer

from lit_llama.conversion.bpe import adds_bos, tokenizer_json
from lit_llama.conversion.gguf.scan import scan
from lit_llama.conversion.gguf.writer import write_gguf
from lit_llama.conversion.native import open_folder
from lit_llama.model.config import RopeScaling
from lit_llama.model.llama import LLaMA

LONG = {"original_max_position_embeddings": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 24, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "attention_bias": True},
    "qwen3": {"model_type": "qwen3", "use_qk_norm": True, "head_dim": 32},
    "llama3": {"rope_theta": 5e5, "rope_scaling": RopeScaling(rope_type="llama3", factor=8, **LONG)},
    "linear": {"rope_scaling": RopeScaling(rope_type="linear", factor=4, original_max_position_embeddings=256)},
    "granite": {
        "model_type": "granite",
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": (1, 1, 1, 0)},
    "yarn": {"rope_scaling": RopeScaling(rope_type="yarn", factor=4, beta_fast=16, **LONG)},
    **{name: fields_of(raw) for name, raw in (OTHERS | EXPERTS).items()},
}
IDS = [(7 * index) % 380 + 3 for index in range(200)]


@torch.inference_mode()
def greedy(model: LLaMA, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor(ids))[-1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_we_compute(tmp_path: Path, family: str) -> None:
    """Catches whatever two readers of ours agree on: rows, epsilon, biases, scaled positions, far from the start."""
    write_tokenizer(tmp_path)
    model = tiny_model(**SHAPE | FAMILIES[family])
    write_gguf(open_folder(write_model(tmp_path, model, "float32")), tmp_path / "model.gguf", "f32")
    theirs = LlamaCpp(tmp_path / "model.gguf")
    # llama.cpp takes the long factors wherever its context is long, and looks GELU up in a table of 16-bit floats.
    short = IDS[:100] if "long" in family else IDS[:14]
    limit = 3e-3 if "gemma" in family else 1e-4
    for ids in (short, IDS):
        ours = model(torch.tensor(ids))[-1].log_softmax(-1)
        found = theirs.logprobs(ids, 384)
        assert len(found) == 384
        assert max(abs(ours[index].item() - logprob) for index, logprob in found.items()) < limit
    wanted = greedy(model, short, 8)
    end = next((place + 1 for place, token in enumerate(wanted) if token in (0, 2)), 8)
    assert theirs.greedy(short, 8)[:end] == wanted[:end]


NAMES = [
    *("qwen35", "gpt-2", "smollm", "llama-bpe", "deepseek-r1-qwen", "tekken", "dbrx", "gpt-4o", "deepseek-coder"),
    *("llama3", "llama-v3", "falcon3", "pixtral", "megrez", "refact", "mellum", "llama4"),
]
TEXTS = [
    "Below is an instruction that describes a task.",
    "  two spaces\t\ttabs\n\n\nlines  \n",
    "Zoë's naïve café, 北京 is a city. 😀👩‍👩‍👧 HTTPServer/",
    "3.14159 and 1234567 in 2024, 12x34 ½",
    "नमस्ते दुनिया, नि़मंत्रण! ก็ที่น้ำ",
    "I'll, WE'VE, they'd: don't!!! ...and so on…",
    "def add(a, b):\r\n    return a+b",
]


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_cuts_text_as_we_do(tmp_path: Path, name: str) -> None:
    """Catches an alias of another way to cut text, and a beginning of text that one of the two adds."""
    write_tokenizer(tmp_path)
    path = write_as_llama_cpp(
        tmp_path / "model.gguf",
        tiny_model(**SHAPE, num_hidden_layers=1),
        tmp_path,
        change_keys=lambda keys: keys.update({"tokenizer.ggml.pre": name}),
    )
    metadata, theirs = scan(path).metadata, LlamaCpp(path)
    ours = Tokenizer.from_str(json.dumps(tokenizer_json(metadata)))
    for text in TEXTS:
        assert theirs.tokenize(text) == ours.encode(text, add_special_tokens=False).ids, text
    assert theirs.tokenize("a city", special=True) == ours.encode("a city").ids
    assert adds_bos(metadata) is (theirs.tokenize("a", special=True)[0] == 1)


@pytest.mark.real
def test_a_real_vocabulary_gives_the_same_tokens(tmp_path: Path, real_folder: Path) -> None:
    """49152 tokens and 48900 merges, with a model of no size; catches whatever a tiny vocabulary hides."""
    from lit_llama.text.tokenizer.base import Tokenizer as Ours

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((real_folder / name).read_bytes())
    model = tiny_model(**SHAPE | {"hidden_size": 32, "head_dim": 8}, vocab_size=49152, num_hidden_layers=1)
    write_gguf(open_folder(write_model(tmp_path, model, "float16")), tmp_path / "model.gguf")
    theirs, ours = LlamaCpp(tmp_path / "model.gguf"), Ours.from_path(real_folder)
    for text in TEXTS:
        assert theirs.tokenize(text) == ours.encode(text), text
    assert theirs.tokenize("<|im_start|>user\nhi<|im_end|>\n", special=True)[0] == ours.control["<|im_start|>"]
