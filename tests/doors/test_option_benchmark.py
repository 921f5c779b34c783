"""The table of options of fine-tuning: that each is what its line says, and how lines compare."""

import math
from dataclasses import replace
from typing import Any

import pytest
from conftest import tiny_config

from benchmarks.training import options
from benchmarks.training.options import OPTIONS, PLAIN, summary, table


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_trained_in_fused_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an option that has left the fast path, one that is not switched on, and a model that has no sane loss."""
    monkeypatch.setattr(options, "TOKENS", 48)
    config = replace(tiny_config(), tie_word_embeddings=True)
    found = options.train(OPTIONS[name], config, warmup=0, steps=1)
    assert found["layers"] == "layers: 2 fused"
    assert found["first_loss"] == pytest.approx(math.log(config.vocab_size), rel=0.1)
    assert found["tokens_per_second"] > 0 and found["cpu_seconds"] > 0


def test_ratios_are_of_the_same_round_and_the_memory_is_the_most() -> None:
    """Catches a slow round that is compared with a quick one."""
    runs: dict[str, list[dict[str, Any]]] = {
        PLAIN: [{"tokens_per_second": 100.0, "cpu_seconds": 2.0, "peak_rss": 10**9}] * 2,
        "other": [
            {"tokens_per_second": speed, "cpu_seconds": 4.0, "peak_rss": rss}
            for speed, rss in ((90.0, 2 * 10**9), (70.0, 3 * 10**9))
        ],
    }
    for each in (run for found in runs.values() for run in found):
        each |= {"numbers": "float32", "layers": "layers: 2 plain (x)"}
    runs[PLAIN][1] = runs[PLAIN][1] | {"tokens_per_second": 50.0}
    plain, other = summary(runs)
    assert plain["tokens_per_second_ratio"] == plain["cpu_seconds_ratio"] == 1
    assert other["tokens_per_second_ratio"] == pytest.approx((0.9 + 1.4) / 2)
    assert other["peak_rss"] == 3 * 10**9 and other["cpu_seconds_ratio"] == 2
    assert table([plain, other]).splitlines()[2].endswith("2 plain (x)")
