"""Folders as Meta publishes them: shards cut row by row out of a model in Meta's own names (plain.py)."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Sizes, State, write_sentencepiece
from torch import Tensor

IDS = torch.arange(3, 40)
COLUMNS = {"wo", "w2"}
ROWS = {"wq", "wk", "wv", "w1", "w3", "output"}
MODELS = {
    "LLaMA 1": Sizes(n_kv_heads=4, norm_eps=1e-6),
    "LLaMA 2": Sizes(),
    "Llama 3": Sizes(rope_theta=500000.0),
    "Llama 3.1": Sizes(rope_theta=500000.0, factor=8.0),
    "Llama 3.2": Sizes(rope_theta=500000.0, factor=32.0),
}


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 384 pieces, as many as the tiny models have rows."""
    return write_sentencepiece(tmp_path_factory.mktemp("vocabulary"))


def cut(state: State, sizes: Sizes, shards: int, embedding: str) -> list[State]:
    """What each shard holds, as fairscale's layers keep it: all shards see one storage of their own, as Meta's do."""
    found: list[State] = []
    for shard in range(shards):
        parts: State = {"rope.freqs": torch.ones(sizes.head // 2).to(state["norm.weight"])}
        for name, whole in state.items():
            kind = name.split(".")[-2]
            how = (
                embedding
                if kind == "tok_embeddings"
                else "rows"
                if kind in ROWS
                else "columns"
                if kind in COLUMNS
                else ""
            )
            if kind in ("wk", "wv") and shards > sizes.n_kv_heads:  # each head is in several shards
                head = shard * sizes.n_kv_heads // shards
                parts[name] = whole[head * sizes.head : (head + 1) * sizes.head]
            elif how:
                size = whole.shape[how == "columns"] // shards
                span = slice(shard * size, (shard + 1) * size)
                parts[name] = whole[span] if how == "rows" else whole[:, span]
            else:
                parts[name] = whole
        flat = torch.cat([part.reshape(-1) for part in parts.values()])
        at = 0
        for name, part in parts.items():
            parts[name] = flat[at : at + part.numel()].view(part.shape)
            at += part.numel()
        found.append(parts)
    return found


def write(
    folder: Path,
    state: State,
    sizes: Sizes,
    vocabulary: Path | None,
    shards: int = 1,
    embedding: str = "columns",
    change: Callable[[list[State]], Any] = lambda parts: None,
    **params: Any,
) -> Path:
    """A folder as Meta publishes it, but for checklist.chk."""
    folder.mkdir(parents=True)
    parts = cut(state, sizes, shards, embedding)
    change(parts)
    for i, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    values: dict[str, Any] = {"dim": sizes.dim, "multiple_of": 16, "n_heads": sizes.n_heads, "n_layers": sizes.n_layers}
    values |= {"norm_eps": sizes.norm_eps, "vocab_size": -1}
    if sizes.n_kv_heads != sizes.n_heads:
        values["n_kv_heads"] = sizes.n_kv_heads
    if sizes.rope_theta != 10000.0:
        values["rope_theta"] = sizes.rope_theta
    if sizes.factor:
        values |= {"use_scaled_rope": True, "rope_scaling_factor": sizes.factor}
    values = {name: value for name, value in (values | params).items() if value != "absent"}
    (folder / "params.json").write_text(json.dumps(values))
    if vocabulary:
        (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    return folder


def write_checklist(folder: Path) -> None:
    names = [path.name for path in sorted(folder.iterdir())]
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(lines))


def equal(found: State, wanted: State) -> bool:
    """Names, dtypes and every bit."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


def nothing_left(destination: Path) -> bool:
    return not destination.exists() and not list(destination.parent.glob(f".{destination.name}*"))


def swapped(weight: Tensor, heads: int) -> Tensor:
    """The permutation in the other direction."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
