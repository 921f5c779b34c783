"""The step of decode.cpp against the model in torch, its own quantisation, and itself in other company."""

import itertools
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llama.errors import ResourceError
from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.config import KVCacheType, LoRAConfig
from lit_llama.model.kernels import packing
from lit_llama.model.kernels.decode import PackedCache, PackedLLaMA, packs
from lit_llama.model.kernels.packing import (
    GROUP,
    ZERO,
    MappedFiles,
    Weights,
    dequantized,
    in_turns,
    packed,
    packed_codes,
    packed_matrix,
    packed_scales,
    quantized,
)
from lit_llama.model.kernels.paged import BLOCK, PagedBatch, PagedCache, paged_logits
from lit_llama.model.kernels.trained import Factors, factors_of
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators.kernels import compiled

pytestmark = pytest.mark.skipif(compiled() is None, reason="no C++ compiler")

SHAPES = {
    "llama": {},
    "odd sizes": {"hidden_size": 72, "intermediate_size": 100, "vocab_size": 391, "head_dim": 18},
    "qwen2": {"attention_bias": True, "tie_word_embeddings": True},
    "qwen3": {"use_qk_norm": True, "head_dim": 32},
    "mistral": {"sliding_window": 40, "num_hidden_layers": 3},
    "biases": {"mlp_bias": True, "attention_bias": True, "attention_out_bias": True},
    "one head": {"num_attention_heads": 3, "num_key_value_heads": 1},
}


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 384, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(ids: list[int], table: list[int] | None = None) -> PagedBatch:
    table = table or list(range(-(-len(ids) // BLOCK)))
    return PagedBatch(ids=[ids], starts=[0], tables=[table], logits=[len(ids)])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_the_model(shape: dict[str, object]) -> None:
    model, ids = tiny_model(**shape), ids_of(150)
    made = PackedLLaMA(model, torch.float32)(whole(ids, [9, 2, 7, 1, 4]), PackedCache(model.config, 10, torch.float32))
    assert torch.allclose(made, model(torch.tensor(ids)), rtol=1e-4, atol=1e-4)
    torchs = paged_logits(model, whole(ids, [9, 2, 7, 1, 4]), PagedCache(model.config, 10, "cpu", torch.float32))
    assert torch.allclose(torchs, model(torch.tensor(ids)), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_near_to_the_exact_model_as_torchs() -> None:
    exact, ids = tiny_model(), ids_of(150)
    rounded = tiny_model().bfloat16()
    expected = exact.load_state_dict(rounded.float().state_dict()) and exact(torch.tensor(ids))
    torchs = tiny_model().bfloat16()(torch.tensor(ids)).float()
    made = PackedLLaMA(rounded, torch.bfloat16)(whole(ids), PackedCache(exact.config, 5, torch.bfloat16))
    assert (made - expected).abs().mean() < 1.1 * (torchs - expected).abs().mean()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_keys_and_values_in_8_bits_are_those_of_the_twin(shape: dict[str, object]) -> None:
    """Catches: a scale of another token or head, codes in another order, and a loss that is not that of rounding."""
    model, ids, table = tiny_model(**shape), ids_of(150), [9, 2, 7, 1, 4]
    step = PackedLLaMA(model, torch.float32)
    exact = step(whole(ids, table), PackedCache(model.config, 10, torch.float32))
    made = step(whole(ids, table), PackedCache(model.config, 10, torch.float32, "int8"))
    torchs = paged_logits(model, whole(ids, table), PagedCache(model.config, 10, "cpu", torch.float32, "int8"))
    off = (made - exact).abs().mean()
    assert 0 < off < 0.05 * exact.std(), "8 bits lose little"
    assert (made - torchs).abs().mean() < off / 10, "where sums are rounded otherwise, few codes are other ones"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_keys_and_values_are_as_near_as_8_bits_can_be(dtype: torch.dtype) -> None:
    """Catches: a scale that is not of the largest number of its row, or codes that are cut and not rounded."""
    model, ids = tiny_model(num_hidden_layers=1), ids_of(BLOCK)
    step, groups, deep, words = PackedLLaMA(model, dtype), 2, 32, 4 // dtype.itemsize
    plain, coded = (PackedCache(model.config, 1, dtype, kind) for kind in ("auto", "int8"))
    for cache in (plain, coded):
        step(whole(ids), cache)
    rows = plain.blocks[0, 0].view(dtype).view(groups, 2, BLOCK * deep).float()
    codes = coded.blocks[0, 0, :, : 2 * BLOCK * deep].reshape(groups, 2, BLOCK * deep).float()
    scales = coded.blocks[0, 0, :, 2 * BLOCK * deep :].contiguous().view(torch.float32).view(groups, 2, BLOCK)
    ways = (
        (0, (2, deep // words, 16, words), (0, 2, 1, 3)),
        (1, (deep // 16, BLOCK // words, 16, words), (1, 3, 0, 2)),
    )
    for part, shape, order in ways:  # in which tokens come first
        for head in range(groups):
            row, code = (x[head, part].view(shape).permute(order).reshape(BLOCK, deep) for x in (rows, codes))
            scale = scales[head, part][:, None]
            slack = 2**-8 * row.abs() if dtype == torch.bfloat16 else 1e-6
            assert ((code * scale - row).abs() <= scale * 0.5001 + slack).all()
            assert torch.equal(code.abs().amax(1), torch.full((BLOCK,), 127.0))


@pytest.mark.parametrize("kind", get_args(KVCacheType))
def test_a_number_that_is_none_is_not_lost_in_the_cache(kind: KVCacheType) -> None:
    """Catches: an answer behind a damaged token that looks as if nothing were wrong."""
    model = tiny_model()
    model.model.embed_tokens.weight[5] = torch.nan
    ids = [1, 2, 5, *range(10, 70)]
    packed = PackedLLaMA(model, torch.float32)(whole(ids), PackedCache(model.config, 2, torch.float32, kind))
    twin = paged_logits(model, whole(ids), PagedCache(model.config, 2, "cpu", torch.float32, kind))
    for logits in (packed, twin):
        assert not logits[2:].isfinite().any()


@pytest.mark.parametrize("kind", get_args(KVCacheType))
@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["llama", "mistral"])
def test_the_bits_do_not_depend_on_the_company(
    shape: str, dtype: torch.dtype, weights: Weights, kind: KVCacheType
) -> None:
    """Catches: a sum whose order depends on the rows beside it, the pieces of a prompt, or the threads."""
    model = tiny_model(**SHAPES[shape])
    step, cache = PackedLLaMA(model, dtype, weights), PackedCache(model.config, 40, dtype, kind)
    ids, others = ids_of(150), [ids_of(n, seed=n) for n in (1, 33, 70)]
    alone = step(whole(ids), cache)
    for piece in (1, 7, 64):
        parts = [
            step(PagedBatch(ids=[ids[i : i + piece]], starts=[i], tables=[[9, 8, 7, 6, 5]], logits=[piece]), cache)
            for i in range(0, 150 - 150 % piece, piece)
        ]
        assert torch.equal(torch.cat(parts), alone[: 150 - 150 % piece]), piece
    together = PagedBatch(
        ids=[others[0], others[1], ids, others[2]],
        starts=[0] * 4,
        tables=[[10], [11, 12], [13, 14, 15, 16, 17], [18, 19, 20]],
        logits=[0, 33, 150, 1],
    )
    assert torch.equal(step(together, cache)[33:-1], alone)


@pytest.mark.parametrize("weights", get_args(Weights))
def test_a_step_that_wants_no_logits_fills_the_cache(weights: Weights) -> None:
    """Catches: a division by the number of logits, which ends the process at the first piece of a long prompt."""
    model, ids = tiny_model(), ids_of(40)
    step, cache = PackedLLaMA(model, torch.bfloat16, weights), PackedCache(model.config, 4, torch.bfloat16)
    alone = step(whole(ids), cache)[-1:]
    assert len(step(PagedBatch(ids=[ids[:33]], starts=[0], tables=[[2, 3]], logits=[0]), cache)) == 0
    last = PagedBatch(ids=[ids[33:]], starts=[33], tables=[[2, 3]], logits=[1])
    assert torch.equal(step(last, cache), alone)


@pytest.mark.parametrize("tokens", [20, 200])
def test_the_bits_do_not_depend_on_the_number_of_threads(tokens: int) -> None:
    """Catches: chunks of keys that are joined in the order in which threads finish them."""
    model, ids = tiny_model(), ids_of(tokens)
    step, cache = PackedLLaMA(model, torch.bfloat16), PackedCache(model.config, 8, torch.bfloat16)
    made = []
    before = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            step(whole(ids[:-1]), cache)
            last = PagedBatch(ids=[ids[-1:]], starts=[tokens - 1], tables=[list(range(8))], logits=[1])
            made.append(torch.cat([step(last, cache), step(whole(ids), cache)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_codes_give_what_they_stand_for(weights: Weights, bits: int) -> None:
    """Against the model with the weights that the codes stand for; what is left is the rounding of tokens to 8 bits."""
    model, ids = tiny_model(), ids_of(60)
    made = PackedLLaMA(model, torch.float32, weights)(whole(ids), PackedCache(model.config, 2, torch.float32))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            own = 8 if name == "lm_head" else bits
            rows, columns = module.weight.shape
            module.weight.copy_(dequantized(*quantized(module.weight, own), own)[:rows, :columns])
    expected = model(torch.tensor(ids))
    assert (made - expected).norm() < 0.04 * expected.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_near(bits: int) -> None:
    weight = torch.randn(40, 100) * torch.logspace(-3, 1, 40)[:, None]
    weight[3] = 0
    codes, scales = quantized(weight, bits)
    made = dequantized(codes, scales, bits)[:40, :100]
    steps = 127 if bits == 8 else 7
    largest = torch.nn.functional.pad(weight, (0, -100 % GROUP[bits])).unflatten(1, (-1, GROUP[bits])).abs().amax(2)
    limit = (largest / steps * (0.51 if bits == 8 else 1.2)).repeat_interleave(GROUP[bits], 1)[:, :100]
    assert ((made - weight).abs() <= limit + 1e-12).all() and (made[3] == 0).all()
    assert int(codes.max()) < 2 * ZERO[bits]


def test_packing_is_an_order_and_loses_nothing() -> None:
    weight = torch.arange(40.0 * 50).reshape(40, 50)
    for dtype, words in ((torch.float32, 1), (torch.bfloat16, 2)):
        laid = packed(weight.to(dtype))
        for row, column in itertools.product((0, 17, 39), (0, 1, 33, 49)):
            assert laid[row // 16, column // words, row % 16, column % words] == weight[row, column].to(dtype)
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    nibbles = packed_codes(codes, 4)
    assert nibbles[1, 3, 5, 2] == codes[21, 26] | codes[21, 30] << 4
    assert packed_scales(torch.arange(64.0).reshape(32, 2))[1, 1, 3] == 19 * 2 + 1
    assert in_turns(torch.arange(20), 100 + torch.arange(20)).tolist()[16:20] == [100, 101, 102, 103]


def tuned(seed: int = 0, **options: object) -> LLaMA:
    model = tiny_model(num_attention_heads=4, attention_bias=True)
    torch.manual_seed(seed)
    apply_lora(model, LoRAConfig(**options))  # type: ignore[arg-type]
    for _, module in adapters(model):
        for parameter in module.parts().values():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_pieces_of_rows_are_packed_as_the_whole(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a piece at the wrong rows, a last one that is not filled up, and numbers of a whole weight in float."""
    weight, dtype = torch.randn(1000, 300).bfloat16(), torch.float32 if bits == 32 else torch.bfloat16
    codes, scales = quantized(weight, bits) if bits <= 8 else (weight, weight)
    expected = packed(weight.to(dtype)) if bits > 8 else packed_codes(codes, bits)
    monkeypatch.setattr(packing, "PIECE", 33_000)  # 96 rows
    largest = 0

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and bits <= 8:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watched():
        made, steps = packed_matrix([weight], dtype, bits)
    assert torch.equal(made, expected) and made.stride() == expected.stride()
    if bits <= 8:
        assert steps is not None and torch.equal(steps, packed_scales(scales))
        assert 0 < largest <= 4 * 96 * 320


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "up_proj", "k_proj,down_proj,o_proj"])
def test_updates_of_low_rank_are_those_of_the_layers(targets: str) -> None:
    model, ids = tuned(target_modules=targets, r=5), ids_of(70)
    step = PackedLLaMA(model, torch.float32)
    step.add_adapter("own", factors_of(model))
    batch = PagedBatch(ids=[ids], starts=[0], tables=[[0, 1, 2]], logits=[70], adapters=["own"])
    made = step(batch, PackedCache(model.config, 3, torch.float32))
    assert torch.allclose(made, model(torch.tensor(ids)), rtol=1e-4, atol=1e-4)


def test_adapters_in_one_batch_give_what_each_gives_alone() -> None:
    """Catches: a tile of tokens that is computed with the update of its neighbour."""
    first, second = tuned(1, r=4), tuned(2, r=40, target_modules="q_proj,gate_proj")
    step, cache = PackedLLaMA(tiny_model(attention_bias=True), torch.bfloat16), None
    cache = PackedCache(first.config, 30, torch.bfloat16)
    step.add_adapter("first", factors_of(first))
    step.add_adapter("second", factors_of(second))
    ids = [ids_of(n, seed=n) for n in (3, 40, 5, 37)]
    names = [None, "first", "first", "second"]
    tables = [[0], [1, 2], [3], [4, 5]]
    together = step(
        PagedBatch(ids=ids, starts=[0] * 4, tables=tables, logits=[len(i) for i in ids], adapters=names), cache
    )
    for own, table, name, part in zip(ids, tables, names, together.split([len(i) for i in ids]), strict=True):
        alone = step(PagedBatch(ids=[own], starts=[0], tables=[table], logits=[len(own)], adapters=[name]), cache)
        assert torch.equal(part, alone), name


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": "embed_tokens,lm_head,norm"}])
def test_what_is_no_plain_update_is_merged(options: dict[str, object]) -> None:
    model, ids = tuned(**options), ids_of(40)
    step = PackedLLaMA(model, torch.float32)
    step.add_adapter("own", factors_of(model))
    batch = PagedBatch(ids=[ids], starts=[0], tables=[[0, 1]], logits=[40], adapters=["own"])
    made = step(batch, PackedCache(model.config, 2, torch.float32))
    assert torch.allclose(made, model(torch.tensor(ids)), rtol=1e-3, atol=1e-3)


def test_an_update_of_an_unknown_layer_is_refused() -> None:
    step = PackedLLaMA(tiny_model(), torch.float32)
    with pytest.raises(Exception, match=r"lm_head.*merged"):
        step.add_adapter("x", {"lm_head": Factors(torch.zeros(2, 64), torch.zeros(384, 2), 1.0)})


def test_a_consumed_model_is_never_there_twice() -> None:
    model = tiny_model()
    expected = model(torch.tensor([1, 2, 3]))
    step = PackedLLaMA(model, torch.float32, consume=True)
    assert sum(p.numel() for name, p in model.named_parameters() if "norm" not in name) == 0
    made = step(whole([1, 2, 3]), PackedCache(model.config, 1, torch.float32))
    assert torch.allclose(made, expected, rtol=1e-4, atol=1e-4)


def test_mapped_weights_leave_the_memory_and_nothing_else_changes(tmp_path: Path) -> None:
    """Counts the pages of the file that the process holds. Catches: what is kept of a mapped file and keeps all of it;
    memory that is in no file, or of a neighbour, and is lost."""
    save_file({"first": torch.full((1001, 1024), 2.0), "second": torch.full((999, 1024), 3.0)}, tmp_path / "x")
    with safe_open(tmp_path / "x", framework="pt") as file:
        first, second = file.get_tensor("first"), file.get_tensor("second")
    other = torch.full((1001, 1024), 4.0)
    files = MappedFiles()
    assert [float(x.sum()) for x in (first, second, other)] == [2 * 1001 * 1024, 3 * 999 * 1024, 4 * 1001 * 1024]
    held = resident(tmp_path / "x")
    assert files.forget(other) == 0
    given = files.forget(first)
    assert first.nbytes - 2 * mmap.PAGESIZE <= given <= first.nbytes
    assert held - resident(tmp_path / "x") == given
    assert bool((first == 2).all() and (second == 3).all() and (other == 4).all())


def resident(path: Path) -> int:
    """Bytes of a file that this process has in its memory."""
    lines = iter(Path("/proc/self/smaps").read_text("utf-8").splitlines())
    return sum(
        1024 * int(next(own for own in lines if own.startswith("Rss:")).split()[1])
        for line in lines
        if line.endswith(f" {path}")
    )


@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_a_consumed_model_keeps_no_part_of_its_numbers(weights: Weights) -> None:
    """Catches an embedding that is a part of a mapped file, which stays mapped for its sake."""
    model = tiny_model(tie_word_embeddings=weights == "int8")
    where = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if parameter.ndim == 2}
    held = [parameter.detach() for parameter in model.parameters()]  # so that no address comes again
    packed_model = PackedLLaMA(model, torch.float32, weights, consume=True)
    assert held and not where & {tensor.untyped_storage().data_ptr() for tensor in packed_model._kept}


def test_which_models_are_packed() -> None:
    assert packs(tiny_model().config, torch.float32)
    assert not packs(tiny_model().config, torch.float16)
    with pytest.raises(ResourceError, match=r"cannot be packed in torch\.float16"):
        PackedLLaMA(tiny_model(), torch.float16)


def test_a_new_process_may_compute_at_once() -> None:
    """Catches instructions that the system has to allow first, and that only something else had asked for."""
    program = (
        "import torch; from conftest import tiny_model; from test_packed_decode import *\n"
        "model = tiny_model().bfloat16(); step = PackedLLaMA(model, torch.bfloat16)\n"
        "assert step(whole([1, 2, 3]), PackedCache(model.config, 1, torch.bfloat16)).isfinite().all()"
    )
    run_alone(program, {})


def test_all_is_computed_where_there_are_fewer_threads_than_asked_for() -> None:
    """Catches parts of a product that belong to a thread that the system did not give."""
    program = (
        "import torch; from conftest import tiny_model; from test_packed_decode import *\n"
        "torch.set_num_threads(3); model = tiny_model(); step = PackedLLaMA(model, torch.float32)\n"
        "made = step(whole(ids_of(20)), PackedCache(model.config, 1, torch.float32))\n"
        "assert torch.allclose(made, model(torch.tensor(ids_of(20))), rtol=1e-4, atol=1e-4)"
    )
    run_alone(program, {"OMP_THREAD_LIMIT": "2"})


def run_alone(program: str, given: dict[str, str]) -> None:
    """Run a program that imports this module in a process of its own."""
    here = Path(__file__).parent
    folders = os.pathsep.join(map(str, (here.parents[2], here.parents[1], here)))
    environment = os.environ | given | {"PYTHONPATH": folders}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
