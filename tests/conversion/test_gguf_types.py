"""Packed values of a GGUF file against another program, and against the formulas of the format, value by value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_model, write_tokenizer
from gguf_files import SHAPE, Array, gguf_name, write_gguf

from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.source import Source

# Bytes of a block, and where in it the float16 scales are; the other bytes may be any.
BLOCKS = {
    "Q8_0": (34, [0]),
    "Q4_0": (18, [0]),
    "Q4_1": (20, [0, 2]),
    "Q5_0": (22, [0]),
    "Q5_1": (24, [0, 2]),
    "Q2_K": (84, [80, 82]),
    "Q3_K": (110, [108]),
    "Q4_K": (144, [0, 2]),
    "Q5_K": (176, [0, 2]),
    "Q6_K": (210, [208]),
    "IQ1_S": (50, [0]),
    "IQ1_M": (56, []),
    "IQ2_XXS": (66, [0]),
    "IQ2_XS": (74, [0]),
    "IQ2_S": (82, [0]),
    "IQ3_XXS": (98, [0]),
    "IQ3_S": (110, [0]),
    "IQ4_NL": (18, [0]),
    "IQ4_XS": (136, [0]),
    "TQ1_0": (54, [52]),
    "TQ2_0": (66, [64]),
    "MXFP4": (17, []),
}
NAME = "model.layers.1.mlp.up_proj.weight"


def random_blocks(kind: str, rows: int) -> Array:
    """Packed rows of 256 values, with scales of a sensible size."""
    random = np.random.default_rng(0)
    size, scales = BLOCKS[kind]
    blocks = 256 // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    packed = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in scales:
        scale = random.uniform(0.01, 0.02, (rows, blocks, 1)).astype(np.float16)
        packed[..., at : at + 2] = scale.view(np.uint8)
    if kind == "IQ1_M":  # whose scale is in the upper halves of every other of the last 8 bytes
        packed[..., 49::2] = packed[..., 49::2] & 15 | np.array([0x50, 0x40, 0x30, 0x20], np.uint8)
    if kind == "MXFP4":  # a power of two
        packed[..., 0] = random.integers(118, 123, packed.shape[:2])
    return packed.reshape(rows, -1)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Source]:
    """A file in which the tensor NAME is packed."""

    def make(kind: str, packed: Array, dtype: str | None) -> Source:
        write_tokenizer(tmp_path)
        changed = {gguf_name(NAME): (packed, gguf.GGMLQuantizationType[kind])}
        model = tiny_model(**SHAPE | {"hidden_size": 256})
        change: Any = lambda tensors: tensors.update(changed)  # noqa: E731
        return open_gguf(write_gguf(tmp_path / "model.gguf", model, tmp_path, change_tensors=change), dtype)

    return make


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind not in ("Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")])
def test_packed_values_are_those_of_transformers(
    opened: Callable[..., Source], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Random blocks, read three rows at a time; catches rows cut elsewhere than between blocks, and types mixed up."""
    from transformers.integrations.gguf.dequant import dequantize

    monkeypatch.setattr("lit_llama.conversion.gguf.reader.BLOCK", 3 * 256)
    packed = random_blocks(kind, 96)
    wanted = dequantize(torch.from_numpy(packed), int(gguf.GGMLQuantizationType[kind])).reshape(96, 256)
    assert wanted.std() > 0.01
    found = opened(kind, packed, "float32").read(NAME)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    source = opened(kind, packed, None)
    assert source.specs[NAME] == ("BF16", (96, 256)) and torch.equal(source.read(NAME), found.bfloat16())


def half(block: Array, at: int) -> float:
    return float(block[at : at + 2].view(np.float16)[0])


def q5(block: Array, i: int, extra: int) -> int:
    """4 bits at `extra` + 4, first the low halves of 16 bytes, and a fifth bit in the 4 bytes at `extra`."""
    nibble = int(block[extra + 4 + i % 16]) >> (4 * (i // 16)) & 15
    return nibble | (int(block[extra + i // 8]) >> (i % 8) & 1) << 4


def q4_k(block: Array, i: int) -> float:
    """8 parts, each with a scale and a minimum of 6 bits, which lie in the 12 bytes from 4."""
    part, packed = i // 32, [int(byte) for byte in block[4:16]]
    if part < 4:
        scale, least = packed[part] & 63, packed[part + 4] & 63
    else:
        scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6) << 4
        least = packed[part + 4] >> 4 | (packed[part] >> 6) << 4
    nibble = int(block[16 + part // 2 * 32 + i % 32]) >> (4 * (part % 2)) & 15
    return half(block, 0) * scale * nibble - half(block, 2) * least


def q6_k(block: Array, i: int) -> float:
    """Two halves of 128 values: 64 bytes with the low 4 bits, 32 with the high 2; then 16 scales of 8 bits."""
    part, rest = divmod(i, 128)
    quarter, at = divmod(rest, 32)
    low = int(block[part * 64 + quarter % 2 * 32 + at]) >> (4 * (quarter // 2)) & 15
    high = int(block[128 + part * 32 + at]) >> (2 * quarter) & 3
    return half(block, 208) * int(block[192 + i // 16].view(np.int8)) * ((high << 4 | low) - 32)


def tq1_0(block: Array, i: int) -> float:
    """Five digits to the base of three in a byte: of 32 bytes, of 16, and four in each of 4 more."""
    start, width, at = (0, 32, i) if i < 160 else (32, 16, i - 160) if i < 240 else (48, 4, i - 240)
    digit = (int(block[start + at % width]) * 3 ** (at // width) & 255) * 3 >> 8
    return half(block, 52) * (digit - 1)


def tq2_0(block: Array, i: int) -> float:
    """Two halves of 128 values: 32 bytes of four digits."""
    part, rest = divmod(i, 128)
    return half(block, 64) * ((int(block[part * 32 + rest % 32]) >> (2 * (rest // 32)) & 3) - 1)


def mxfp4(block: Array, i: int) -> float:
    """A sign, two bits of exponent and one of mantissa, times a power of two (OCP Microscaling)."""
    nibble = int(block[1 + i % 16]) >> (4 * (i // 16)) & 15
    return (-1.0) ** (nibble >> 3) * [0, 0.5, 1, 1.5, 2, 3, 4, 6][nibble & 7] * 2.0 ** (int(block[0]) - 127)


FORMULAS: dict[str, Callable[[Array, int], float]] = {
    "Q8_0": lambda block, i: half(block, 0) * int(block[2 + i].view(np.int8)),
    "Q4_0": lambda block, i: half(block, 0) * ((int(block[2 + i % 16]) >> (4 * (i // 16)) & 15) - 8),
    "Q4_1": lambda block, i: half(block, 0) * (int(block[4 + i % 16]) >> (4 * (i // 16)) & 15) + half(block, 2),
    "Q5_0": lambda block, i: half(block, 0) * (q5(block, i, 2) - 16),
    "Q5_1": lambda block, i: half(block, 0) * q5(block, i, 4) + half(block, 2),
    "Q4_K": q4_k,
    "Q6_K": q6_k,
    "TQ1_0": tq1_0,
    "TQ2_0": tq2_0,
    "MXFP4": mxfp4,
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_packed_values_follow_their_formula(opened: Callable[..., Source], kind: str) -> None:
    """Two rows worked out from the description of the format; catches a mistake that every reader shares."""
    packed = random_blocks(kind, 96)
    found = opened(kind, packed, "float32").read(NAME)
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for row in (0, 95):
        blocks = packed[row].reshape(-1, size)
        wanted = [FORMULAS[kind](block, i) for block in blocks for i in range(values)]
        np.testing.assert_allclose(found[row], wanted, rtol=1e-5, atol=1e-6)
