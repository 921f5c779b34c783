"""Products of 8-bit floats (e4m3: four bits of exponent, three of mantissa), at twice the rate of bfloat16 on GPUs
that have them (Micikevicius et al. 2022, arXiv:2209.05433).

Each row of what is multiplied is divided by a scale of its own, so that its largest magnitude becomes the largest that
e4m3 has; sums are float32. A weight has one scale for each output: what comes back is multiplied by them before it is
rounded, so that the same bits serve both ways.

Shapes: T tokens; x (T, in), W (out, in), its scales (out,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.device import capabilities
from lit_llama.errors import ResourceError
from lit_llama.model.operators.pointwise import round_rows
from lit_llama.wording import param


def check(device: torch.device) -> None:
    """Check that 8-bit floats can be multiplied there.

    Raises:
        ResourceError: The device, or the installed torch, does not multiply 8-bit floats.
    """
    if not hasattr(F, "scaled_mm"):
        raise ResourceError(
            f"needs torch.nn.functional.scaled_mm, which torch {torch.__version__} lacks",
            parameter="quantize",
            value="fp8",
        )
    if not capabilities(device).float8:
        raise ResourceError(
            f"{param('quantize', 'fp8')}: {torch.cuda.get_device_name(device)} does not multiply 8-bit floats, which "
            "GPUs do from "
            f"compute capability 8.9 on; use int8 or nf4, or leave {param('quantize')} out"
        )


def rounded(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round x (T, n), its columns first multiplied by `columns` (n,), to e4m3 (T, n) times scales of its rows (T,)."""
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    round_rows(values, scales, x, columns)
    return values, scales


def product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Compute x W': (T, in) -> (T, out), in the dtype of x."""
    values, own = rounded(x)
    return _multiplied(values, own, weight.t(), scales, x.dtype)


def product_back(dy: Tensor, turned: Tensor, scales: Tensor) -> Tensor:
    """Compute dy W: (T, out) -> (T, in), in the dtype of dy; `turned` is W' (in, out), as GPUs want it row by row."""
    values, own = rounded(dy, scales)
    return _multiplied(values, own, turned.t(), torch.ones_like(scales[:1]).expand(len(turned)), dy.dtype)


def _multiplied(a: Tensor, rows: Tensor, b: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """(a * rows) (b * columns); with a scale for each row, GPUs give bfloat16 only."""
    kind = F.ScalingType.RowWise
    result = torch.bfloat16 if capabilities(a.device).on_gpu else dtype
    scales = rows[:, None], columns[None].contiguous()
    return F.scaled_mm(a, b, scales[0], kind, scales[1], kind, output_dtype=result).to(dtype)
