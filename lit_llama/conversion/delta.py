"""Base folder + delta folder -> merged folder, its inverse, and the proof that a merged folder is what it says."""

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.conversion.delta_config import DeltaConfig, Policy
from lit_llama.conversion.delta_writing import (
    VOCABULARY,
    Side,
    Work,
    blocks,
    check_shapes,
    check_size,
    combine,
    write,
)
from lit_llama.conversion.frame import TOKENIZER_PARTS
from lit_llama.conversion.native import open_folder
from lit_llama.conversion.source import META_FILE, Source
from lit_llama.conversion.source import check_shapes as check_model
from lit_llama.errors import CheckpointError, IntegrityError
from lit_llama.folder.lock import reserving
from lit_llama.folder.manifest import MANIFEST, check_folder, read_manifest
from lit_llama.folder.publish import check_absent, check_apart
from lit_llama.model.files.checkpoint import fingerprint_stored
from lit_llama.progress import stderr, track
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import read_object
from lit_llama.text.tokenizer.vocabulary import check_vocabulary, holds_tokenizer
from lit_llama.wording import call, param

_SAME = 0.95  # cosine of two models of one family; a difference points anywhere
_WHOLE = 0.5  # a difference is shorter than half of what it is added to
_ROUNDED = 0.9  # share of float16 values without their last three bits: 1/8 by chance, nearly all after bfloat16


def find_policy(base: Side, delta: Side) -> Policy:
    """Return the policy that shapes and values leave no doubt about.

    Raises:
        CheckpointError: More than one could be meant.
    """
    if holds_values(base, delta):
        return "ziya"
    if base.rows() == delta.rows():
        return "add"
    raise CheckpointError(
        f"{delta.folder} has {delta.rows()} embedding rows, {base.folder} has {base.rows()}: whether the new rows of "
        f"the base start as zeros ({param('policy', 'vicuna')}) or as the mean of its rows "
        f"({param('policy', 'alpaca')}) was the publisher's "
        "choice; name it"
    )


def holds_values(base: Side, delta: Side) -> bool:
    """Whether the embedding of the delta is a whole one: its rows are as long as those of the base."""
    ours, theirs = _first_rows(base).norm(), _first_rows(delta).norm()
    return bool(theirs > _WHOLE * ours)


def check_pair(base: Side, delta: Side) -> None:
    """Raise CheckpointError if base and delta are swapped, the delta is a whole model, or the base merged already."""
    ours, theirs = _norms(base), _norms(delta)
    ratio = float(theirs.norm() / ours.norm().clamp_min(1e-30))
    cosine = float(torch.cosine_similarity(ours, theirs, dim=0))
    if base.rows() == delta.rows() and torch.equal(_first_rows(base), _first_rows(delta)):
        raise CheckpointError(
            f"{base.folder} and {delta.folder} hold the same embedding of {base.rows()} rows: the base is merged "
            f"already, or both are one model; {param('base_dir')} needs the original weights"
        )
    if cosine > _SAME and ratio > _WHOLE:
        raise CheckpointError(
            f"{delta.folder} is no delta but a whole model: its norms are those of {base.folder} (cosine "
            f"{cosine:.3f}); it needs no base, use it as it is"
        )
    if ratio > 1:
        raise CheckpointError(
            f"base and delta seem swapped: the norms of {delta.folder} are {ratio:.3g} times those of {base.folder}; "
            f"{param('base_dir')} is the model, {param('delta_dir')} what its publisher adds"
        )


def rounded_through_bfloat16(side: Side) -> bool:
    """Whether float16 weights were bfloat16 once, as a converter that loads models in bfloat16 leaves them."""
    name = next(name for name in side.stored if name.endswith("down_proj.weight"))
    value = side.stored[name].read(0, min(64, side.stored[name].shape[0]))
    if value.dtype is not torch.float16:
        return False
    bits = value[value.abs() > 2**-14].view(torch.int16)  # below, float16 itself has fewer bits
    return bits.numel() > 0 and float((bits & 7 == 0).float().mean()) > _ROUNDED


def _first_rows(side: Side) -> Tensor:
    stored = side.stored[VOCABULARY[0]]
    return stored.read(0, min(256, stored.shape[0])).float()


def _norms(side: Side) -> Tensor:
    names = sorted(name for name in side.stored if name.endswith("norm.weight"))
    return torch.cat([side.stored[name].read().float() for name in names])


ROWS = 32
"""Rows of each tensor that are added again when a merged folder is verified."""


@reserving
def apply(
    base_dir: Path,
    delta_dir: Path,
    destination: Path,
    config: DeltaConfig | None = None,
) -> None:
    """Write base + delta.

    Args:
        base_dir: The original model.
        delta_dir: What its publisher adds.
        destination: Folder to make.
        config: How; None for the defaults.

    Raises:
        UserError: The destination exists, or lies in an input.
        CheckpointError: Base and delta do not fit each other, or are not what they are called.
        IntegrityError: The delta says that it was made from another base.
        ResourceError: The disk has no room.
    """
    config = config or DeltaConfig()
    check_absent(destination)
    check_apart(destination, base_dir, delta_dir)
    work_base, work_delta = open_folder(base_dir), open_folder(delta_dir)
    base, delta = _side(work_base), _side(work_delta)
    _check_origin(base, delta)
    check_size(base, delta)
    check_pair(base, delta)
    chosen = find_policy(base, delta) if config.policy == "auto" else config.policy
    check_shapes(base, delta, chosen)
    work_delta = _with_tokenizer(work_base, work_delta, chosen)
    if rounded_through_bfloat16(base):
        _doubt_base(base_dir, config.accept_rounded_base)
    if holds_values(base, delta) != (chosen == "ziya"):
        found = "differences" if chosen == "ziya" else "whole rows"
        stderr().print(f"warning: the embedding of {delta_dir} seems to hold {found}, unlike {param('policy', chosen)}")
    write(Work(work_base, work_delta, chosen, +1, config.dtype), destination, config.shard_bytes, config.prompt_style)


@reserving
def make(
    base_dir: Path,
    target_dir: Path,
    destination: Path,
    config: DeltaConfig | None = None,
) -> None:
    """Write target - base, which `apply` adds again.

    Args:
        base_dir: The original model.
        target_dir: The model to come back to.
        destination: Folder to make.
        config: How; None for the defaults.

    Raises:
        UserError: The destination exists, or lies in an input.
        CheckpointError: Base and target do not fit each other.
        ResourceError: The disk has no room.
    """
    config = config or DeltaConfig()
    check_absent(destination)
    check_apart(destination, base_dir, target_dir)
    work_base, work_target = open_folder(base_dir), open_folder(target_dir)
    base, target = _side(work_base), _side(work_target)
    chosen: Policy = "add" if base.rows() == target.rows() else "ziya"
    if config.policy != "auto":
        chosen = config.policy
    check_size(base, target)
    check_shapes(base, target, chosen)
    work_target = _with_tokenizer(work_base, work_target, chosen)
    write(Work(work_base, work_target, chosen, -1, config.dtype), destination, config.shard_bytes, None)


def verify(merged_dir: Path, base_dir: Path | None = None, delta_dir: Path | None = None) -> None:
    """Check every file against the manifest, then the model; with base and delta at hand also rows of every tensor.

    Raises:
        IntegrityError: Something is not what the folder says it is.
    """
    start = time.perf_counter()
    sums = read_manifest(merged_dir)
    check_folder(merged_dir, whole=True)
    opened = open_folder(merged_dir)
    check_model(opened)
    merged = _side(opened)
    _count_tokens(merged_dir, merged)
    said = f"{merged_dir}: {len(sums)} files are as in {MANIFEST}"
    if base_dir and delta_dir:
        record = read_object(merged_dir / META_FILE).get("delta")
        if not isinstance(record, dict) or "policy" not in record:
            raise IntegrityError(f"{merged_dir / META_FILE} does not say by which policy a delta was added")
        sides = _side(open_folder(base_dir)), _side(open_folder(delta_dir))
        said += f"; {_compare(merged, *sides, record['policy']):,} rows are base + delta, bit for bit"
    stderr().print(f"{said}; {time.perf_counter() - start:.1f} s")


def _side(source: Source) -> Side:
    if not source.stored:  # made while it is read
        raise CheckpointError(f"{source.path} ({source.kind}): bring it into 16 bits first, with {call('convert')}")
    return Side(source.path, source.stored)


def _check_origin(base: Side, delta: Side) -> None:
    """What the folders themselves say of where they came from."""
    merged = read_object(base.folder / META_FILE).get("delta")
    if isinstance(merged, dict):
        raise CheckpointError(
            f"{base.folder} is merged already: its {META_FILE} says by which delta ({merged.get('delta')}); "
            f"{param('base_dir')} needs the original weights"
        )
    made = read_object(delta.folder / META_FILE).get("difference")
    if isinstance(made, dict) and made["base"]["fingerprint"] != fingerprint_stored(base.stored):
        raise IntegrityError(
            f"{delta.folder} was made from other weights than those in {base.folder} (then at {made['base']['path']}): "
            "the sum would be neither model"
        )


def _with_tokenizer(base_source: Source, other_source: Source, policy: Policy) -> Source:
    """The other side with the tokenizer of the merged model, which comes with it; that of a base knows nothing of new
    rows, and is taken only where there are none."""
    base, other = _side(base_source), _side(other_source)
    if not holds_tokenizer(other_source.files) and policy == "add" and base.rows() == other.rows():
        own = {name: path for name, path in base_source.files.items() if name in TOKENIZER_PARTS}
        if holds_tokenizer(own):
            _count_tokens(base.folder, base)
            stderr().print(f"{other.folder} has no tokenizer: that of {base.folder} is taken", markup=False)
            return replace(other_source, files=own | dict(other_source.files))
    tokens = _count_tokens(other.folder, other)
    if other.rows() > base.rows() >= tokens:
        raise CheckpointError(
            f"the tokenizer in {other.folder} has {tokens} tokens, like one of {base.folder} with its {base.rows()} "
            f"rows; but the rows go up to {other.rows()}: put the tokenizer there that was published with these weights"
        )
    return other_source


def _count_tokens(folder: Path, side: Side) -> int:
    tokenizer = Tokenizer.from_path(folder)
    check_vocabulary(folder, side.rows(), tokenizer)
    return tokenizer.size


def _doubt_base(base_dir: Path, accepted: bool) -> None:
    message = (
        f"{base_dir} is stored in float16, but went through bfloat16 on its way (a converter that loads models in "
        "bfloat16 does that): 7 of 8 weights are not those that the delta was made for"
    )
    if not accepted:
        raise CheckpointError(
            f"{message}. Convert the original weights with {call('convert')}, or accept it with "
            f"{param('accept_rounded_base', True)}"
        )
    stderr().print(f"warning: {message}")


def _compare(merged: Side, base: Side, delta: Side, policy: Policy) -> int:
    """Add random rows of every tensor again; gives their number."""
    draw, count = random.Random(0), 0
    for name in track(sorted(merged.stored), "adding rows again"):
        stored = merged.stored[name]
        for start, stop in _ranges(stored.shape, draw):
            wanted = torch.cat(list(combine(base, delta, policy, name, stored.dtype, rows=(start, stop))))
            if not torch.equal(stored.read(start, stop), wanted):
                raise IntegrityError(f"{merged.folder}: {name} is not the sum of {base.folder} and {delta.folder}")
            count += stop - start
    return count


def _ranges(shape: tuple[int, ...], draw: random.Random) -> Iterator[tuple[int, int]]:
    if len(shape) < 2 or shape[0] <= ROWS:
        yield from blocks(shape)
    else:
        yield from ((row, row + 1) for row in sorted(draw.sample(range(shape[0]), ROWS)))
