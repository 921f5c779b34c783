"""Products of 8-bit floats, against tables of all such numbers and against float64."""

from pathlib import Path

import pytest
import torch
from conftest import run_here
from small_runs import ROWS, prepare
from torch import Tensor, nn

from lit_llama.device import Capabilities
from lit_llama.errors import ResourceError
from lit_llama.model import float8
from lit_llama.model.quantize import Float8Linear, quantized, through

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
NUMBERS = E4M3[E4M3.isfinite()].unique()
"""All that eight bits can say."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(x: Tensor) -> Tensor:
    """Each row divided by what makes its largest magnitude 448, and each value the nearest number there is."""
    scale = x.double().abs().amax(1, keepdim=True) / 448
    return NUMBERS[(x.double()[..., None] / scale[..., None] - NUMBERS).abs().argmin(-1)] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_rounded_to_the_nearest(dtype: torch.dtype, weighted: bool) -> None:
    """Catches a scale for the whole, one that overflows the largest number, and columns weighted after rounding."""
    x = (random(300, 40) * torch.logspace(-6, 3, 300)[:, None]).to(dtype)
    columns = torch.logspace(-2, 2, 40) if weighted else None
    values, scales = float8.rounded(x, columns)
    wide = x.float() if columns is None else x.float() * columns
    found, wanted = values.double() * scales.double()[:, None], nearest(wide)
    same = (found - wanted).abs() <= 1e-5 * wanted.abs().amax(1, keepdim=True)
    assert same.double().mean() > 0.99, "only ties may fall otherwise"
    assert ((found - wide).abs() <= wide.abs() / 16 + scales.double()[:, None] * 2**-10).all()


def test_rows_of_zeros_stay_zero_and_what_is_no_number_stays_none() -> None:
    """Catches 0 / 0, and an overflow that a run would not notice."""
    x = torch.zeros(3, 16)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    values, scales = float8.rounded(x)
    found = values.float() * scales[:, None]
    assert not found[0].any() and found[1].isnan().any() and not found[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_matrices(dtype: torch.dtype) -> None:
    """Both ways; catches a scale at the wrong side, and a weight that is rounded anew on the way back."""
    weight, x, dy = random(48, 80), random(7, 80, seed=1).to(dtype), random(7, 48, seed=2).to(dtype)
    layer = quantized(weight, None, "fp8")
    assert isinstance(layer, Float8Linear) and layer.packed.element_size() == 1
    dense = layer.dense(torch.float64)
    torch.testing.assert_close(dense, nearest(weight), rtol=0, atol=1e-5)
    torch.testing.assert_close(through(weight, "fp8").double(), dense, rtol=1e-6, atol=1e-6)
    values, scales = float8.rounded(x)
    forward = (values.double() * scales[:, None]) @ dense.t()
    values, scales = float8.rounded(dy, layer.state)
    backward = (values.double() * scales[:, None]) @ (dense / layer.state[:, None])
    assert layer.product(x).dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(layer.product(x).double(), forward, rtol=rtol, atol=rtol)
    x.requires_grad_()
    layer.product(x).backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), backward, rtol=rtol, atol=rtol)


def test_what_comes_of_it_is_near_the_plain_product() -> None:
    """The rounding of both factors leaves a few percent of a random product; catches a lost sign or exponent."""
    weight, x = random(256, 512), random(64, 512, seed=1)
    layer, wanted = quantized(weight, nn.Parameter(random(256, seed=3)), "fp8"), x @ weight.t() + random(256, seed=3)
    off = (layer(x) - wanted).norm() / wanted.norm()
    assert 0.02 < off < 0.05
    layer.eval()
    assert torch.equal(layer(x), x @ layer.dense(torch.float32).t() + layer.bias), "only training rounds activations"


def test_a_gpu_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a crash deep inside of a product."""
    monkeypatch.setattr(float8, "capabilities", lambda _: Capabilities(kind="cuda", bfloat16=True, float8=False))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ResourceError, match=r"--quantize fp8: A100 does not multiply 8-bit floats.*8\.9.*int8 or nf4"):
        float8.check(torch.device("cuda", 0))


def test_the_whole_way(tiny_folder: Path, tmp_path: Path) -> None:
    """Train on it, answer with it, merge onto what it leaves; catches a script that does not know the word, and a
    merge that is compared with rounded activations."""
    data, out, merged = prepare(tmp_path / "data", tiny_folder, ROWS), tmp_path / "out", tmp_path / "merged"
    flags = ["--train.max_steps", 2, "--train.batch_size", 4, "--train.sample_prompts", 0, "--precision", "32-true"]
    folders = ["--checkpoint_dir", tiny_folder, "--data_dir", data, "--out_dir", out]
    trained = run_here("finetune/lora.py", *folders, "--quantize", "fp8", *flags)
    assert not trained.returncode and "base in fp8" in trained.stderr, trained.stderr
    answered = run_here("generate/base.py", "--checkpoint_dir", out, "--prompt", "lamp", "--max_new_tokens", 3)
    assert not answered.returncode, answered.stderr
    exact = ["--dtype", "float32", "--precision", "32-true"]
    done = run_here("finetune/merge.py", "--adapter_dir", out, "--destination_path", merged, *exact)
    assert not done.returncode and "fp8" in done.stderr, done.stderr
