"""The plan of a run of several processes, of which each holds all or a part."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run_here, tiny_config
from planned_data import LLAMA_13B, plan_of
from planned_data import samples_to_plan as samples_to_plan  # a fixture

from lit_llama.folder.publish import write_json
from lit_llama.model.config import LLaMAConfig
from lit_llama.text.dataset.folder import Split
from lit_llama.train.config import GPU_TOKENS, RunConfig, TrainConfig
from lit_llama.train.distributed.processes import Processes
from lit_llama.train.memory.footprint import largest_batch
from lit_llama.train.memory.plan import LEAST_TOKENS, make_plan
from lit_llama.train.memory.plan_table import lighter, smaller, spread
from lit_llama.train.methods.method import Full


def test_a_plan_is_for_each_of_several_processes(data: Path, tmp_path: Path) -> None:
    """13B on four GPUs of 24 GB by the door: none holds it, all together do; catches a plan that knows of one device
    only, layers that are counted whole, and a choice that the run would refuse."""
    checkpoint = tmp_path / "13b"
    checkpoint.mkdir()
    write_json(checkpoint / "config.json", LLAMA_13B)
    common = ["--checkpoint_dir", checkpoint, "--data_dir", data, "--precision", "bf16-true", "--plan_memory", "24GB"]
    common += ["--train.activation_checkpointing", "full"]

    def ask(*flags: object) -> tuple[int, str, str]:
        said = run_here("finetune/lora.py", *common, *flags)
        return said.returncode, " ".join(said.stdout.split()), said.stderr

    status, table, _ = ask("--devices", 4)
    assert status == 0 and "4 processes, this for each of them, the frozen layers spread over all" in table
    alone = plan_of(data, LLaMAConfig.from_dict(LLAMA_13B), precision="bf16-true", memory="24GB")
    layers, rest = alone.sizes.layers / 4 / 1e9, (alone.sizes.plain - alone.sizes.layers) / 1e9
    joined = [(5120, 3 * 5120, 24), (5120, 5120, 8), (5120, 2 * 13824, 16), (13824, 5120, 8)]  # in, out, ranks
    updates = 40 * sum(rank * (ins + outs) for ins, outs, rank in joined) * 2 / 1e9  # in the dtype of the products
    assert f" weights {layers + rest + updates:.2f} frozen" in table
    status, table, error = ask("--devices", 4, "--strategy", "ddp")
    assert status == 5 and "4 processes, this for each of them" in table and "spread" not in table
    assert "--quantize nf4" in error
    assert ask("--devices", 2, "--num_nodes", 2)[1].count("4 processes") == 1
    status, _, error = ask("--strategy", "fsdp")
    assert status == 2 and "raise --devices" in error
    status, _, error = ask("--devices", 2, "--strategy", "fsdp", "--quantize", "nf4")
    assert status == 2 and "leave one of them out" in error


def test_all_weights_are_planned_over_several_processes(data: Path, tmp_path: Path) -> None:
    """13B as a whole on eight GPUs of 80 GB by the door, against the arithmetic of 16 bytes a weight; catches weights,
    gradients or moments that are counted whole, layers and a head that are whole meanwhile and not counted, a state of
    which an eighth has room on the disk, and an optimizer whose blocks would be cut."""
    checkpoint = tmp_path / "13b"
    checkpoint.mkdir()
    write_json(checkpoint / "config.json", LLAMA_13B)
    common = ["--checkpoint_dir", checkpoint, "--data_dir", data, "--precision", "bf16-mixed", "--plan_memory", "80GB"]
    common += ["--train.activation_checkpointing", "full", "--devices", 8]

    def ask(*flags: object) -> tuple[int, str, str]:
        said = run_here("finetune/full.py", *common, *flags)
        return said.returncode, " ".join(said.stdout.split()), said.stderr

    status, table, _ = ask()
    assert (
        status == 0 and "8 processes, this for each of them, weights, gradients and optimizer spread over all" in table
    )
    layer, head = 4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120, 32000 * 5120
    values = 40 * layer + 2 * head + 5120
    share = 4 * values / 8 / 1e9
    assert f" trained {share:.2f} {values:,} values" in table and f" gradients {share:.2f} " in table
    assert f" optimizer {2 * share:.2f} adamw" in table and " weights 0.00 " in table
    training, evaluation = (
        float(re.search(rf" {name} (\S+) largest", table)[1]) for name in ("training", "evaluation")
    )
    meanwhile = 4 * (4 * layer + 2 * head) / 1e9  # two layers, and the gradients of one twice; head and its gradient
    assert meanwhile < training < meanwhile + 3 and 4 * (2 * layer + head) / 1e9 < evaluation < training
    status, table, _ = ask("--strategy", "ddp")
    assert status == 5 and "spread" not in table and f" trained {8 * share:.2f} " in table
    status, table, _ = ask("--train.optimizer", "adamw_8bit")
    assert status == 5 and "spread" not in table
    status, _, error = ask("--train.optimizer", "adamw_8bit", "--strategy", "fsdp")
    assert status == 2 and "in blocks of 256 values; use --train.optimizer adamw, or --strategy ddp" in error


def test_tokens_are_chosen_for_what_each_process_holds(data: Path) -> None:
    """Catches a choice for a model that is whole in each process, of which none is comfortable: it would be the largest
    of all, and end the run."""
    config, four = LLaMAConfig.from_dict(LLAMA_13B), Processes(size=4, here=4)
    splits = {name: Split(data, name) for name in ("train", "test")}
    train = TrainConfig(batch_size=128, activation_checkpointing="full")
    run = RunConfig(precision="bf16-true", train=train, strategy="fsdp")
    plan = spread(make_plan(Full(), run, config, splits, memory="35GB", processes=four), run)
    assert plan.comfortable and LEAST_TOKENS <= plan.tokens_at_once < GPU_TOKENS
    fixed = replace(run, train=replace(train, micro_batch_tokens=GPU_TOKENS))
    plan = spread(make_plan(Full(), fixed, config, splits, memory="35GB", processes=four), fixed)
    assert not plan.comfortable and plan.tokens_at_once == GPU_TOKENS


def test_a_state_is_whole_wherever_its_parts_are(data: Path) -> None:
    """Catches a state of which each process has a part, and a disk that has room for one of the parts."""
    config = tiny_config(max_position_embeddings=1024)
    splits = {name: Split(data, name) for name in ("train", "test")}
    run = RunConfig(precision="32-true", train=TrainConfig(keep="best"))
    one, two = (
        make_plan(Full(), run, config, splits, processes=Processes(size=size, here=size, sharded=size > 1))
        for size in (1, 2)
    )
    assert one.saved == two.saved == 4 * 4 * one.sizes.trained
    assert [two.kept[name] for name in one.kept] == [size // 2 for size in one.kept.values()]
    assert two.holes >= 2 * one.sizes.trained, "each reads the whole model before it is cut"


def test_processes_share_a_batch_and_the_memory_of_a_cpu(data: Path) -> None:
    """Catches the largest micro-batch of one process taken for that of four, and a machine's memory given to each."""
    config = tiny_config(max_position_embeddings=1024)
    settings = {"memory": None, "precision": "32-true", "train": TrainConfig(micro_batch_tokens=8192)}
    one, four = (plan_of(data, config, **settings, processes=Processes(size=size, here=size)) for size in (1, 4))
    assert sum(four.largest.lengths) < 0.5 * sum(one.largest.lengths)
    rows = largest_batch(Split(data, "train"), settings["train"], "cpu", 0, 4, share=four.build.shares)
    assert sorted(four.largest.lengths) == sorted(rows.lengths)
    assert four.memory.total == pytest.approx(one.memory.total / 4, rel=0.1)
    spread_over = replace(four, processes=replace(four.processes, sharded=True))
    away = four.kept["weights"] - spread_over.kept["weights"]
    joined = four.sizes.base - spread_over.sizes.base  # the corners of matrices that hold weights and updates
    assert away - joined == pytest.approx(four.sizes.layers * 3 / 4, abs=4) and joined > 0
    assert all(other.quantize is None for other in (*smaller(spread_over), *lighter(spread_over)))
    whole = 2 * four.sizes.layers // config.num_hidden_layers  # one layer computes, the next one comes
    ratio = (spread_over.passing["training"] - whole) / four.passing["training"]
    assert 0.9 < ratio < 1.02, "layers that are spread are fused"
