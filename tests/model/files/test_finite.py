"""Weights that are not finite: named when they are read, by whichever command, at next to no cost."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_here, tiny_model
from safetensors.torch import load_file, save_file
from small_runs import ROWS, prepare, run

from lit_llama.conversion import convert
from lit_llama.errors import WeightsNotFiniteError
from lit_llama.model.adapters.peft_folder import read_adapter_file, verify_folders
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.files.weights import SPAN, SPANS, Weights, check_finite

HERE = Path("model.safetensors")
NORM, MATRIX = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def spoil(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model in which values of one tensor are something else."""

    def made(name: str, value: float = torch.nan, where: object = ...) -> Path:
        folder = tmp_path / "spoilt"
        folder.mkdir()
        for path in tiny_folder.iterdir():
            if path.name != "SHA256SUMS":
                (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / HERE)
        tensors[name][where] = value  # type: ignore[index]
        save_file(tensors, folder / HERE, metadata={"format": "pt"})
        return folder

    return made


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_value_of_a_vector_and_many_of_a_matrix_are_found(dtype: torch.dtype, value: float) -> None:
    """Catches a sum of numbers that overflows although each is finite, and opposite infinities that cancel."""
    if dtype == torch.float8_e4m3fn and value != torch.nan:
        pytest.skip("it has no infinity")
    large = 400.0 if dtype == torch.float8_e4m3fn else torch.finfo(dtype).max
    for shape in ((SPANS * SPAN,), (300, 700)):
        check_finite(torch.full(shape, large).to(dtype), "full", HERE)
        check_finite(torch.full(shape, large).to(dtype), "full", HERE, whole=True)
    vector = torch.ones(4000)
    vector[2345] = value
    with pytest.raises(WeightsNotFiniteError, match=r"model\.safetensors: 1 of the 4,000 values of v are not finite"):
        check_finite(vector.to(dtype), "v", HERE)
    matrix = torch.ones(300, 700)
    matrix[100:200] = value
    with pytest.raises(WeightsNotFiniteError, match=r"70,000 of the 210,000 values of m are"):
        check_finite(matrix.to(dtype), "m", HERE)
    matrix = torch.ones(300, 700)
    matrix[299, 699] = value
    with pytest.raises(WeightsNotFiniteError, match=r"1 of the 210,000 values"):
        check_finite(matrix.to(dtype), "m", HERE, whole=True)
    both = torch.ones(8)
    both[0], both[1] = torch.inf, -torch.inf
    with pytest.raises(WeightsNotFiniteError, match="2 of the 8"):
        check_finite(both, "b", HERE)


def test_what_has_no_such_values_is_passed_over() -> None:
    """Catches codes of a quantised weight, an empty tensor and a scalar that are taken for numbers."""
    for tensor in (torch.full((9000,), 255, dtype=torch.uint8), torch.empty(0, 5), torch.tensor(3.0)):
        check_finite(tensor, "x", HERE)
        check_finite(tensor, "x", HERE, whole=True)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("mapped", [True, False])
def test_a_model_is_not_loaded(spoil: Callable[..., Path], quantize: str | None, mapped: bool) -> None:
    """Catches a matrix that is quantised first, when a NaN has become a number."""
    folder = spoil(MATRIX)
    with pytest.raises(WeightsNotFiniteError, match=rf"spoilt/model\.safetensors: .* of {MATRIX} are not finite"):
        load_model(folder, quantize=quantize, mapped=mapped)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("door", "flags"),
    [
        ("finetune/lora.py", ["--data_dir", "DATA", "--out_dir", "OUT"]),
        ("finetune/full.py", ["--data_dir", "DATA", "--out_dir", "OUT"]),
        ("generate/base.py", ["--prompt", "a"]),
        ("generate/instruct.py", ["--prompt", "a", "--quantize", "nf4"]),
        ("prepare/checkpoint.py", ["--format", "gguf", "--destination_path", "FILE"]),
    ],
)
def test_every_command_says_which_tensor_of_which_file(
    door: str, flags: list[str], spoil: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    """Catches a command that computes with NaN, another status than 70, and a traceback."""
    folder, names = (
        spoil(NORM, where=3),
        {"OUT": tmp_path / "out", "DATA": tmp_path / "data", "FILE": tmp_path / "a.gguf"},
    )
    if "DATA" in flags:
        prepare(tmp_path / "data", tiny_folder, ROWS)
    given = [names.get(flag, flag) for flag in flags]
    source = "--source" if door.startswith("prepare") else "--checkpoint_dir"
    done = run_here(door, source, folder, *given)
    assert done.returncode == 70, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {folder / HERE}: 1 of the ") and f" of {NORM} are not finite" in last
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "a.gguf").exists()


def test_one_value_of_a_matrix_is_found_by_verify(spoil: Callable[..., Path], tmp_path: Path) -> None:
    """Catches a --verify that looks at a sample, too: the value lies between the spans of one."""
    large = tiny_model(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=64
    )
    folder = tmp_path / "large"
    folder.mkdir()
    state = {name: value.contiguous() for name, value in large.state_dict().items()}
    state[MATRIX].view(-1)[SPAN + 5] = torch.nan
    save_file(state, folder / HERE)
    assert Weights(folder)[MATRIX].isnan().sum() == 1, "a sample does not see it"
    with pytest.raises(WeightsNotFiniteError, match=rf"1 of the 131,072 values of {MATRIX}"):
        verify_folders(folder)


def test_an_adapter_is_looked_at_whole(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a NaN in an adapter, whose tensors are small; and one that is merged."""
    data = prepare(tmp_path / "data", tiny_folder, ROWS)
    out = run(tiny_folder, data, tmp_path / "out")
    path = out / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    (out / "SHA256SUMS").unlink(missing_ok=True)
    with pytest.raises(WeightsNotFiniteError, match=r"adapter_model\.safetensors: 1 of the"):
        read_adapter_file(out)
    done = run_here("finetune/merge.py", "--adapter_dir", out, "--destination_path", tmp_path / "merged")
    assert done.returncode == 70 and "are not finite" in done.stderr and not (tmp_path / "merged").exists()


def test_torchs_own_files_are_looked_at_as_they_are_converted(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a NaN that a conversion carries over into a folder that looks whole."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tiny_folder / HERE)
    tensors[NORM][0] = torch.nan
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(WeightsNotFiniteError, match=rf"bin/pytorch_model\.bin: 1 of the .* of {NORM} are not finite"):
        convert(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_look_costs_next_to_nothing() -> None:
    """At most 2 % of copying a matrix of a small model; in CPU time, against its twin in this process."""
    matrix = torch.ones(4096, 4096, dtype=torch.bfloat16)

    def seconds(call: Callable[[], object]) -> float:
        call()
        start = time.process_time()
        for _ in range(30):
            call()
        return time.process_time() - start

    assert seconds(lambda: check_finite(matrix, "m", HERE)) < 0.02 * seconds(matrix.float)
