"""Merging: bits against float64, logits against PEFT, and what the merged folder holds."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import CHATML, run_here, write_adapter
from merged_folders import SCALE, read, read_adapter, run
from merged_folders import base as base  # a fixture
from merged_folders import base16 as base16  # a fixture
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.merge import merge, merge_into_gguf
from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.flags import Loading
from lit_llama.generate.llm import load
from lit_llama.generate.models import load_models, loaded, open_models
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.files.shards import write_weights
from lit_llama.model.files.weights import Weights
from lit_llama.text.prompts.encode import named_style

IDS = torch.tensor([[5, 80, 200, 31, 7, 7, 340]])


def exact_sums(base: Mapping[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """W + scale B A in float64, where every product of float32 is exact."""
    return {
        f"{name}.weight": base[f"{name}.weight"].double() + SCALE * (b.double() @ a.double())
        for name, (a, b) in read_adapter(adapter).items()
    }


def logits(folder: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of transformers, with the adapter put on by PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.inference_mode():
        out: Tensor = model.eval()(IDS).logits[0].float()
    return out


def test_adapted_tensors_are_the_exact_sum_rounded_once(base16: Path, tmp_path: Path) -> None:
    """A sum in bfloat16, a product rounded before it is added, a forgotten scale, or B A transposed."""
    adapter = write_adapter(tmp_path / "adapter", base16, targets=["q_proj", "down_proj"])
    run(adapter, tmp_path / "merged")
    before, after = read(base16), read(tmp_path / "merged")
    wanted = exact_sums(before, adapter)
    assert len(wanted) == 4 and set(after) == set(before)
    for name, value in after.items():
        assert value.dtype == torch.bfloat16
        if name not in wanted:
            assert torch.equal(value, before[name]), name
            continue
        exact = wanted[name].to(torch.bfloat16)
        assert not torch.equal(value, before[name])
        # float32 differs from float64 only where the sum lies within its rounding of the middle between two bfloat16
        differing = (value != exact).float().mean().item()
        assert differing < 1e-3, f"{name}: {differing:.2%} are not the sum rounded once"
        torch.testing.assert_close(value.double(), wanted[name], rtol=2**-8, atol=1e-6)


def test_merging_in_float32_is_exact_to_float32(base: Path, tmp_path: Path) -> None:
    """The same in the dtype where nothing hides."""
    adapter = write_adapter(tmp_path / "adapter", base)
    run(adapter, tmp_path / "merged")
    before, after = read(base), read(tmp_path / "merged")
    wanted = exact_sums(before, adapter)
    assert len(wanted) == 14
    for name, value in after.items():
        expected = wanted[name].float() if name in wanted else before[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6 if name in wanted else 0)


def test_the_merged_folder_is_base_plus_adapter_to_transformers(base: Path, tmp_path: Path) -> None:
    """A merge that only our own reader agrees with."""
    adapter = write_adapter(tmp_path / "adapter", base)
    run(adapter, tmp_path / "merged")
    wanted = logits(base, adapter)
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, rtol=1e-4, atol=1e-4)
    assert (logits(base) - wanted).abs().max() > 0.1


def test_a_bfloat16_merge_is_within_its_rounding(base16: Path, tmp_path: Path) -> None:
    """More error than one rounding of the weights makes."""
    adapter = write_adapter(tmp_path / "adapter", base16)
    run(adapter, tmp_path / "merged")
    wanted = logits(base16, adapter)
    merged, rounded = logits(tmp_path / "merged"), logits(base16, adapter, torch.bfloat16)
    assert (merged - wanted).abs().mean() <= (rounded - wanted).abs().mean() * 1.5
    assert (merged - wanted).abs().mean() < (logits(base16) - wanted).abs().mean() / 10


def test_template_of_the_adapter_and_files_of_the_base_travel(base: Path, tmp_path: Path) -> None:
    """A merged model asked in the style of its base, or without tokenizer."""
    from transformers import AutoTokenizer

    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    (base / "chat_template.jinja").unlink()
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    adapter = write_adapter(tmp_path / "adapter", base)
    run(adapter, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.style == named_style("alpaca") and merged.stop_ids == {0, 2}
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = theirs.apply_chat_template([{"role": "user", "content": "Zoë"}], tokenize=False)
    assert text.endswith("### Instruction:\nZoë\n\n### Response:")


def test_other_programs_stop_where_the_style_ends_an_answer(base: Path, tmp_path: Path) -> None:
    """Catches a merged ChatML model that talks on in transformers because its base ends texts with another token."""
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 5}')
    run(write_adapter(tmp_path / "adapter", base, style="chatml"), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text()) == {
        "eos_token_id": [0, 2],
        "top_k": 5,
    }


def test_an_adapter_without_template_leaves_that_of_the_base(base: Path, tmp_path: Path) -> None:
    """A merged model that nobody knows how to ask."""
    run(write_adapter(tmp_path / "adapter", base, style=None), tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == CHATML


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_dtype_is_stored_and_recorded(base16: Path, tmp_path: Path, dtype: str) -> None:
    """Weights of one dtype under a config.json that names another."""
    from transformers import AutoConfig, AutoModelForCausalLM

    run(write_adapter(tmp_path / "adapter", base16), tmp_path / "merged", dtype)
    wanted = getattr(torch, dtype)
    assert {value.dtype for value in read(tmp_path / "merged").values()} == {wanted}
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == wanted
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == wanted


def test_a_sharded_base_merges_to_the_same(base: Path, tmp_path: Path) -> None:
    """Tensors of the first shard only, or an old index copied beside new weights."""
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = Weights(base)
    write_weights(sharded, {name: weights.spec(name) for name in weights}, weights.__getitem__, max_shard_size=60_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    run(write_adapter(tmp_path / "adapter", base), tmp_path / "merged")
    run(write_adapter(tmp_path / "of_shards", sharded), tmp_path / "merged_shards")
    one, other = read(tmp_path / "merged"), read(tmp_path / "merged_shards")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    torch.testing.assert_close(logits(tmp_path / "merged_shards"), logits(tmp_path / "merged"))
    assert not (tmp_path / "merged_shards" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("stored", [False, True], ids=["head left out", "head stored twice"])
def test_an_adapted_head_is_no_longer_tied(base: Path, tmp_path: Path, stored: bool) -> None:
    """An update of the head that changes the embedding, too, or gets lost."""
    if stored:
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = write_adapter(tmp_path / "adapter", base, targets=["lm_head", "q_proj"])
    run(adapter, tmp_path / "merged")
    before, after = read(base), read(tmp_path / "merged")
    embedding = before["model.embed_tokens.weight"]
    assert torch.equal(after["model.embed_tokens.weight"], embedding)
    a, b = read_adapter(adapter)["lm_head"]
    head = embedding.double() + SCALE * (b.double() @ a.double())
    torch.testing.assert_close(after["lm_head.weight"], head.float(), rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    found = logits(tmp_path / "merged")
    ours = load_model(tmp_path / "merged")
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDS[0]), found, rtol=1e-4, atol=1e-4)
    assert (found - logits(base)).abs().max() > 0.1


def test_the_proof_is_printed_and_stored(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures that stand nowhere, or that are not those of the folder."""
    adapter = write_adapter(tmp_path / "adapter", base)
    capsys.readouterr()
    proof = run(adapter, tmp_path / "merged")
    captured = capsys.readouterr()
    meta = json.loads((tmp_path / "merged" / "meta.json").read_text())
    assert meta["proof"] == proof.__dict__ and proof.top1_agreement == 1.0
    assert 0 <= proof.mean_difference <= proof.max_difference < 1e-3 < proof.adapter_effect
    assert f"max |difference| {proof.max_difference:.2e}" in captured.err and "100.0%" in captured.err
    assert meta["base"]["path"] == str(base) and meta["adapter"]["path"] == str(adapter)
    assert captured.out == ""


# The sixteen levels of nf4 (Dettmers et al. 2023, appendix E).
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


@pytest.mark.parametrize("trained", ["bfloat16", "nf4"])
def test_an_adapter_merged_as_it_is_loaded_has_the_weights_that_are_written(
    base16: Path, tmp_path: Path, trained: str
) -> None:
    """Catches weights that are rounded twice, or merged onto a base that the adapter never saw."""
    adapter = write_adapter(tmp_path / "adapter", base16)
    if trained == "nf4":
        pytest.importorskip("bitsandbytes")
        meta = json.loads((adapter / "meta.json").read_text())
        meta["base"]["quantize"] = "nf4"
        (adapter / "meta.json").write_text(json.dumps(meta))
    merge(adapter, tmp_path / "merged", dtype=None, precision="32-true")
    loading: dict[str, Any] = {"precision": "bf16-true", "merge_adapter": True}
    own, written = load(adapter, packed=False, **loading).model.state_dict(), read(tmp_path / "merged")
    stored = read(base16)
    for name, value in written.items():
        assert own[name].dtype == value.dtype == torch.bfloat16 and torch.equal(own[name], value), name
    assert sum(not torch.equal(value, stored[name]) for name, value in written.items()) == 14
    llm = load(adapter, quantize="int8", **loading)
    assert not llm.engine.adapters and llm.engine.default_adapter is None
    ids, sampling = [5, 80, 200, 31], Sampling(max_new_tokens=20)
    made = [
        [token for new, _ in each.stream(ids, sampling) for token in new]
        for each in (llm, load(tmp_path / "merged", precision="bf16-true", quantize="int8"))
    ]
    assert made[0] == made[1]


def test_what_cannot_be_merged_as_it_is_loaded_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    """Catches a flag without effect, and adapters that are put on weights which hold another one already."""
    adapter, other = (write_adapter(tmp_path / name, base, seed=seed) for seed, name in enumerate(("one", "two")))
    merging = Loading(merge_adapter=True, precision="32-true")
    with pytest.raises(UserError, match=r"--merge_adapter is for an adapter, but .*base is none"):
        load(base, merge_adapter=True)
    with pytest.raises(UserError, match="the others of --adapters need as it is"):
        load_models(adapter, {"two": other}, merging)
    assert list(load_models(adapter, None, merging)) == ["one"], "the base is not there any more"
    with pytest.raises(UserError, match="--merge_adapter is for an adapter, but none of the folders is one"):
        open_models([base], merging)
    engines = {id(llm.engine) for _, llm in loaded(open_models([base, adapter, other], merging))}
    assert len(engines) == 3, "each has weights of its own"


def test_merging_onto_nf4_adds_to_what_four_bits_leave(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an update added to weights that the adapter never saw, and an embedding or head that loses bits."""
    pytest.importorskip("bitsandbytes")
    adapter = write_adapter(tmp_path / "adapter", base)
    merge(adapter, tmp_path / "merged", dtype=None, precision="32-true", onto="nf4")
    assert "nf4 moves the logits of the base" in capsys.readouterr().err
    assert json.loads((tmp_path / "merged" / "meta.json").read_text())["onto"] == "nf4"
    stored, merged, pairs = read(base), read(tmp_path / "merged"), read_adapter(adapter)
    levels, changed = torch.tensor(NF4), 0
    for name, value in merged.items():
        module = name.removesuffix(".weight")
        if module not in pairs:
            assert torch.equal(value, stored[name]), name
            continue
        a, b = pairs[module]
        rest = value - SCALE * b @ a
        assert 0.05 < (rest - stored[name]).norm() / stored[name].norm() < 0.15
        scaled = rest.reshape(-1, 64) / rest.reshape(-1, 64).abs().amax(1, keepdim=True)  # the largest is a level of 1
        assert (scaled[..., None] - levels).abs().amin(-1).max() < 1e-3, name
        changed += 1
    assert changed == 14


def test_a_merge_becomes_one_gguf_file(base: Path, tmp_path: Path) -> None:
    """Catches an export that lacks the adapter, the prompt style or the way back, or tells of a folder that is gone."""
    adapter = write_adapter(tmp_path / "adapter", base)
    run(adapter, tmp_path / "merged")
    flags = ["--adapter_dir", adapter, "--destination_path", tmp_path / "model.gguf", "--format", "gguf"]
    made = run_here("finetune/merge.py", *flags, "--precision", "32-true")
    assert made.returncode == 0 and made.stdout == "", made
    assert made.stderr.count("ready for") == 1 and f"{tmp_path}/.model.gguf" not in made.stderr
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["general.name"].contents() == "model"
    back = ["--source", tmp_path / "model.gguf", "--destination_path", tmp_path / "back"]
    assert run_here("prepare/checkpoint.py", *back).returncode == 0
    wanted, found = read(tmp_path / "merged"), read(tmp_path / "back")
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == named_style("alpaca").jinja(bos=False)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged", "model.gguf", "back"}
    assert run_here("finetune/merge.py", *flags).returncode == 2  # it is there already
    with pytest.raises(UserError, match="--dtype q8_0 is a type of GGUF files"):
        merge(adapter, tmp_path / "folder", dtype="q8_0", precision="32-true")


def test_a_packed_file_is_rounded_once(base16: Path, tmp_path: Path) -> None:
    """Catches sums that were bfloat16 before they became eight bits with a scale."""
    adapter = write_adapter(tmp_path / "adapter", base16)
    merge_into_gguf(adapter, tmp_path / "model.gguf", dtype="q8_0", precision="32-true")
    found = open_gguf(tmp_path / "model.gguf", "float32")
    for name, wanted in exact_sums(read(base16), adapter).items():
        assert (found.read(name) - wanted).abs().max() <= 0.005 * wanted.abs().max(), name


def test_buffers_of_old_files_do_not_travel(base: Path, tmp_path: Path) -> None:
    """Catches rotary frequencies that are kept, and rounded to bfloat16, which other programs then compute with."""
    state = load_file(base / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    run(write_adapter(tmp_path / "adapter", base), tmp_path / "merged", "bfloat16")
    assert not [name for name in read(tmp_path / "merged") if "inv_freq" in name]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gguf_file_is_rounded_once_to_the_dtype_asked_for(base16: Path, tmp_path: Path, dtype: str) -> None:
    """Catches bfloat16 under the name of float32 (F32 is 0 in GGUF, which counts as false), and sums that were rounded
    to the dtype of the base before they were written."""
    adapter = write_adapter(tmp_path / "adapter", base16, targets=["o_proj"])
    merge_into_gguf(adapter, tmp_path / "m.gguf", dtype=dtype, precision="32-true")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    kind = {"float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16}[dtype]
    assert {tensor.tensor_type for tensor in tensors.values() if len(tensor.shape) > 1} == {kind}
    exact = exact_sums(read(base16), adapter)["model.layers.0.self_attn.o_proj.weight"]
    found = torch.from_numpy(tensors["blk.0.attn_output.weight"].data.copy())
    half = {"float32": 2e-6, "float16": 2**-11}[dtype]  # of the last place, where bfloat16 has 2**-9
    assert ((found.double() - exact).abs() <= half * exact.abs() + 1e-6).all()
