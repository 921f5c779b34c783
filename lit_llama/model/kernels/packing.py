"""Weights in the order in which products.h and quantized.h read them.

Shapes: a weight is (N, K), N outputs and K inputs; both are filled up with zeros.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.model.operators.kernels import call, native


class MappedFiles:
    """Files that are mapped when it is made, of which only Linux tells."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if sys.platform.startswith("linux"):
            # By newlines alone, which are escaped in names of files there, as no other end of a line is.
            for line in Path("/proc/self/maps").read_bytes().decode("utf-8", "replace").rstrip("\n").split("\n"):
                span, _, _, _, inode, *_ = line.split(None, 5)
                start, _, end = span.partition("-")
                if inode != "0":
                    self._ranges.append((int(start, 16), int(end, 16)))

    def forget(self, tensor: Tensor) -> int:
        """Give back the memory of a tensor that lies in a file and has not been written to; bytes that were given.

        Whoever reads it again finds the numbers of the file. A tensor that is in no file stays as it is.
        """
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not tensor.nbytes or not any(start <= first and last <= end for start, end in self._ranges):
            return 0
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        length = last // mmap.PAGESIZE * mmap.PAGESIZE - start
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return length if length > 0 and madvise(start, length, mmap.MADV_DONTNEED) == 0 else 0


Weights = Literal["stored", "int8", "int4"]
"""How generation holds the weights of matrices: as they are, or in groups of 8-bit or 4-bit codes with a scale."""

BLOCK, PAIR, DEPTH = 16, 32, 32
"""Outputs of a block and of a pair of blocks, and of what K is a multiple, as in products.h."""

GROUP = {8: 64, 4: 32}
"""Inputs that share a scale, by the bits of a code; as in quantized.h."""

ZERO = {8: 128, 4: 8}
"""The code of zero."""

PIECE = 1 << 21
"""Numbers of a weight that are packed at a time: what is made of them on the way takes several floats for each."""


def packed_matrix(weights: Sequence[Tensor], dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor | None]:
    """Pack weights (N, K) of any dtype as one matrix of a dtype, or as its codes of 8 or 4 bits and their scales.

    Two weights are packed in turns, as by `in_turns`, more one below the other. Rows are packed piece by piece: beside
    the result there is never more than a piece.
    """
    if len(weights) > 2 and any(len(weight) % BLOCK for weight in weights):
        weights = [torch.cat([*weights])]
    step = len(weights) if len(weights) == 2 else 1
    total = sum(-(-len(weight) // BLOCK) for weight in weights)
    whole: list[Tensor] = []
    below = 0
    for number, weight in enumerate(weights):
        rows = max(PIECE // weight.shape[1] // PAIR, 1) * PAIR
        for first in range(0, len(weight), rows):
            piece = weight[first : first + rows]
            if bits > 8:
                parts = [_laid(piece.to(dtype))]
            else:
                codes, scales = quantized(piece, bits)
                parts = [packed_codes(codes, bits), packed_scales(scales)]
            if not whole:
                whole = [part.new_empty(total + total % (PAIR // BLOCK), *part.shape[1:]) for part in parts]
                for tensor in whole:
                    tensor[total:] = 17 * ZERO[4] if tensor.dtype == torch.uint8 and bits == 4 else 0
            start = number + first // BLOCK * step if step > 1 else below + first // BLOCK
            count = -(-len(piece) // BLOCK)
            for tensor, part in zip(whole, parts, strict=True):
                _place(part[:count], tensor[start : start + step * count : step])
        below += -(-len(weight) // BLOCK)
    return whole[0], whole[1] if bits <= 8 else None


def packed(weight: Tensor) -> Tensor:
    """Pack weights (N, K) -> (N/16, K/words, 16, words): a word is a float, or two of bfloat16."""
    return _laid(weight).contiguous()


def _laid(weight: Tensor) -> Tensor:
    """As `packed`, a view where nothing has to be filled up."""
    words = 4 // weight.element_size()
    return _filled(weight, DEPTH).unflatten(1, (-1, words)).unflatten(0, (-1, BLOCK)).transpose(1, 2)


def _place(part: Tensor, at: Tensor) -> None:
    """Copy what `_laid` or a function here made to blocks of a packed tensor."""
    rows = part.transpose(1, 2)  # of a block
    if rows.is_contiguous() and native(part) and part[0, 0].nbytes == 4 * BLOCK:
        call("pack_words", part.dtype, rows, at, *part.shape[:2], at.stride(0) // at[0].numel())
    else:
        at.copy_(part)


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (N, K) -> (N/16, K/4, 16, 4) bytes with a sign; of 4 bits (N/16, K/8, 16, 4), unsigned, the input k +
    4 above the input k.
    """
    if bits == 8:
        return (codes ^ ZERO[8]).unflatten(1, (-1, 4)).unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()
    low, high = codes.unflatten(1, (-1, 2, 4)).unbind(2)  # (N, K/8, 4)
    return (low | high << 4).unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def quantized(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight into codes and scales: weight = scale * (code - ZERO).

    Of 8 bits, the largest of a group is 127 steps away from zero. Of 4 bits, zero is nearer to one end than to the
    other, and the scale is that of a few for which the squared error is least.

    Args:
        weight: (N, K).
        bits: 8 or 4.

    Returns:
        Codes (N, K) in uint8 and scales (N, K / GROUP) in bfloat16, both filled up.
    """
    groups = _filled(weight, GROUP[bits]).float().unflatten(1, (-1, GROUP[bits]))  # (N, K / GROUP, GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))  # (N, K / GROUP, 1), with its sign
    zero = ZERO[bits]
    if bits == 8:
        scale = (largest.abs() / 127).bfloat16()
        return _codes(groups, scale, zero).flatten(1), scale[..., 0]
    best, least = torch.zeros_like(largest, dtype=torch.bfloat16), torch.full_like(largest, torch.inf)
    for steps in (-8.0, -7.5, -7.0, 7.0, 7.5, 8.0):
        scale = (largest / steps).bfloat16()
        error = ((_codes(groups, scale, zero).float() - zero) * scale.float() - groups).square().sum(2, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return _codes(groups, best, zero).flatten(1), best[..., 0]


def dequantized(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Dequantize codes and scales in float32: (N, K)."""
    return ((codes.float() - ZERO[bits]).unflatten(1, (-1, GROUP[bits])) * scales.float()[..., None]).flatten(1)


def packed_scales(scales: Tensor) -> Tensor:
    """Pack scales (N, groups) -> (N/16, groups, 16)."""
    return scales.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def in_turns(gate: Tensor, up: Tensor) -> Tensor:
    """Interleave two matrices or vectors of N rows, a block of 16 rows of each in turn."""
    both = [F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % BLOCK)).unflatten(0, (-1, BLOCK)) for x in (gate, up)]
    return torch.stack(both, 1).flatten(0, 2)


def _codes(groups: Tensor, scale: Tensor, zero: int) -> Tensor:
    inverse = torch.where(scale == 0, 0, 1 / scale.float())
    return (groups * inverse).round().add(zero).clamp(zero == 128, 2 * zero - 1).to(torch.uint8)


def _filled(weight: Tensor, multiple: int) -> Tensor:
    missing = -weight.shape[1] % multiple, -weight.shape[0] % PAIR
    return F.pad(weight, (0, missing[0], 0, missing[1])) if any(missing) else weight
