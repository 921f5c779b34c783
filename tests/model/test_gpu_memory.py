"""The plan against what a GPU really allocates, and what is said when its memory ends."""

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import run_here, tiny_config
from safetensors.torch import save_file
from small_runs import ROWS, prepare, through_the_door

from lit_llama.device import peak_memory
from lit_llama.model.adapters.peft_folder import CONFIG_FILE
from lit_llama.model.llama import LLaMA
from lit_llama.train.logs.metrics import METRICS_FILE, read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = ["--train.micro_batch_tokens", 4096, "--train.batch_size", 16, "--train.max_steps", 2]
TOKENS += ["--train.sample_prompts", 0]


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 115 million weights. Do not change it."""
    folder = tmp_path_factory.mktemp("gpu") / "base"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    config = tiny_config(
        vocab_size=6000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=1024,
    )
    raw = config.to_dict("bfloat16") | {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LLaMA(config).state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if "norm" in name
        else (torch.randn(shape, generator=draw) * 0.02).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 rows of about 300 tokens. Do not change it."""
    rows = [row | {"output": f"{row['output']} {number} " * 12} for number, row in enumerate([*ROWS, *ROWS, *ROWS[:8]])]
    folder = tmp_path_factory.mktemp("gpu") / "data"
    return prepare(folder, base, rows, max_seq_length=1024)


@pytest.fixture(autouse=True)
def nothing_is_held() -> None:
    """What tests before this one left on the GPU would count, and so would what its libraries keep for themselves."""
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(64, 64, dtype=dtype, device="cuda")
        torch.addmm(square, square, square)
        del square
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def planned(base: Path, data: Path, *flags: object, door: str = "finetune/lora.py") -> float:
    """Bytes that --plan tells of, without those of CUDA itself, which torch does not count."""
    said = run_here(door, "--checkpoint_dir", base, "--data_dir", data, "--plan", *flags)
    assert said.returncode == 0, said.stderr
    numbers = {name: float(size) for name, size in re.findall(r"^\s*(program|peak)\s+([\d.]+)", said.stdout, re.M)}
    return (numbers["peak"] - numbers["program"]) * 1e9


@pytest.mark.parametrize(
    ("door", "flags"),
    [
        ("lora", ["--precision", "bf16-true"]),
        ("lora", ["--precision", "bf16-mixed", "--train.activation_checkpointing", "selective"]),
        ("lora", ["--precision", "32-true", "--train.keep", "best"]),
        ("lora", ["--precision", "bf16-true", "--train.activation_checkpointing", "full", "--quantize", "nf4"]),
        ("full", ["--precision", "bf16-mixed"]),
        ("full", ["--precision", "bf16-true", "--train.activation_checkpointing", "full"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[1::2]),
)
def test_the_plan_is_within_15_percent_of_what_is_allocated(
    door: str, flags: list[str], base: Path, data: Path, tmp_path: Path
) -> None:
    """Catches whatever a GPU's kernels keep that the plan does not know of, and what it counts twice."""
    if "--quantize" in flags:
        pytest.importorskip("bitsandbytes")
    script = f"finetune/{door}.py"
    expected = planned(base, data, *TOKENS, *flags, door=script)
    before = torch.cuda.memory_allocated()
    said = through_the_door(base, data, tmp_path / "out", *TOKENS, *flags, door=script)
    found = peak_memory(torch.device("cuda")) - before
    print(f"{script} {' '.join(flags)}: planned {expected / 1e9:.2f} GB, allocated {found / 1e9:.2f} GB")
    worst = max(size for _, size in read_metrics(tmp_path / "out")["memory"]) - before
    first = read_metrics(tmp_path / "out")["memory"][0][1] - before
    assert "on cuda" in said
    assert first > 0.95 * worst, "memory ends in the first minute, or not at all"
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(("left", "when"), [(100e6, "loading"), (600e6, "the first pass")])
def test_the_end_of_memory_is_one_line(left: float, when: str, base: Path, data: Path, tmp_path: Path) -> None:
    """Most of the card is taken by another; catches a traceback, a status that says something else, a folder that
    looks like a result, and an end that comes only after steps that are lost."""
    ballast = torch.empty(int(torch.cuda.mem_get_info()[0] - left), dtype=torch.uint8, device="cuda")
    try:
        flags = ["--precision", "bf16-true", *TOKENS]
        given = ["--checkpoint_dir", base, "--data_dir", data, "--out_dir", tmp_path / "out", *flags]
        ended = run_here("finetune/lora.py", *given)
    finally:
        del ballast
        torch.cuda.empty_cache()
    assert ended.returncode == 5, f"{when}: {ended.stderr}"
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: out of memory; the plan was ") and "Traceback" not in ended.stderr
    assert "--train.activation_checkpointing" in last or "--train.micro_batch_tokens" in last
    assert not (tmp_path / "out" / CONFIG_FILE).exists() and not (tmp_path / "out" / METRICS_FILE).exists()
    through_the_door(base, data, tmp_path / "again", *flags, "--train.activation_checkpointing", "full")
