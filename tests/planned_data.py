"""Samples and a shape to plan runs for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Sample, write_splits

from lit_llama.folder.publish import write_json
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.text.dataset.folder import Split
from lit_llama.train.config import RunConfig
from lit_llama.train.distributed.processes import ALONE
from lit_llama.train.memory.plan import Plan, make_plan
from lit_llama.train.methods.method import LoRA

LLAMA_13B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module", name="data")
def samples_to_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 samples of 20 to 600 tokens, half of each trained. Do not change it."""
    folder = tmp_path_factory.mktemp("plan") / "data"
    draw = np.random.Generator(np.random.PCG64(0))
    samples = []
    for length in draw.integers(20, 600, 400).tolist():
        ids = list(range(3, 3 + length))
        samples.append(Sample(ids, [-100] * (length // 2) + ids[length // 2 :]))
    write_splits(folder, {"train": samples[:380], "test": samples[380:]})
    write_json(folder / "meta.json", {"format": 1})
    return folder


def plan_of(data: Path, config: LLaMAConfig, **changes: Any) -> Plan:
    memory, processes = changes.pop("memory", "32GB"), changes.pop("processes", ALONE)
    settings: dict[str, Any] = {"precision": "16-mixed", "seed": 0} | changes
    splits = {name: Split(data, name) for name in ("train", "test")}
    return make_plan(LoRA(LoRAConfig()), RunConfig(**settings), config, splits, memory=memory, processes=processes)
