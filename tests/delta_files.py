"""Bases and deltas of a tiny model, and the sum of the two as the publishers wrote it down."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_llama.conversion.delta_writing import Policy

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
