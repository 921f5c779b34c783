"""Plans of generation and layers that lie elsewhere, against sizes that are counted and models that are whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.flags import Loading
from lit_llama.generate.llm import open_folder
from lit_llama.generate.plan import GenerationPlan, lighter, plan_generation, print_plan, remedy
from lit_llama.model.adapters.peft_folder import load_adapter
from lit_llama.model.config import Held, LLaMAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.kernels.decode import PackedLLaMA, packs
from lit_llama.model.kernels.paged import PagedBatch
from lit_llama.model.offload import OffloadedLayer, offload
from tests.conftest import tiny_config, write_adapter

CPU = torch.device("cpu")
BATCH = PagedBatch(ids=[list(range(20, 50))], starts=[0], tables=[[1]], logits=[3])
LARGE = LLaMAConfig(
    vocab_size=32000,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
    head_dim=128,
)  # LLaMA-13B


def planned(config: LLaMAConfig, total: float, held: Held = "stored", **changes: object) -> GenerationPlan:
    """A plan for a CPU with kernels and so many bytes."""
    values = dict(config=config, device=CPU, dtype=torch.bfloat16, held=held, packs=True, max_sequences=1)
    return GenerationPlan(**(values | {"total": int(total), "program": 300_000_000} | changes))  # type: ignore[arg-type]


def test_the_weights_of_13b_are_those_that_everybody_counts() -> None:
    """13,015,864,320 parameters; 4-bit groups of 32 take 4.5 bits each, and head and embedding are apart."""
    assert planned(LARGE, 64e9).weights == 2 * 13_015_864_320
    matrix = 32000 * 5120
    linear = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824)
    small = 13_015_864_320 - linear - 2 * matrix
    assert planned(LARGE, 64e9, "int4").weights == pytest.approx(
        linear * 4.5 / 8 + 2 * small + 2 * matrix + matrix * 8.25 / 8, rel=1e-6
    )


def test_a_way_out_is_named_that_fits() -> None:
    """Advice that does not fit either, or one more than is needed."""
    plan = planned(LARGE, 18e9)
    assert not plan.fits and [other.held for other in lighter(plan)] == ["int8", "int4"]
    assert [other.held for other in lighter(planned(LARGE, 12e9))] == ["int4"]
    assert "--quantize int4 (" in remedy(planned(LARGE, 12e9)) and "int8" not in remedy(planned(LARGE, 12e9))
    assert remedy(planned(LARGE, 4e9)).startswith("take a smaller model")


@pytest.mark.skipif(not packs(tiny_config(), torch.float32), reason="no kernels for this CPU")
@pytest.mark.parametrize("held", ["stored", "int8", "int4"])
def test_planned_weights_are_those_that_are_packed(real_folder: Path, held: Held) -> None:
    """A part that is forgotten, such as the head beside the embedding."""
    model = load_model(real_folder, dtype=torch.bfloat16)
    plan = planned(model.config, 64e9, held)
    found = PackedLLaMA(model, torch.bfloat16, held, consume=True).bytes  # type: ignore[arg-type]
    assert plan.weights == pytest.approx(found, rel=0.03)


def test_the_cache_takes_no_more_than_half_of_what_is_left() -> None:
    """A cache that is promised memory that weights need."""
    assert (
        planned(LARGE, 27e9).cache == (27_000_000_000 - 300_000_000 - 2 * 13_015_864_320 - planned(LARGE, 1).step) // 2
    )
    small = planned(LARGE, 64e9, max_sequences=4)
    assert small.cache == (LARGE.context_length // 32 + 1) * 32 * 2 * 2 * 40 * 5120


def test_keys_and_values_in_8_bits_take_little_more_than_half(tiny_folder: Path) -> None:
    """A plan that counts a cache which is not made, or a flag that is dropped on its way there."""
    half = planned(LARGE, 64e9, kv_cache="int8").cache / planned(LARGE, 64e9).cache
    assert half == pytest.approx((128 + 4) / 256)
    for packed in (True, False):
        plain, coded = (
            open_folder(tiny_folder, Loading(precision="32-true", packed=packed, kv_cache=kind)).load().engine.runner
            for kind in ("auto", "int8")
        )
        assert type(plain) is type(coded)
        assert min(plain.blocks, coded.blocks) * 32 >= 256 * 32, "room for all answers, in less memory"
        assert coded.logits(BATCH).isfinite().all() and not torch.equal(coded.logits(BATCH), plain.logits(BATCH))


def test_a_model_that_is_too_large_is_offloaded(tiny_folder: Path) -> None:
    """All layers of a CPU, which are mapped; and as few as need be elsewhere."""
    config = LLaMAConfig.from_folder(tiny_folder)
    plan = plan_generation(config, precision="32-true", memory="1MB")
    assert plan.offloaded == 0 and not plan.fits, "where not even the program fits, nothing helps"
    with pytest.raises(UserError, match="expected an amount"):
        plan_generation(config, memory="much")


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_offloaded_layers_compute_as_those_that_are_here(
    tiny_folder: Path, tmp_path: Path, stored: torch.dtype
) -> None:
    """A weight that is converted wrongly, an adapter that is left out or rounded, a layer that is kept."""
    adapter = write_adapter(tmp_path / "adapter", tiny_folder)
    dtype = torch.bfloat16
    whole = load_model(tiny_folder, dtype=dtype)
    load_adapter(whole, adapter)
    model = load_model(tiny_folder, dtype=dtype, stored_from=1)
    parameters = list(model.model.layers[1:].parameters())
    assert {p.dtype for p in parameters} == {torch.float32} != {model.lm_head.weight.dtype}
    load_adapter(model, adapter)
    offload(model, CPU, dtype, 1, parameters)
    assert [isinstance(layer, OffloadedLayer) for layer in model.model.layers] == [False] + [True] * (
        len(model.model.layers) - 1
    )
    ids = torch.tensor([5, 80, 200, 31])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), whole(ids), rtol=0, atol=0)
    assert {p.dtype for p in parameters} == {torch.float32}, "what is brought is not kept"


def test_a_model_larger_than_the_memory_answers(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An end in place of an answer, or an answer of another model."""
    adapter, loading = write_adapter(tmp_path / "adapter", tiny_folder), Loading(precision="32-true", batch_size=2)
    folder = open_folder(adapter, loading)
    plan = folder.plan()
    whole = open_folder(adapter, replace(loading, packed=False)).load()
    monkeypatch.setattr(type(folder), "plan", lambda *_, **__: replace(plan, offloaded=len(whole.model.model.layers)))
    offloaded = folder.load()
    said = capsys.readouterr().err
    assert "are read from the disk at each step" in said and "GB" in said
    ids, sampling = whole.tokenizer.encode("Say hi"), Sampling(max_new_tokens=8)
    found, wanted = ([i for step, _ in llm.stream(ids, sampling) for i in step] for llm in (offloaded, whole))
    assert found == wanted


def test_a_plan_that_does_not_fit_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A script that goes on where the plan says no."""
    print_plan(planned(LARGE, 64e9))
    assert "of 64.00 on the cpu" in capsys.readouterr().out
    with pytest.raises(ResourceError, match=r"the model needs 28.* there are 16\.00 GB on the cpu; it fits with"):
        print_plan(planned(LARGE, 16e9))
    print_plan(replace(planned(LARGE, 16e9), offloaded=40))
    assert "read from the disk" in capsys.readouterr().err


def test_int4_needs_the_kernels(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantisation that is asked for and quietly left out."""
    import lit_llama.generate.plan as module

    monkeypatch.setattr(module, "packs", lambda *_: False)
    with pytest.raises(ResourceError, match=r"int4 is for CPUs and a C\+\+ compiler"):
        plan_generation(LLaMAConfig.from_folder(tiny_folder), held="int4")
