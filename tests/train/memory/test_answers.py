"""The copy of a model that answers the sample prompts of a run: made where half of the memory stays free."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Sample, tiny_config, write_splits

from lit_llama.folder.publish import write_json
from lit_llama.model.config import LoRAConfig
from lit_llama.model.kernels.decode import packs
from lit_llama.text.dataset.folder import Split
from lit_llama.train.config import RunConfig, TrainConfig
from lit_llama.train.memory.plan import Plan, make_plan
from lit_llama.train.methods.method import LoRA


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of 200 tokens."""
    folder = tmp_path_factory.mktemp("answers") / "data"
    write_splits(folder, {name: [Sample([*range(200)], [*range(200)])] * 8 for name in ("train", "test")})
    write_json(folder / "meta.json", {"format": 1})
    return folder


def plan_of(data: Path, **changes: Any) -> Plan:
    config = tiny_config()
    settings: dict[str, Any] = {"precision": "32-true", "seed": 0} | changes
    splits = {name: Split(data, name) for name in ("train", "test")}
    return make_plan(LoRA(LoRAConfig()), RunConfig(**settings), config, splits)


def test_a_copy_is_made_where_half_of_the_memory_stays_free(data: Path) -> None:
    """Catches answers that take memory which is not planned or not there, and a copy in other numbers."""
    plan = plan_of(data)
    if not packs(plan.config, plan.numerics.rest):
        pytest.skip("needs a compiler")
    copy = plan.sizes.plain + plan.sizes.trained_bytes
    needed = plan.resting + plan.passing["answers"]
    enough, less = (replace(plan, memory=replace(plan.memory, total=2 * needed + more)) for more in (0, -2))
    assert plan.packs_answers and enough.packs_answers and not less.packs_answers
    assert less.passing["answers"] == enough.passing["answers"] - copy
    assert not replace(plan, numerics=replace(plan.numerics, product=torch.bfloat16)).packs_answers
    assert not plan_of(data, quantize="int8").packs_answers
    assert plan_of(data, train=TrainConfig(sample_prompts=0)).passing["answers"] == 0
