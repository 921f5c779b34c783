"""A Source -> Meta's layout: consolidated.NN.pth, params.json, checklist.chk and tokenizer.model."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_llama.conversion.layouts.meta import (
    CHECKLIST_FILE,
    LLAMA3_THETA,
    META_NAMES,
    PARAMS_FILE,
    SPLIT,
    llama3_rope,
    md5_file,
)
from lit_llama.conversion.source import EMBEDDING, HEAD, Source, check_shapes
from lit_llama.conversion.tensors import in_pairs
from lit_llama.conversion.tokens import write_tokenizer_model
from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder.publish import check_space, publish, write_json
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.files.pth.files import write_pth
from lit_llama.model.files.weights import Spec, byte_size
from lit_llama.wording import param

# multiple_of and ffn_dim_multiplier of the published models.
_WIDTHS: list[tuple[int, float | None]] = [(256, None), (1024, 1.3), (4096, 1.3), (256, 1.5), (256, 1.0), (4096, 1.2)]


def write_meta(source: Source, destination: Path, num_shards: int = 1) -> None:
    """Write a model as Meta publishes it. Each shard reads every tensor anew, so memory holds one.

    Args:
        source: The model.
        destination: Folder to make.
        num_shards: Number of consolidated.NN.pth.

    Raises:
        CheckpointError: Meta's code cannot compute this model.
        UserError: It cannot be cut into so many shards.
    """
    check_shapes(source)
    config = source.shape
    params = _params(source)
    _check_shards(config, num_shards)
    specs: dict[str, Spec] = {}
    native = {META_NAMES(name): name for name in source.specs} | {META_NAMES(HEAD): HEAD}
    for meta, name in native.items():
        if meta is None:
            raise CheckpointError(f"{source.path}: {name} has no place in Meta's layout")
        dtype, shape = source.specs.get(name, source.specs[EMBEDDING])
        specs[meta] = dtype, _part_shape(meta, shape, config, num_shards)
    with publish(destination, PARAMS_FILE) as folder:
        check_space(destination, num_shards * sum(map(byte_size, specs.values())))
        for shard in range(num_shards):

            def produce(meta: str, shard: int = shard) -> Tensor:
                name = native[meta] if native[meta] in source.specs else EMBEDDING
                return _part(meta, in_pairs(name, source.read(name), config), config, shard, num_shards)

            write_pth(folder / f"consolidated.{shard:02d}.pth", specs, produce)
        write_tokenizer_model(folder, source.files)
        write_json(folder / PARAMS_FILE, params)
        lines = [f"{md5_file(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
        (folder / CHECKLIST_FILE).write_text("".join(lines), "utf-8")


def _params(source: Source) -> dict[str, Any]:
    """Contents of params.json, or why there is none for this model."""
    config = source.shape
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise CheckpointError(
            f"{source.path}: head_dim is {config.head_dim}, in Meta's layout it is hidden_size / num_attention_heads = "
            f"{config.hidden_size / config.num_attention_heads:g}"
        )
    if beyond := config.beyond_llama:
        raise CheckpointError(f"{source.path}: the model has {beyond}, Meta's code knows none")
    if config.sliding_window is not None:
        raise CheckpointError(f"{source.path}: sliding_window is {config.sliding_window}, Meta's code knows none")
    multiple, multiplier = _width(config.hidden_size, config.intermediate_size)
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }
    if config.rope_scaling is not None:
        if config.rope_scaling != llama3_rope(config.rope_scaling.factor):
            raise CheckpointError(f"{source.path}: {config.rope_scaling} is not Llama 3.1's, which Meta's code fixes")
        params |= {"use_scaled_rope": True, "rope_scaling_factor": config.rope_scaling.factor}
    if config.num_key_value_heads == config.num_attention_heads:
        del params["n_kv_heads"]  # the code of LLaMA 1 does not know it
    return {name: value for name, value in params.items() if value is not None}


def ffn_width(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Return the number of rows of w1 that Meta's code computes."""
    width = int(8 * dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def _width(dim: int, wanted: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give a width: those of a published model, else the width itself."""
    plain = int(8 * dim / 3)
    own = (wanted, None if plain <= wanted else (wanted - 0.5) / plain)
    return next(pair for pair in [*_WIDTHS, own] if ffn_width(dim, *pair) == wanted)


def _check_shards(config: LLaMAConfig, shards: int) -> None:
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if not 1 <= shards <= 100 or size % shards:
            raise UserError(f"{param('num_shards')} is {shards}, which does not divide {name} {size}")
    heads = config.num_key_value_heads
    if heads % shards and shards % heads:
        raise UserError(
            f"{param('num_shards')} is {shards}, neither a divisor nor a multiple of num_key_value_heads {heads}"
        )


def _split_dim(meta: str, config: LLaMAConfig) -> int | None:
    """Dimension that the shards cut; the embedding is cut by rows from Llama 3 on, which its theta tells."""
    if meta == META_NAMES(EMBEDDING):
        return 0 if config.rope_theta == LLAMA3_THETA else 1
    return SPLIT.get(meta.split(".")[-2])


def _pieces(meta: str, config: LLaMAConfig, shards: int) -> int:
    """Into how many different parts a tensor is cut: fewer than shards if there are fewer key/value heads."""
    return min(shards, config.num_key_value_heads) if meta.endswith(("wk.weight", "wv.weight")) else shards


def _part_shape(meta: str, shape: tuple[int, ...], config: LLaMAConfig, shards: int) -> tuple[int, ...]:
    dim, pieces = _split_dim(meta, config), _pieces(meta, config, shards)
    return tuple(size // pieces if i == dim else size for i, size in enumerate(shape))


def _part(meta: str, whole: Tensor, config: LLaMAConfig, shard: int, shards: int) -> Tensor:
    dim, pieces = _split_dim(meta, config), _pieces(meta, config, shards)
    return whole if dim is None else whole.chunk(pieces, dim)[shard * pieces // shards].contiguous()
