"""Benchmarks of synthetic models: their batches, their shapes, and how time and memory grow with each axis."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config

from benchmarks import scaling
from benchmarks.training import synthetic

# synthetic models and scaling


def test_micro_batches_are_filled_exactly() -> None:
    for sample_tokens in (None, 100):
        for batch in synthetic.packed(3, 2048, 300, sample_tokens):
            assert sum(batch.lengths) == len(batch.input_ids) == 2048
            assert 0 < len(batch.targets) < 2048
    mean = np.mean([length for batch in synthetic.packed(20, 8192, 300, None) for length in batch.lengths])
    assert 90 < mean < 150


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_a_synthetic_model_is_measured_and_learns(quantize: Any) -> None:
    batch = next(synthetic.packed(1, 512, tiny_config().vocab_size, None))
    found = synthetic.train(
        tiny_config(), torch.device("cpu"), torch.float32, [batch] * 12, warmup=2, quantize=quantize
    )
    assert found["first_loss"] == pytest.approx(math.log(tiny_config().vocab_size), rel=0.05)
    assert found["last_loss"] < found["first_loss"]
    assert found["tokens_per_second"] > 0
    assert synthetic.ceilings("cpu", 64)["matmul_tflops"] > 0


@pytest.mark.parametrize(("name", "billions"), [("llama-2-7b", 6.738), ("llama-3-8b", 8.030), ("llama-13b", 13.016)])
def test_synthetic_shapes_are_the_real_ones(name: str, billions: float) -> None:
    from lit_llama.model.config import LLaMAConfig
    from lit_llama.model.llama import LLaMA

    with torch.device("meta"):
        model = LLaMA(LLaMAConfig(**synthetic.SHAPES[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


def test_growth_is_an_exponent() -> None:
    points = [{"axis": "rank", "value": v, "seconds": 3.0 * v, "memory": 5 * v * v, "tokens": 10} for v in (1, 2, 4, 8)]
    assert scaling.growth(points, "seconds") == pytest.approx(1)
    assert scaling.growth(points, "memory") == pytest.approx(2)
    assert "value^1.00 in time, value^2.00 in memory" in scaling.table(points)


def test_points_of_each_axis_can_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling, "TOKENS", 256)
    points = [
        {"axis": axis, "value": value, **scaling._step(axis, value, 1)}
        for axis, value in (("sequence_length", 128), ("micro_batch_tokens", 256), ("rank", 4))
    ]
    points.append({"axis": "rows", "value": 100, **scaling._rows(100)})
    assert all(point["seconds"] > 0 for point in points)
    scaling.plot(points, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
