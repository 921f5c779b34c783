"""A step of generation on a CPU in one call, decode.cpp, with weights that are packed for it.

The sums of a token run in one order whatever is computed beside it: a sequence has the same logits, bit for bit, alone
and among others, with its prompt in one piece or in several, and when its keys and values are computed again. paged.py
is the plain twin.

Shapes: T tokens of all sequences, S sequences, N tokens whose logits are wanted, C hidden, D head size, V vocabulary.
"""

import ctypes
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lit_llama.errors import ResourceError, UserError
from lit_llama.model.config import KVCacheType, LLaMAConfig
from lit_llama.model.kernels.packing import DEPTH, PAIR, MappedFiles, Weights, in_turns, packed, packed_matrix
from lit_llama.model.kernels.paged import BLOCK, PagedBatch, untouched_zeros
from lit_llama.model.kernels.trained import Factors, bias_of, give_up, weight_of
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators.kernels import call, compiled
from lit_llama.model.rope import rotary

TALL = 32
"""Tokens of a tile, as in products.h; they have one adapter."""

TARGETS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Layers that are one product, in the order of decode.cpp."""

MOST_THREADS = 256
"""As in decode.cpp."""

_LINE = 64  # bytes of the processor's cache


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("at", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "k", "bits")),
    )


class _Update(ctypes.Structure):
    _fields_ = (("a", _Matrix), ("b", _Matrix))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down")),
        ("window", ctypes.c_int64),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int64) for n in ("layers", "hidden", "intermediate", "heads", "groups", "head_dim", "vocab")),
        ("eps", ctypes.c_double),
        ("layer", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("embedding_packed", ctypes.c_int64),
        ("head", _Matrix),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "tiles", "selected", "threads")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "cos", "sin", "sequence", "starts", "table")),
        ("table_stride", ctypes.c_int64),
        ("cache", ctypes.c_void_p),
        ("cache_blocks", ctypes.c_int64),
        ("cache_coded", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("tile_start", "tile_updates", "select", "logits", "memory")),
        ("longest", ctypes.c_int64),
        ("rank", ctypes.c_int64),
    )


def packs(config: LLaMAConfig, dtype: torch.dtype) -> bool:
    """Whether a model of this shape can be packed here."""
    fits = config.head_dim % 2 == 0 and config.head_dim <= 256
    scaling = config.rope_scaling
    return (
        fits
        and not config.beyond_llama
        and (scaling is None or not scaling.by_length)
        and config.num_attention_heads // config.num_key_value_heads <= TALL
        and dtype in (torch.bfloat16, torch.float32)
        and compiled() is not None
        and _is_allowed(dtype)
    )


@functools.cache
def _is_allowed(dtype: torch.dtype) -> bool:
    """Whether the system lets this process use the instructions that the kernels are compiled for."""
    allowed = ctypes.c_int64()
    call("decode_allowed", dtype, allowed)
    return bool(allowed.value)


class PackedLLaMA:
    """Weights of a model, packed.

    Args:
        model: On the CPU. Updates of low rank on its layers are left out, see `factors_of`; what else was trained is
            merged.
        dtype: Of activations, keys and values, and of weights as they are stored.
        weights: How matrices are held.
        consume: Give up the weights of the model one after another, so that they are never there twice.

    Raises:
        ResourceError: There are no kernels for it here.
    """

    def __init__(self, model: LLaMA, dtype: torch.dtype, weights: Weights = "stored", *, consume: bool = False) -> None:
        if not packs(model.config, dtype):
            raise ResourceError(f"a model of this shape cannot be packed in {dtype} on this machine, see `packs`")
        self.config, self.dtype, self._weights = model.config, dtype, weights
        self._kept: list[Tensor] = []  # what the structures point to
        self._consume, self._files = consume, MappedFiles()
        self._updates: dict[str, tuple[Any, int, list[Tensor]]] = {}
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._rotation = torch.empty(2, 0, model.config.head_dim // 2)
        config = model.config
        layers = (_Layer * config.num_hidden_layers)(
            *map(self._layer, model.model.layers, range(len(model.model.layers)))
        )
        rows = weight_of(model.model.embed_tokens, whole=True)
        tied = weight_of(model.lm_head, whole=True).data_ptr() == rows.data_ptr() and weights == "stored"
        # A copy, where the model is given up: a part of a mapped file would keep all of it.
        embedding = None if tied else self._keep(rows.to(dtype, copy=consume).contiguous())
        head = self._pack([weight_of(model.lm_head, whole=True)], None, None if weights == "stored" else 8)
        self._model = _Model(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.vocab_size,
            config.rms_norm_eps,
            layers,
            self._vector(weight_of(model.model.norm)),
            embedding,
            embedding is None,
            head,
        )
        if consume:
            model.model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    # ---- packing

    def _layer(self, layer: nn.Module, index: int) -> _Layer:
        modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        matrices = [self._matrix([modules[name] for name in names]) for names in TARGETS]
        norms = [modules[name] for name in ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")]
        vectors = [None if isinstance(norm, nn.Identity) else self._vector(weight_of(norm)) for norm in norms]
        window = self.config.window(index)
        return _Layer(*vectors, *matrices, 1 << 40 if window is None else window)

    def _matrix(self, layers: Sequence[nn.Module], bits: int | None = None) -> _Matrix:
        """One matrix of layers that read the same inputs: one below the other, or in turns where gate and up are."""
        weights, biases = [weight_of(layer) for layer in layers], [bias_of(layer) for layer in layers]
        bias = None
        if any(b is not None for b in biases):
            vectors = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            bias = in_turns(*vectors) if len(layers) == 2 else torch.cat(vectors)
        made = self._pack(weights, bias, bits)
        if self._consume:
            for layer in layers:
                give_up(layer, self._files)
        return made

    def _pack(self, weights: Sequence[Tensor], bias: Tensor | None, bits: int | None) -> _Matrix:
        outputs = sum(map(len, weights))
        if bias is not None:
            bias = nn.functional.pad(bias.float(), (0, -outputs % PAIR))
        bits = bits or {"stored": 8 * self.dtype.itemsize, "int8": 8, "int4": 4}[self._weights]
        made, steps = packed_matrix(weights, self.dtype, bits)
        at, k = self._keep(made), made.shape[1] * made.shape[3] * (8 // bits if bits <= 8 else 1)
        scales = None if steps is None else self._keep(steps)
        return _Matrix(at, scales, None if bias is None else self._keep(bias), outputs, k, bits)

    def _vector(self, vector: Tensor) -> int:
        return self._keep(vector.detach().float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    @property
    def bytes(self) -> int:
        """Memory of the packed weights."""
        return sum(tensor.nbytes for tensor in self._kept)

    # ---- adapters

    def add_adapter(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Keep the updates of an adapter for the sequences that name it.

        Args:
            name: By which sequences choose it.
            factors: Of each adapted layer, by its full name, such as model.layers.0.self_attn.q_proj.

        Raises:
            UserError: It updates something else than the linear layers of the decoder.
        """
        kept: list[Tensor] = []
        wanted = dict(factors)
        updates = (_Update * (4 * self.config.num_hidden_layers))()
        widest = 0
        for index in range(self.config.num_hidden_layers):
            for place, names in enumerate(TARGETS):
                block = "mlp" if names[0] in ("gate_proj", "down_proj") else "self_attn"
                found = [wanted.pop(f"model.layers.{index}.{block}.{target}", None) for target in names]
                if any(part is not None for part in found):
                    a, b = self._stacked(names, found)
                    widest = max(widest, len(a) + -len(a) % PAIR)
                    updates[4 * index + place] = _Update(self._factor(a, kept), self._factor(b, kept))
        if wanted:
            raise UserError(f"adapter {name!r} updates {next(iter(wanted))}, which only a merged model can have")
        self._updates[name] = updates, widest, kept

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter."""
        del self._updates[name]

    def _stacked(self, names: Sequence[str], found: Sequence[Factors | None]) -> tuple[Tensor, Tensor]:
        """The updates of layers that are one product, as one: A below A, and B at its outputs and columns."""
        config = self.config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads["v_proj"] = heads["k_proj"]
        sizes = {name: count * config.head_dim for name, count in heads.items()}
        sizes |= dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
        sizes |= dict.fromkeys(("o_proj", "down_proj"), config.hidden_size)
        ranks = [0 if part is None else len(part.a) for part in found]
        a = torch.cat([part.a.detach().float() for part in found if part is not None])
        blocks, column = [], 0
        for name, part, rank in zip(names, found, ranks, strict=True):
            block = torch.zeros(sizes[name], sum(ranks))
            if part is not None:
                block[:, column : column + rank] = part.b.detach().float() * part.scale
            blocks.append(block)
            column += rank
        return a, in_turns(*blocks) if len(blocks) == 2 else torch.cat(blocks)

    def _factor(self, factor: Tensor, kept: list[Tensor]) -> _Matrix:
        kept.append(packed(factor.to(self.dtype)))
        return _Matrix(kept[-1].data_ptr(), None, None, len(factor), kept[-1].shape[1] * kept[-1].shape[3], 16)

    # ---- the step

    def __call__(self, batch: PagedBatch, cache: "PackedCache") -> Tensor:
        """Compute the logits after the tokens that want them, (N, V) in float32. Sequences of an adapter lie next to
        each other.
        """
        config = self.config
        counts = [len(ids) for ids in batch.ids]
        tokens = sum(counts)
        order = [(start, start + count) for start, count in zip(batch.starts, counts, strict=True)]
        position = torch.tensor([p for start, end in order for p in range(start, end)])
        cos, sin = self._turned(position, max(end for _, end in order))
        whole = [
            torch.tensor(values)
            for values in (
                [token for ids in batch.ids for token in ids],
                [index for index, count in enumerate(counts) for _ in range(count)],
                [0, *_sums(counts)],
                batch.selected,
            )
        ]
        ids, sequence, starts, select = whole
        width = max(map(len, batch.tables))
        table = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch.tables], dtype=torch.int32)
        edges, updates, rank = self._tiles(counts, batch.adapters)
        tile_start, tile_updates = torch.tensor(edges), torch.tensor(updates)
        logits = torch.empty(len(select), config.vocab_size)
        step = _Step(
            tokens,
            len(counts),
            len(updates),
            len(select),
            min(torch.get_num_threads(), MOST_THREADS),
            *(x.data_ptr() for x in (ids, position, cos, sin, sequence, starts, table)),
            width,
            cache.blocks.data_ptr(),
            cache.blocks.shape[1],
            cache.coded,
            *(x.data_ptr() for x in (tile_start, tile_updates, select, logits)),
            None,
            max(end for _, end in order),
            rank,
        )
        size = ctypes.c_int64()
        call("decode_memory", self.dtype, self._model, step, size)
        if len(self._memory) < size.value + _LINE:
            self._memory = torch.empty(size.value + size.value // 4 + _LINE, dtype=torch.uint8)
        step.memory = -(-self._memory.data_ptr() // _LINE) * _LINE
        call("decode", self.dtype, self._model, step)
        return logits

    def _turned(self, position: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine at positions: two of (T, D/2), in float32."""
        if longest > self._rotation.shape[1]:
            places = torch.arange(max(256, 1 << (longest - 1).bit_length()))
            layout: Any = SimpleNamespace(position_ids=places, counts=[len(places)], lengths=[len(places)])
            self._rotation = torch.stack(rotary(self.config, layout, torch.float32)).squeeze(2)
        cos, sin = self._rotation.index_select(1, position)
        return cos, sin

    def _tiles(self, counts: Sequence[int], adapters: Sequence[str | None]) -> tuple[list[int], list[int], int]:
        """First tokens of tiles and their end, the updates of each (0 for none), and the widest rank."""
        runs: list[tuple[str | None, int]] = []
        for name, count in zip(adapters or [None] * len(counts), counts, strict=True):
            if runs and runs[-1][0] == name:
                runs[-1] = name, runs[-1][1] + count
            else:
                runs.append((name, count))
        edges, widest = [0], 0
        updates: list[int] = []
        for name, count in runs:
            first, end = edges[-1], edges[-1] + count
            edges += [min(edge + TALL, end) for edge in range(first, end, TALL)]
            at = 0
            if name is not None:
                structures, rank, _ = self._updates[name]
                at, widest = ctypes.addressof(structures), max(widest, rank)
            updates += [at] * (len(edges) - 1 - len(updates))
        return edges, updates, widest


class PackedCache:
    """Keys and values in blocks, as decode.cpp reads them.

    Args:
        config: Shape of the model.
        blocks: How many.
        dtype: As of the packed model.
        kind: How keys and values are held.
    """

    def __init__(self, config: LLaMAConfig, blocks: int, dtype: torch.dtype, kind: KVCacheType = "auto") -> None:
        self.coded = kind == "int8"
        heads = config.num_hidden_layers * config.num_key_value_heads
        size = self.bytes_of_block(config, dtype, kind) // heads
        shape = (config.num_hidden_layers, blocks, config.num_key_value_heads, size)
        self.blocks = untouched_zeros(shape, torch.int8)  # 0 x NaN of a masked key is NaN

    @staticmethod
    def bytes_of_block(config: LLaMAConfig, dtype: torch.dtype, kind: KVCacheType = "auto") -> int:
        """Return the memory that a block takes."""
        deep = config.head_dim + -config.head_dim % DEPTH
        row = deep + torch.float32.itemsize if kind == "int8" else deep * dtype.itemsize
        return 2 * BLOCK * len(config.attending_layers) * config.num_key_value_heads * row

    def copy(self, source: int, destination: int) -> None:
        """Copy a block."""
        self.blocks[:, destination] = self.blocks[:, source]

    def clear(self, block: int) -> None:
        """Set a block to zero, as after numbers that are not finite."""
        self.blocks[:, block] = 0


def _sums(counts: Iterable[int]) -> list[int]:
    total, sums = 0, []
    for count in counts:
        total += count
        sums.append(total)
    return sums
