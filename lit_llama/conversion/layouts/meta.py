"""Meta's layout, consolidated.NN.pth beside params.json -> a Source; its shards are joined tensor by tensor.

It is the layout of Meta's own code: rotary partners side by side, each linear layer cut over the shards as fairscale
does it. meta_writer.py writes it.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.conversion.source import (
    EMBEDDING,
    HEAD,
    NAMES,
    Names,
    Source,
    check_shapes,
    check_stored,
    expected_shapes,
    settings,
)
from lit_llama.conversion.tensors import Joined, in_halves, same
from lit_llama.conversion.tokens import Vocabulary, read_vocabulary
from lit_llama.errors import CheckpointError, IntegrityError
from lit_llama.model.config import LLaMAConfig, RopeScaling
from lit_llama.model.files.pth.files import read_pth
from lit_llama.objects import as_object, read_text
from lit_llama.progress import track

SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
PARAMS_FILE, CHECKLIST_FILE = "params.json", "checklist.chk"
META_NAMES = Names(
    outer={EMBEDDING: "tok_embeddings.weight", "model.norm.weight": "norm.weight", HEAD: "output.weight"},
    layer="layers.{}.",
    inner={
        "self_attn.q_proj.weight": "attention.wq.weight",
        "self_attn.k_proj.weight": "attention.wk.weight",
        "self_attn.v_proj.weight": "attention.wv.weight",
        "self_attn.o_proj.weight": "attention.wo.weight",
        "mlp.gate_proj.weight": "feed_forward.w1.weight",
        "mlp.up_proj.weight": "feed_forward.w3.weight",
        "mlp.down_proj.weight": "feed_forward.w2.weight",
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
    },
)
SPLIT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}
"""Dimension along which the shards cut a tensor. Norms are whole in each; the embedding depends on the family."""

LLAMA3_THETA = 500000.0
_BLOCK = 16 * 2**20
# What params.json may say. The first two groups are read; the last is about running and training.
_SIZES = ("dim", "n_layers", "n_heads")
_READ = ("norm_eps", "n_kv_heads", "vocab_size", "rope_theta", "use_scaled_rope", "rope_scaling_factor")
_IGNORED = ("multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len")


@dataclass(frozen=True)
class Family:
    """Settings that params.json leaves unsaid: a family's name, context length, and tiktoken's special tokens."""

    name: str
    context: int
    tokens: str = "3"


def has_shards(folder: Path) -> bool:
    """Whether a folder holds at least one shard of Meta's."""
    return folder.is_dir() and any(SHARD.fullmatch(path.name) for path in folder.iterdir())


def open_meta(folder: Path) -> Source:
    """Open the model in a folder of Meta's, or in the `original/` of a folder of the Hub.

    Args:
        folder: Holds consolidated.NN.pth, params.json, and tokenizer.model here or in the folder above.

    Raises:
        CheckpointError: Shards are missing or do not fit each other, params.json, or the tokenizer.
        IntegrityError: A file is not what checklist.chk says.
    """
    if not has_shards(folder) and has_shards(folder / "original"):
        folder = folder / "original"
    paths = _shards(folder)
    params = read_params(folder / PARAMS_FILE)
    verified = verify_checklist(folder)
    shards = [read_pth(path, verify=path.name not in verified) for path in paths]
    tensors = _join(paths, shards, params)
    _check_width(folder / PARAMS_FILE, params, tensors, len(paths))
    head, family = tensors.get("output.weight"), _family(params)
    tied = head is None or same(tensors["tok_embeddings.weight"], head)
    rows = tensors["tok_embeddings.weight"].shape[0]
    vocabulary = read_vocabulary(folder, rows, family.context, llama=family.tokens)
    config = _config(folder / PARAMS_FILE, params, tensors, vocabulary, tied)
    names = {name: META_NAMES(name) or "" for name in expected_shapes(config)}
    check_stored(folder, {*names.values()} | ({"output.weight"} if head else set()), tensors)
    source = Source(
        path=folder,
        kind=f"Meta, {len(paths)} shard{'s' * (len(paths) > 1)}",
        config=settings(config),
        specs={name: (NAMES[tensors[meta].dtype], tensors[meta].shape) for name, meta in names.items()},
        read=lambda name: in_halves(name, tensors[names[name]].read(), config),
        files=vocabulary.files,
        notes={
            "params": params,
            "family": family.name,
            "context": f"{family.context} tokens as in every {family.name}; {PARAMS_FILE} does not say",
            "head": "the embedding: the file holds the same matrix twice" if tied else "its own",
            "tokens": f"{vocabulary.size} in the tokenizer, {rows} rows in the embedding",
            "md5": f"{len(verified)} files are what {CHECKLIST_FILE} says" if verified else f"no {CHECKLIST_FILE}",
        },
    )
    check_shapes(source)
    for tensor in tensors.values():
        if len(tensor.shape) == 1:  # norms, of which every shard has a copy: compared now, not after an hour
            tensor.read()
    return source


def _shards(folder: Path) -> list[Path]:
    """consolidated.00.pth, 01 ... without a gap."""
    found = sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name)) if folder.is_dir() else []
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    if not found or found != wanted:
        last = int(found[-1][-6:-4]) if found else 0
        missing = [name for name in (f"consolidated.{i:02d}.pth" for i in range(last + 1)) if name not in found]
        raise CheckpointError(
            f"{folder}: found {', '.join(found) or 'no shard'}, missing is {', '.join(missing)}: download it again"
        )
    return [folder / name for name in found]


def read_params(path: Path) -> dict[str, Any]:
    """Read the settings of a params.json, checked.

    Raises:
        CheckpointError: It is missing, empty, or describes a model that is not implemented.
    """
    if not path.is_file() or not path.stat().st_size:
        what = "is empty, as after a failed download" if path.is_file() else "does not exist"
        raise CheckpointError(f"{path} {what}; Meta publishes it beside the shards: download it again")
    try:
        raw = as_object(read_text(path))
        params = dict(raw.get("model", raw))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from error
    for name in _SIZES:
        if type(params.get(name)) is not int or params[name] < 1:
            raise CheckpointError(f"{path}: {name} is {params.get(name)!r}, expected a positive whole number")
    if params["dim"] % params["n_heads"] or not isinstance(params.get("norm_eps"), float):
        raise CheckpointError(
            f"{path}: dim {params['dim']}, n_heads {params['n_heads']}, norm_eps {params.get('norm_eps')!r}; expected "
            "heads that divide dim, and a small number"
        )
    for name, value in params.items():
        if name not in (*_SIZES, *_READ, *_IGNORED) and value not in (None, False, -1):
            raise CheckpointError(f"{path}: {name} is {value!r}, which is not implemented")
    return params


def verify_checklist(folder: Path) -> set[str]:
    """Compare the md5 of the files with checklist.chk.

    Returns:
        Names of the files that were compared; none if there is no checklist.

    Raises:
        IntegrityError: The list is empty, or a file is missing or another one.
    """
    path = folder / CHECKLIST_FILE
    if not path.is_file():
        return set()
    lines = [line.split() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        raise IntegrityError(f"{path} is empty, as after a failed download: download it again, or remove it")
    for line in lines:
        if len(line) != 2 or not re.fullmatch(r"[0-9a-f]{32}", line[0]) or Path(line[1]).name != line[1]:
            raise IntegrityError(f"{path}: {' '.join(line)!r} is not an md5 and a file name")
    for expected, name in lines:
        file = folder / name
        if not file.is_file():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir()))
            raise IntegrityError(f"{path} lists {name}, which is missing (found: {found}): download it again")
        if (got := md5_file(file)) != expected:
            raise IntegrityError(f"{file}: md5 expected {expected}, got {got}: download it again")
    return {name for _, name in lines}


def md5_file(path: Path) -> str:
    """Return the MD5 of a file as md5sum prints it; with a bar, since shards are large."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        for _ in track(range(0, max(path.stat().st_size, 1), _BLOCK), f"md5 of {path.name}"):
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _join(paths: list[Path], shards: list[dict[str, Any]], params: Mapping[str, Any]) -> dict[str, Joined]:
    """Every tensor as a whole, by Meta's names."""
    for path, shard in zip(paths, shards, strict=True):
        if differing := sorted(shard.keys() ^ shards[0].keys()):
            raise CheckpointError(f"{path} and {paths[0].name} hold other tensors, such as {differing[0]}")
    tensors = {}
    for name in shards[0]:
        if name.endswith("rope.freqs"):  # follow from the configuration
            continue
        parts = [shard[name] for shard in shards]
        dim = SPLIT.get(name.split(".")[-2] if "." in name else name)
        if name == "tok_embeddings.weight":  # columns in LLaMA 1 and 2, rows in Llama 3: what adds up to the width
            dim = 0 if parts[0].shape[1:] == (params["dim"],) else 1
        tensors[name] = Joined(name, parts, dim or 0, len(parts) if dim is None else 1)
        if name.endswith(("wk.weight", "wv.weight")) and tensors[name].shape:
            # More shards than key/value heads: neighbours have copies of one.
            rows = _key_heads(params) * params["dim"] // params["n_heads"]
            copies, rest = divmod(tensors[name].shape[0], rows)
            if not rest and copies > 1 and len(parts) % copies == 0:
                tensors[name] = Joined(name, parts, 0, copies)
    return tensors


def _key_heads(params: Mapping[str, Any]) -> int:
    return int(params.get("n_kv_heads") or params["n_heads"])


def _check_width(path: Path, params: Mapping[str, Any], tensors: Mapping[str, Joined], shards: int) -> None:
    """A missing last shard, or another model's params.json, would otherwise give a plausible model of another width."""
    for name in ("tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise CheckpointError(f"{path.parent}: tensor {name} is missing, or no matrix")
    (rows, width), dim = tensors["layers.0.attention.wq.weight"].shape, params["dim"]
    if width != dim:
        raise CheckpointError(
            f"{path}: dim is {dim}, but wq has {width} columns: it belongs to a model of another size"
        )
    if rows != dim:
        raise CheckpointError(
            f"{path}: dim is {dim}, but wq has {rows} rows in {shards} shard{'s' * (shards > 1)}: shards are missing, "
            "or of another model"
        )


def _config(
    path: Path, params: Mapping[str, Any], tensors: Mapping[str, Joined], vocabulary: Vocabulary, tied: bool
) -> LLaMAConfig:
    rows = tensors["tok_embeddings.weight"].shape[0]
    if params.get("vocab_size", -1) not in (-1, rows):
        raise CheckpointError(f"{path}: vocab_size is {params['vocab_size']}, but the embedding has {rows} rows")
    try:
        return LLaMAConfig(
            vocab_size=rows,
            hidden_size=params["dim"],
            intermediate_size=tensors["layers.0.feed_forward.w1.weight"].shape[0],
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=_key_heads(params),
            head_dim=params["dim"] // params["n_heads"],
            max_position_embeddings=_family(params).context,
            rms_norm_eps=params["norm_eps"],
            rope_theta=float(params.get("rope_theta", 10000.0)),
            rope_scaling=_rope_scaling(params, tied),
            tie_word_embeddings=tied,
            bos_token_id=vocabulary.bos,
            eos_token_id=vocabulary.eos,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _family(params: Mapping[str, Any]) -> Family:
    """Which family a model is of, from what its params.json does say."""
    theta, grouped = params.get("rope_theta", 10000.0), _key_heads(params) < params["n_heads"]
    if params.get("use_scaled_rope"):
        return Family("Llama 3.1 or later", 131072, "3.1")
    if theta == LLAMA3_THETA:
        return Family("Llama 3", 8192)
    if theta == 1000000.0:
        return Family("Code Llama", 16384)
    # 30B and 65B exist in the first generation only, 65B with the epsilon of the second.
    first = params["norm_eps"] < 1e-5 or params["dim"] == 6656 or (params["dim"] == 8192 and not grouped)
    return Family("LLaMA 1", 2048) if first else Family("LLaMA 2", 4096)


def _rope_scaling(params: Mapping[str, Any], tied: bool) -> RopeScaling | None:
    """Of Llama 3.1 and later; all but the factor are constants in Meta's code.

    Older params.json leave the factor to the code, too. It is 32 in Llama 3.2, whose text models (1B with dim 2048, 3B
    with 3072) alone share embedding and head, and 8 in 3.1 and 3.3.
    """
    if not params.get("use_scaled_rope"):
        return None
    small = tied or params["dim"] in (2048, 3072)
    return llama3_rope(params.get("rope_scaling_factor") or (32.0 if small else 8.0))


def llama3_rope(factor: float) -> RopeScaling:
    """Return the rotary scaling that use_scaled_rope stands for."""
    return RopeScaling(
        rope_type="llama3",
        factor=float(factor),
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
