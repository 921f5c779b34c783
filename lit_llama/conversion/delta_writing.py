"""The sum or the difference of two folders, file by file: an interrupted run goes on where it stopped.

Sums are made in float32 and rounded once, which for float16 is bit for bit the sum in float16: float32 has enough
digits that rounding twice cannot differ. Policies are those of the publishers:

- ziya: embedding and head come from the delta as they are, the rest is added (IDEA-CCNL, Ziya-LLaMA-13B-v1).
- vicuna: the base grows by rows of zeros, then everything is added (lm-sys, Vicuna v0).
- alpaca: the base grows by rows that are the mean of its rows, then everything is added (Stanford Alpaca).
- add: same shapes, everything is added (lm-sys, Vicuna v1.1).
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.conversion.delta_config import Policy
from lit_llama.conversion.source import META_FILE, Source, write_files
from lit_llama.conversion.tokens import complete
from lit_llama.errors import CheckpointError
from lit_llama.folder.manifest import write_manifest
from lit_llama.folder.publish import Staging, check_space, resume, write_json
from lit_llama.model.files.checkpoint import fingerprint_stored
from lit_llama.model.files.shards import plan_shards, write_index, write_shard
from lit_llama.model.files.weights import DTYPES, Spec, Stored, byte_size
from lit_llama.progress import stderr, track
from lit_llama.text.config import StyleName
from lit_llama.text.prompts.encode import TEMPLATE_FILE, begins, folder_style, named_style
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.vocabulary import identity
from lit_llama.wording import param

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""The matrices with a row for each token, the only ones a policy treats on their own."""

_BLOCK = 16 << 20  # bytes of float32 that are summed at a time


@dataclass(frozen=True)
class Side:
    """Base, delta or target: where its tensors lie."""

    folder: Path
    stored: Mapping[str, Stored]

    def rows(self) -> int:
        """Return the number of rows of the embedding (R)."""
        return self.stored[VOCABULARY[0]].shape[0]


def check_size(base: Side, delta: Side) -> None:
    """Raise CheckpointError unless both have the same layers, and tensors of the same names."""
    wide = {side.folder: side.stored["model.norm.weight"].shape[0] for side in (base, delta)}
    deep = {side.folder: sum(name.endswith("input_layernorm.weight") for name in side.stored) for side in (base, delta)}
    if len({*wide.values()}) > 1 or len({*deep.values()}) > 1:
        sizes = ", ".join(f"{folder} has {deep[folder]} layers of width {wide[folder]}" for folder in wide)
        raise CheckpointError(f"the delta belongs to a base of another size: {sizes}")
    if missing := sorted(base.stored.keys() ^ delta.stored.keys()):
        only = base.folder if missing[0] in base.stored else delta.folder
        raise CheckpointError(f"{len(missing)} tensors are on one side only, such as {missing[0]} in {only}")


def check_shapes(base: Side, delta: Side, policy: Policy) -> None:
    """Raise CheckpointError unless every tensor of the delta can be put on the base by this policy."""
    for name, part in delta.stored.items():
        there = base.stored[name].shape
        grows = name in VOCABULARY and part.shape[1:] == there[1:] and part.shape[0] > there[0]
        if part.shape != there and not (grows and policy != "add"):
            hint = ""
            if grows:
                hint = (
                    f"; {param('policy', 'add')} needs equal shapes: say how the base grows with "
                    f"{param('policy', 'ziya')}, vicuna or alpaca"
                )
            elif name in VOCABULARY and part.shape[0] < there[0]:
                hint = "; the base has more rows than the delta: it may be merged already, or is another base"
            raise CheckpointError(f"{name} is {there} in {base.folder}, {part.shape} in {delta.folder}{hint}")


def combine(
    base: Side,
    other: Side,
    policy: Policy,
    name: str,
    dtype: torch.dtype,
    *,
    sign: int = 1,
    rows: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """Yield a tensor of base + delta, or with sign -1 of target - base, in `dtype`: all of it, or the rows start to
    stop, in blocks of rows, so that memory holds one block.

    Raises:
        CheckpointError: A value is not finite.
    """
    part, ground = other.stored[name], base.stored[name]
    first, last = rows or (0, part.shape[0])
    own = name in VOCABULARY
    for start, stop in blocks(part.shape, first, last):
        value = part.read(start, stop).float()
        if not (own and policy == "ziya"):
            old = min(max(ground.shape[0] - start, 0), stop - start)  # rows after these are new to the base
            value[:old] += sign * ground.read(start, start + old).float() if old else 0
            if own and policy == "alpaca":
                value[old:] += sign * mean_row(ground)
        block = value.to(dtype)
        if not block.isfinite().all():
            raise CheckpointError(f"{name}: the result has values that are not finite in {str(dtype)[6:]}")
        yield block


@lru_cache(maxsize=2)
def mean_row(stored: Stored) -> Tensor:
    """Return the mean of all rows: (R, C) -> (C,) in float32, summed in float64."""
    total = torch.zeros(stored.shape[1:], dtype=torch.float64)
    for start, stop in blocks(stored.shape):
        total += stored.read(start, stop).double().sum(0)
    return (total / stored.shape[0]).float()


def blocks(shape: tuple[int, ...], first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that together are the rows first to last of a tensor, each a few megabytes."""
    step = max(1, _BLOCK // (4 * max(1, math.prod(shape[1:]))))
    last = shape[0] if last is None else last
    for start in range(first, last, step):
        yield start, min(start + step, last)


def digest(stored: Stored) -> str:
    """Return the sha256 of a tensor's bytes, row after row."""
    result = hashlib.sha256()
    for start, stop in blocks(stored.shape):
        result.update(stored.read(start, stop).view(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


@dataclass(frozen=True)
class Work:
    """Weights that are to be written, and the sides that they are computed from.

    Args:
        base: The original model.
        other: The delta, or the model that a delta is made for.
        policy: How they fit each other.
        sign: 1 for base + other, -1 for other - base.
        dtype: Of the result, such as "float16"; None if both are stored in the same.
    """

    base: Source
    other: Source
    policy: Policy
    sign: int
    dtype: str | None

    @cached_property
    def sides(self) -> dict[str, Side]:
        """Places of the tensors of both sides."""
        return {"base": Side(self.base.path, self.base.stored), "other": Side(self.other.path, self.other.stored)}

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of every tensor of the result.

        Raises:
            CheckpointError: Base and other are stored in different dtypes, and none was named.
        """
        named = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}.get(self.dtype or "")
        specs = {}
        for name, (theirs, shape) in self.other.specs.items():
            ours = self.base.specs[name][0]
            if not named and ours != theirs:
                raise CheckpointError(
                    f"{name} is {ours} in {self.base.path}, {theirs} in {self.other.path}: name the dtype of the "
                    f"result with {param('dtype')}. A base in another dtype than the publisher's gives other sums"
                )
            specs[name] = (named or theirs, shape)
        return specs

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides every byte of the weights."""
        base, other = fingerprint_stored(self.base.stored), fingerprint_stored(self.other.stored)
        return {"base": base, "other": other, "policy": self.policy, "sign": self.sign}

    def describe(self) -> str:
        """Return the decision in words."""
        base, other = self.sides["base"], self.sides["other"]
        new = other.rows() - base.rows()
        how = {
            "ziya": f"embedding and head as they are in {other.folder}",
            "vicuna": f"{new} rows of zeros put to the base",
            "alpaca": f"{new} mean rows put to the base",
            "add": "equal shapes",
        }[self.policy]
        return f"policy {self.policy}: {how}; {len(self.specs)} tensors, {other.rows()} embedding rows"


def write(work: Work, destination: Path, max_shard_size: int, style: StyleName | None) -> None:
    """Write the folder, its chat template that of `style` if one is named.

    Raises:
        UserError: The destination exists, or another process is making it.
        CheckpointError: A value of the result is not finite.
        ResourceError: The disk has no room.
    """
    start = time.perf_counter()
    shards = plan_shards(work.specs, max_shard_size)
    plan = hashlib.sha256(json.dumps([work.identity, work.specs, shards]).encode()).hexdigest()
    stderr().print(work.describe())
    with resume(destination, plan) as staging:
        left = {file: names for file, names in shards.items() if file not in staging.done}
        if staging.done:
            stderr().print(f"going on where it stopped: {len(staging.done)} of {len(shards)} files are there")
        names = [name for file in left for name in left[file]]
        check_space(destination, sum(byte_size(work.specs[name]) for name in names))
        bar = iter(track(names, f"writing {destination}"))
        for file in left:
            _write_file(work, staging, file, left[file], bar)
        next(bar, None)  # lets the bar finish
        write_index(staging.path, shards, work.specs)
        _write_settings(work, staging.path, style)
        _write_origin(work, staging)
        write_manifest(staging.path, {file: staging.done[file]["sha256"] for file in shards})
    parameters = sum(math.prod(shape) for _, shape in work.specs.values())
    stderr().print(f"{destination}: {parameters:,} parameters, {time.perf_counter() - start:.1f} s")


def _write_file(work: Work, staging: Staging, file: str, names: list[str], bar: Iterator[str]) -> None:
    """One file of weights; what went into it is hashed on the way."""
    hashes: dict[str, dict[str, str]] = {side: {} for side in work.sides}

    def tensors() -> Iterator[Iterator[Tensor]]:
        for name in names:
            next(bar)
            dtype = DTYPES[work.specs[name][0]]
            for side, places in work.sides.items():
                hashes[side][name] = digest(places.stored[name])
            yield combine(work.sides["base"], work.sides["other"], work.policy, name, dtype, sign=work.sign)

    part = staging.path / f"{file}.part"
    sha256 = write_shard(part, {name: work.specs[name] for name in names}, tensors())
    part.replace(staging.path / file)
    staging.finish(file, {"sha256": sha256, **hashes})


def _write_settings(work: Work, folder: Path, style: StyleName | None) -> None:
    """Configuration and tokenizer of the other side, and the prompt style."""
    rows = work.sides["other"].rows()
    result = replace(work.other, config={**work.other.config, "vocab_size": rows}, specs=work.specs)
    write_files(result, folder)
    if work.sign > 0:
        complete(folder)
    tokenizer = Tokenizer.from_path(folder)
    named = named_style(style) if style else folder_style(folder)
    if named is None and {"<human>", "<bot>"} <= tokenizer.added.keys():
        named = named_style("ziya")  # its folders name none, and asked otherwise it does not answer
    if named:
        (folder / TEMPLATE_FILE).write_text(named.jinja(begins(tokenizer, named)), "utf-8")
        stderr().print(f"its {TEMPLATE_FILE} says how it is asked: prompt style {named.name}")
    elif work.sign > 0:
        stderr().print(f"it has no chat template: name the style it was trained in with {param('prompt_style')}")


def _write_origin(work: Work, staging: Staging) -> None:
    """meta.json: both inputs with a hash over all their tensors, however these were cut into files."""
    origin: dict[str, Any] = {"policy": work.policy, "made_by": f"lit_llama {version('lit_llama')}"}
    other = "delta" if work.sign > 0 else "target"
    for key, side, source in (("base", "base", work.base), (other, "other", work.other)):
        hashes = {name: value for record in staging.done.values() for name, value in record[side].items()}
        origin[key] = {
            "path": str(source.path),
            "fingerprint": work.identity[side],
            "weights_sha256": hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest(),
        }
    tokenizer = identity(Tokenizer.from_path(staging.path))
    kind = "delta" if work.sign > 0 else "difference"
    write_json(staging.path / META_FILE, {"format": 1, kind: origin, "tokenizer": tokenizer})
