"""The plan against what a step really takes, and what is said when it does not fit."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_here, tiny_config, tiny_model
from forked_groups import in_forks
from planned_data import LLAMA_13B, plan_of
from planned_data import samples_to_plan as samples_to_plan  # a fixture
from tiny_families import MODELS, SHAPE

from lit_llama.device import Numerics, capabilities, gpu_numerics, parse_memory
from lit_llama.errors import ResourceError, UserError
from lit_llama.folder.publish import write_json
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.text.dataset.folder import Split
from lit_llama.train.config import TrainConfig
from lit_llama.train.loss import TokenLoss
from lit_llama.train.memory.cards import CARDS
from lit_llama.train.memory.footprint import Build, Shape, largest_batch, probe
from lit_llama.train.memory.plan_table import advice, explained, lighter, short, smaller
from lit_llama.train.methods.method import Full, LoRA, Method

CPU = torch.device("cpu")
PRECISE = "bfloat16" if capabilities(CPU).bfloat16 else "float32"  # emulated, steps take minutes
STEPS = [
    *("float32 none 768 lora returns", "float32 full 1024 lora returns", f"{PRECISE} selective 1024 lora returns"),
    *("float32 none 768 full returns", f"{PRECISE} full 1024 full returns", "float32 none 768 lora keeps"),
]
"""Precision, checkpointing, tokens, what is trained, and whether the heap keeps what is freed."""


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """Bytes that steps of 18 million weights took in processes of their own, and that were planned."""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("measures through /proc")
    done = in_forks("tests/measure_step.py", *STEPS)
    assert done.returncode == 0, done.stderr
    return dict(zip(STEPS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.timeout(900)  # the first one waits for all steps
@pytest.mark.parametrize("step", STEPS)
def test_the_plan_is_within_15_percent_of_what_a_step_takes(step: str, measured: dict[str, dict[str, int]]) -> None:
    """Catches whatever the plan forgets or counts twice."""
    found = measured[step]
    assert "lora" not in step or found["planned"] > 1.4 * found["weights"], "activations count"
    if "keeps" in step:  # a heap that keeps what is freed has holes, as large as what comes and goes
        assert 0.85 * found["planned"] < found["measured"] < 1.15 * (found["planned"] + found["passing"])
    else:
        assert found["planned"] == pytest.approx(found["measured"], rel=0.15)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_deep_model_is_as_many_of_its_layers(mode: Any, mixed: bool) -> None:
    """Seven layers, extrapolated and run in full; catches a layer counted twice, or never."""
    half = torch.bfloat16
    numbers = Numerics(device=CPU, linear=half, rest=torch.float32 if mixed else half, product=half if mixed else None)
    config = tiny_config(num_hidden_layers=7)
    build = Build(config=config, method=LoRA(LoRAConfig()), numerics=numbers, checkpointing=mode)
    shape = Shape([60, 50, 20], 80)
    assert build.training_peak(shape) == pytest.approx(build._run(shape, train=True), rel=1e-3)
    assert build.evaluation_peak(shape) == pytest.approx(build._run(shape, train=False), rel=1e-3)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_plan_runs_the_layers_that_a_run_has(kind: str) -> None:
    """Catches a plan of plain layers for a run of fused ones, which hold less."""
    numbers = Numerics(device=torch.device(kind), linear=torch.bfloat16, rest=torch.bfloat16)
    build = Build(config=tiny_config(), method=LoRA(LoRAConfig()), numerics=numbers, checkpointing="none")
    builds = (build, replace(build, plain="asked for"))
    layers = [type(layer).__name__ for other in builds for layer in layers_of(other)]
    assert layers == ["FusedLayer"] * 2 + ["DecoderLayer"] * 2
    shape = Shape([60, 50, 20], 80)
    assert build.training_peak(shape) < replace(build, plain="asked for").training_peak(shape)


@pytest.mark.parametrize(
    ("method", "dtype", "product", "plain"),
    [
        (LoRA(LoRAConfig()), torch.bfloat16, None, ""),
        (LoRA(LoRAConfig(dropout=0.1, use_dora=True)), torch.float32, None, ""),
        (Full(), torch.float32, None, "asked for"),
        (LoRA(LoRAConfig()), torch.float32, torch.float16, ""),
        (Full(), torch.float32, torch.bfloat16, ""),
    ],
)
def test_a_pass_without_numbers_holds_what_torchs_own_does(
    method: Method, dtype: torch.dtype, product: torch.dtype | None, plain: str
) -> None:
    """Against FakeTensorMode, which takes tensors for those of a CPU and knows autocast; catches a way that is chosen
    by the device, attention that holds all scores, and a product in another dtype."""
    numbers = Numerics(device=CPU, linear=dtype, rest=dtype, product=product)
    build = Build(config=tiny_config(), method=method, numerics=numbers, checkpointing="none", plain=plain)
    shape = Shape([60, 50, 20, 20], 80, [] if plain or product else [-1, 0, 0, -1])
    assert build._on_meta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Build, "_on_meta", False)
        expected = [replace(build)._run(shape, train=train) for train in (True, False)]
    assert [build._run(shape, train=train) for train in (True, False)] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("product", [None, torch.bfloat16])
@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["model.layers.1.self_attn.q_proj"]])
def test_an_adapter_on_later_layers_alone_is_planned(names: list[str], product: Any) -> None:
    """The first layer has linear attention; catches a look at that layer alone, which has none of these modules."""
    config = LLaMAConfig.from_dict(SHAPE | MODELS["qwen3_5"][0])
    numbers = Numerics(device=CPU, linear=torch.float32, rest=torch.float32, product=product)
    method = LoRA(LoRAConfig(target_modules=names))
    build = Build(config=config, method=method, numerics=numbers, checkpointing="none")
    assert not build.shares and build.training_peak(Shape([30, 20], 20)) > 0


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("kinds", [["linear_attention", "full_attention", "linear_attention"], ["full_attention"]])
def test_a_plan_in_mixed_precision_never_lengthens_a_model(kinds: list[str], mode: Any) -> None:
    """Whose layers differ, or are fewer than are counted else; catches a run that is refused for its own layers."""
    settings = SHAPE | MODELS["qwen3_5"][0] | {"num_hidden_layers": len(kinds), "layer_types": kinds}
    numbers = Numerics(device=CPU, linear=torch.bfloat16, rest=torch.float32, product=torch.bfloat16)
    config = LLaMAConfig.from_dict(settings)
    build = Build(config=config, method=LoRA(LoRAConfig()), numerics=numbers, checkpointing=mode)
    assert not build.shares
    shape = Shape([30, 20], 20)
    assert build.training_peak(shape) > build.evaluation_peak(shape) > 0


def layers_of(build: Build) -> list[torch.nn.Module]:
    return list(build._model().model.layers)


def test_sizes_are_those_of_the_model() -> None:
    """Catches a tied head that is counted twice, and adapters that are not counted."""
    model = tiny_model(tie_word_embeddings=True)
    weights = sum(parameter.numel() for parameter in model.parameters())
    build = Build(
        config=model.config,
        method=LoRA(LoRAConfig()),
        numerics=Numerics(device=CPU, linear=torch.bfloat16, rest=torch.bfloat16),
        checkpointing="none",
    )
    apply_lora(model, LoRAConfig())
    trained = sum(parameter.numel() for parameter in lora_parameters(model))
    layers = sum(value.numel() for name, value in model.named_parameters() if name.startswith("model.layers."))
    layers -= trained
    c = model.config
    heads, groups = c.num_attention_heads * c.head_dim, 2 * c.num_key_value_heads * c.head_dim
    joined = [(c.hidden_size, heads + groups, 24), (heads, c.hidden_size, 8)]  # in, out, ranks
    joined += [(c.hidden_size, 2 * c.intermediate_size, 16), (c.intermediate_size, c.hidden_size, 8)]
    room = c.num_hidden_layers * sum(rank * (ins + outs + rank) for ins, outs, rank in joined)  # beside the weights
    largest = 2 * c.vocab_size * c.hidden_size
    assert build.sizes() == (2 * (weights + room), 2 * layers, (largest, 0), 2 * weights, trained, 4 * trained, largest)
    assert replace(build, quantize="nf4").sizes().base < 2 * weights


def test_13b_on_a_v100_is_answered_without_weights(data: Path, tmp_path: Path) -> None:
    """The door's answer from config.json alone: 16 GB need four bits and a checkpointed pass, 32 GB one of the two,
    with micro-batches that it chooses itself; 80 GB need nothing."""
    checkpoint = tmp_path / "13b"
    checkpoint.mkdir()
    write_json(checkpoint / "config.json", LLAMA_13B)
    flags = ("--checkpoint_dir", checkpoint, "--data_dir", data, "--precision", "16-mixed", "--seed", 0)
    flags = (*flags, "--plan_memory")
    small, middle, large = (run_here("finetune/lora.py", *flags, size) for size in ("16GB", "32GB", "80GB"))
    assert (small.returncode, middle.returncode, large.returncode) == (5, 5, 0)
    assert small.stderr.startswith("error: the run needs 27.") and small.stderr.count("\n") == 1
    assert "--quantize nf4" in small.stderr and "full (" not in small.stderr
    assert "--train.micro_batch_tokens 1024 --train.activation_checkpointing full (28." in middle.stderr
    packed = run_here("finetune/lora.py", *flags, "32GB", "--quantize", "nf4")
    assert not packed.returncode and "micro_batch_tokens 2048" in " ".join(packed.stdout.split())
    for result in (small, middle, large, packed):
        assert "weights" in result.stdout and "largest micro-batch" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"13b"}


def test_a_plan_says_what_a_heap_keeps(data: Path) -> None:
    """Catches a process that takes more than its plan says, room that is not there, and holes in a GPU's memory."""
    config = tiny_config(max_position_embeddings=1024)
    here = plan_of(data, config, memory=None, precision="32-true")
    most = here.peak + here.holes
    assert here.roomy and most == here.peak + max(here.passing.values())
    assert f"(up to {most / 1e9:.2f}, as freed memory is kept for speed) of" in short(here)
    tight = replace(here, memory=replace(here.memory, total=most - 1))
    assert tight.fits and not tight.roomy and "up to" not in short(tight)
    gpu = plan_of(data, config)
    assert gpu.roomy and gpu.holes == 0 and "up to" not in short(gpu)


def test_what_is_advised_fits_and_is_less(data: Path) -> None:
    """Catches advice that was never tried, and the settings of the run itself as advice."""
    config = LLaMAConfig.from_dict(LLAMA_13B)
    for memory in ("16GB", "32GB"):
        plan = plan_of(data, config, memory=memory)
        assert not plan.fits and any(other.fits for other in smaller(plan))
        assert all(other.peak <= plan.peak for other in smaller(plan))
    assert advice(plan_of(data, config, memory="5GB")) == "no setting makes it fit; take a smaller base"


def test_quantised_and_best_adapters_are_counted(data: Path) -> None:
    """Catches a plan that ignores a setting."""
    plain = plan_of(data, tiny_config(max_position_embeddings=1024))
    kept = plan_of(data, plain.config, train=TrainConfig(keep="best")).kept["trained"]
    assert kept == 2 * plain.kept["trained"]
    sgd = plan_of(data, plain.config, train=TrainConfig(optimizer="sgd"))
    assert sgd.kept["optimizer"] * 2 == plain.kept["optimizer"]
    assert gpu_numerics("auto").linear == torch.bfloat16


@pytest.mark.parametrize(("text", "size"), [("16GB", 16e9), ("15.5 GiB", 15.5 * 2**30), ("500M", 5e8), ("1000", 1000)])
def test_amounts_of_memory(text: str, size: float) -> None:
    """Catches thousands taken for 1024."""
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("flags", "said", "numbers"),
    [
        (
            ["--plan_device", "v100"],
            "planned for 16GB on a v100, without bfloat16; --plan_memory for those with 32 GB",
            "float16",
        ),
        (["--plan_device", "Tesla V100", "--plan_memory", "32GB"], "planned for 32GB on a v100", "float16"),
        (["--plan_device", "sm_75", "--plan_memory", "8GB"], "planned for 8GB on a sm_75, without", "float16"),
        (["--plan_device", "RTX 4090"], "planned for 24GB on a rtx4090, with bfloat16", "bfloat16"),
        (["--plan_memory", "16GB"], "planned for a GPU with bfloat16; --plan_device names another", "bfloat16"),
        (["--plan_device", "t4", "--precision", "32-true"], "planned for 16GB on a t4", "float32"),
    ],
)
def test_a_plan_for_another_gpu_computes_as_that_one_does(
    flags: list[object], said: str, numbers: str, data: Path, tmp_path: Path
) -> None:
    """Catches a plan in bfloat16 for a GPU that has none, which takes less memory than the run will."""
    write_json(tmp_path / "config.json", tiny_config(vocab_size=700, max_position_embeddings=1024).to_dict("float32"))
    planned = run_here("finetune/lora.py", "--checkpoint_dir", tmp_path, "--data_dir", data, *flags)
    assert planned.returncode == 0, planned.stderr
    assert said in planned.stderr and f"layers in {numbers}" in planned.stdout


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--plan_device", "v100", "--precision", "bf16-true"], 5, "v100 has no bfloat16; use --precision 16-mixed or"),
        (["--plan_device", "a100", "--quantize", "fp8"], 5, "a100 does not multiply 8-bit floats; use int8 or nf4"),
        (["--plan_device", "sm_75"], 2, "says nothing of its memory: add --plan_memory"),
        (["--plan_device", "v10"], 2, "which is no GPU that is known here; did you mean v100? Any other is named by"),
        (["--plan_device", "toaster"], 2, "known are p100, v100"),
    ],
)
def test_a_gpu_that_cannot_be_planned_for(
    flags: list[object], status: int, message: str, data: Path, tmp_path: Path
) -> None:
    """Catches a plan of what its GPU would refuse."""
    planned = run_here("finetune/lora.py", "--checkpoint_dir", tmp_path, "--data_dir", data, *flags)
    assert planned.returncode == status and message in planned.stderr and planned.stdout == "", planned.stderr


def test_the_page_names_every_gpu() -> None:
    """Catches a list that was true once."""
    said = (ROOT / "docs" / "memory.md").read_text("utf-8")
    assert [name for name in CARDS if not re.search(rf"\b{name}\b", said)] == []


@pytest.mark.parametrize("text", ["", "lots", "16TB", "-1GB", "0GB"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    """Catches nonsense that is planned with."""
    with pytest.raises(UserError, match=r"--plan_memory is .*expected an amount such as 16GB"):
        parse_memory(text)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000000 bytes."),
    ],
)
def test_running_out_of_memory_says_what_to_change(error: Exception, data: Path) -> None:
    """Catches a traceback after hours, and advice that needs as much."""
    plan = plan_of(data, tiny_config(max_position_embeddings=1024))
    with pytest.raises(ResourceError) as caught, explained(plan):
        raise error
    message = str(caught.value)
    assert short(plan) in message and message.count("--") == 3 and "\n" not in message
    assert all(other.peak < plan.peak for other in lighter(plan))
    with pytest.raises(RuntimeError, match="shape"), explained(plan):
        raise RuntimeError("shape mismatch")


def test_the_warm_up_leaves_no_trace(data: Path) -> None:
    """Catches gradients that go into the first step, and random numbers that are used up."""
    split, model = Split(data, "train"), tiny_model(vocab_size=700, max_position_embeddings=1024)
    apply_lora(model, LoRAConfig(dropout=0.5))
    loss_of = TokenLoss(model).train()
    before = [parameter.clone() for parameter in model.parameters()]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    ran: list[int] = []
    batch = largest_batch(split, TrainConfig(), "cuda", 0)
    probe(loss_of, lambda loss: (ran.append(1), loss.backward()), batch)
    assert torch.equal(torch.rand(3), wanted) and ran
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert len(batch.input_ids) > 1900 and loss_of.training
