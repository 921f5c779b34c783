"""Meta's model once more, in its own names and row order, from its paper and code, sharing nothing with ours."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """As params.json calls them."""

    dim: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    ffn: int = 112
    vocab: int = 384
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    factor: float = 0.0  # of Llama 3.1's scaling; 0 for none

    @property
    def head(self) -> int:
        return self.dim // self.n_heads


def random_state(sizes: Sizes, dtype: torch.dtype = torch.float32, *, tied: bool = False, seed: int = 0) -> State:
    """Weights large enough for outputs to differ visibly, by Meta's names."""
    draw = torch.Generator().manual_seed(seed)
    rows = sizes.n_kv_heads * sizes.head
    shapes = {"tok_embeddings.weight": (sizes.vocab, sizes.dim), "norm.weight": (sizes.dim,)}
    for i in range(sizes.n_layers):
        for name, shape in {
            "attention.wq": (sizes.dim, sizes.dim),
            "attention.wk": (rows, sizes.dim),
            "attention.wv": (rows, sizes.dim),
            "attention.wo": (sizes.dim, sizes.dim),
            "feed_forward.w1": (sizes.ffn, sizes.dim),
            "feed_forward.w2": (sizes.dim, sizes.ffn),
            "feed_forward.w3": (sizes.ffn, sizes.dim),
            "attention_norm": (sizes.dim,),
            "ffn_norm": (sizes.dim,),
        }.items():
            shapes[f"layers.{i}.{name}.weight"] = shape
    shapes["output.weight"] = (sizes.vocab, sizes.dim)
    state = {
        name: (torch.randn(shape, generator=draw) * (0.15 if len(shape) > 1 else 0.5)).to(dtype)
        for name, shape in shapes.items()
    }
    return state | ({"output.weight": state["tok_embeddings.weight"].clone()} if tied else {})


def logits(state: State, sizes: Sizes, ids: Tensor) -> Tensor:
    """(T,) -> (T, V), with complex numbers turning neighbouring pairs, in float64."""
    state = {name: value.double() for name, value in state.items()}
    count, groups = len(ids), sizes.n_heads // sizes.n_kv_heads
    turns = torch.polar(torch.ones(()).double(), torch.outer(torch.arange(count).double(), _frequencies(sizes)))

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + sizes.norm_eps).sqrt() * state[name]

    def rotate(x: Tensor) -> Tensor:  # (T, heads, D)
        pairs = torch.view_as_complex(x.reshape(count, -1, sizes.head // 2, 2).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    h = state["tok_embeddings.weight"][ids]
    for i in range(sizes.n_layers):
        weight = {name.removeprefix(f"layers.{i}."): value for name, value in state.items()}
        x = rms(h, f"layers.{i}.attention_norm.weight")
        q, k, v = ((x @ weight[f"attention.w{part}.weight"].T).view(count, -1, sizes.head) for part in "qkv")
        q, k = rotate(q), rotate(k)
        heads = []
        for head in range(sizes.n_heads):
            scores = q[:, head] @ k[:, head // groups].T / math.sqrt(sizes.head)
            scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, head // groups])
        h = h + torch.cat(heads, -1) @ weight["attention.wo.weight"].T
        x = rms(h, f"layers.{i}.ffn_norm.weight")
        gate = x @ weight["feed_forward.w1.weight"].T
        h = h + (gate * gate.sigmoid() * (x @ weight["feed_forward.w3.weight"].T)) @ weight["feed_forward.w2.weight"].T
    return rms(h, "norm.weight") @ state["output.weight"].T


def _frequencies(sizes: Sizes) -> Tensor:
    values = []
    for i in range(0, sizes.head, 2):
        value = sizes.rope_theta ** (-i / sizes.head)
        if sizes.factor:
            turns = 8192 * value / (2 * math.pi)  # in the first context
            blend = min(max((turns - 1) / (4 - 1), 0), 1)
            value = blend * value + (1 - blend) * value / sizes.factor
        values.append(value)
    return torch.tensor(values).double()


NATIVE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def native(state: State, sizes: Sizes) -> State:
    """The same weights as Hugging Face stores them, moved row by row."""
    found = {}
    for name, value in state.items():
        stem = name.removesuffix(".weight")
        if stem in _OUTER:
            found[f"{_OUTER[stem]}.weight"] = value
            continue
        _, layer, rest = stem.split(".", 2)
        moved = in_halves(value, sizes.head) if rest in ("attention.wq", "attention.wk") else value
        found[f"model.layers.{layer}.{NATIVE[rest]}.weight"] = moved
    return found


def in_halves(weight: Tensor, head: int) -> Tensor:
    """Rows 0, 2, 4 ... of each head, then its rows 1, 3, 5 ..."""
    rows = []
    for start in range(0, len(weight), head):
        rows += [weight[start + i] for i in range(0, head, 2)]
        rows += [weight[start + i] for i in range(1, head, 2)]
    return torch.stack(rows)


def write_sentencepiece(folder: Path, size: int = 384) -> Path:
    """A tokenizer.model in LLaMA's manner: BPE, byte pieces, nothing normalised, `size` pieces."""
    import sentencepiece
    from conftest import CORPUS

    path = folder / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
            model_writer=file,
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path
