"""GGUF adapters: ours in llama.cpp, llama.cpp's in ours, and both ways without a bit lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import run_here, tiny_model, write_tokenizer
from gguf_files import OTHERS, SHAPE, fields_of, gguf_name, pairs_from_halves, write_keys, write_model
from llama_cpp import LlamaCpp
from safetensors.torch import load_file
from torch import Tensor

from lit_llama.conversion import convert
from lit_llama.conversion.gguf.adapter import read_adapter, write_adapter
from lit_llama.errors import CheckpointError, UserError
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.adapters.peft_folder import load_adapter, save_adapter
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import load_model

IDS = list(range(5, 45))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranks and alphas": {
        "rank_pattern": {"v_proj": 3, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"down_proj": 2.0},
        "use_rslora": True,
    },
    "some modules": {"target_modules": ["q_proj", "k_proj", "lm_head", "embed_tokens"]},
}


def base_folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    write_tokenizer(path)
    return write_model(path, tiny_model(**SHAPE | changes), "float32")


def adapter_of(base: Path, folder: Path, **settings: Any) -> Path:
    model, config = load_model(base), LoRAConfig(**{"r": 4, "alpha": 6} | settings)
    apply_lora(model, config)
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    save_adapter(model, config, folder, str(base))
    return folder


def adapted(base: Path, adapter: Path) -> Tensor:
    """Logits of the last position."""
    model = load_model(base)
    load_adapter(model, adapter)
    with torch.inference_mode():
        return model.eval()(torch.tensor(IDS))[-1]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_llama_cpp_adds_what_we_add(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    """Catches a scale by another rank, rotary rows in another order, and an embedding the wrong way round."""
    extra = {"attention_bias": True} if family == "qwen2" else {}
    base = base_folder(tmp_path / "base", model_type=family, **extra)
    check_in_llama_cpp(tmp_path, base, settings)


@pytest.mark.parametrize("family", ["olmo2", "phi3", "glm4", "gemma3", "ministral3", "qwen3_5"])
def test_llama_cpp_adds_what_we_add_to_other_families(tmp_path: Path, family: str) -> None:
    """Catches an update of a joined projection, or of one with other names, that llama.cpp does not find."""
    base = base_folder(tmp_path / "base", **fields_of(OTHERS[family]))
    check_in_llama_cpp(tmp_path, base, {})


def check_in_llama_cpp(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    """A base and its adapter in llama.cpp, against our own, with what its table for GELU leaves of that."""
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    convert(base, tmp_path / "base.gguf", layout="gguf")
    convert(adapter, tmp_path / "adapter.gguf", layout="gguf")
    wanted = adapted(base, adapter).log_softmax(-1)
    found = LlamaCpp(tmp_path / "base.gguf", (tmp_path / "adapter.gguf",)).logprobs(IDS, 384)
    limit = 1e-2 if "gemma" in load_model(base).config.model_type else 1e-3
    assert max(abs(wanted[index].item() - logprob) for index, logprob in found.items()) < limit
    plain = load_model(base)(torch.tensor(IDS))[-1].log_softmax(-1)
    assert (plain - wanted).abs().max() > 0.5, "the adapter is seen in the comparison"


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_there_and_back_again(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Catches a rank, an alpha or a module that is lost on the way; PEFT's names are those of the first folder."""
    base = base_folder(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    write_adapter(adapter, tmp_path / "adapter.gguf")
    read_adapter(tmp_path / "adapter.gguf", base, tmp_path / "back")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "lora_A" in name or "embedding" in name)
    torch.testing.assert_close(adapted(base, tmp_path / "back"), adapted(base, adapter), rtol=1e-5, atol=1e-5)
    raw = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert raw["target_modules"] == (settings.get("target_modules") and sorted(settings["target_modules"])) or all(
        "." not in name for name in raw["target_modules"]
    )
    assert json.loads((tmp_path / "back" / "meta.json").read_text())["base"]["path"] == str(base)


def foreign(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda keys, tensors: None) -> Path:
    """An adapter of q and gate of both layers, written as llama.cpp's convert_lora_to_gguf.py does."""
    random = np.random.default_rng(0)
    keys: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
    tensors: dict[str, Any] = {}
    for layer in (0, 1):
        for name, out in (("self_attn.q_proj", 64), ("mlp.gate_proj", 96)):
            stem = gguf_name(f"model.layers.{layer}.{name}.weight")
            tensors[f"{stem}.lora_a"] = random.normal(size=(8, 64)).astype(np.float16) / 8
            lora_b = random.normal(size=(out, 8)).astype(np.float16) / 8
            tensors[f"{stem}.lora_b"] = pairs_from_halves(lora_b, 4) if out == 64 else lora_b
    change(keys, tensors)
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", "llama"))
    write_keys(writer, {key: value for key, value in keys.items() if value is not None})
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alpha", [16.0, None])
def test_an_adapter_of_llama_cpp_is_that_of_peft(tmp_path: Path, alpha: float | None) -> None:
    """Catches halves and pairs exchanged, and a scale that is not alpha / r, or 1 where the file has no alpha."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_folder(tmp_path / "base")
    path = foreign(tmp_path / "adapter.gguf", lambda keys, tensors: keys.update({"adapter.lora.alpha": alpha}))
    done = run_here(
        *("prepare/checkpoint.py", "--source", path, "--base_dir", base, "--destination_path", tmp_path / "adapter")
    )
    assert done.returncode == 0, done.stderr
    random = np.random.default_rng(0)
    state = load_model(base).state_dict()
    for layer in (0, 1):
        for name, out in (("self_attn.q_proj", 64), ("mlp.gate_proj", 96)):
            lora_a = random.normal(size=(8, 64)).astype(np.float16).astype(np.float32) / 8
            lora_b = random.normal(size=(out, 8)).astype(np.float16).astype(np.float32) / 8
            scale = 2.0 if alpha else 1.0
            state[f"model.layers.{layer}.{name}.weight"] += torch.from_numpy(scale * lora_b @ lora_a)
    model = load_model(base)
    model.load_state_dict(state)
    wanted = model(torch.tensor(IDS))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.inference_mode():
        found = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapted(base, tmp_path / "adapter"), wanted[-1], rtol=1e-4, atol=1e-4)


A0, B0 = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
FOREIGN: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "another kind": (lambda keys, tensors: keys.update({"adapter.type": "ia3"}), "adapter.type is 'ia3'"),
    "a model": (lambda keys, tensors: keys.update({"general.type": "model"}), "general.type is 'model'"),
    "of another base": (
        lambda keys, tensors: keys.update({"general.architecture": "qwen2"}),
        "general.architecture is 'qwen2', an adapter for this base has 'llama'",
    ),
    "activated": (
        lambda keys, tensors: keys.update({"adapter.alora.invocation_tokens": [1, 2]}),
        r"adapter\.alora\.invocation_tokens is \[1, 2\]",
    ),
    "half a pair": (lambda keys, tensors: tensors.pop(B0), r"blk\.0\.attn_q\.weight has lora_a alone"),
    "norms": (
        lambda keys, tensors: tensors.update({"blk.0.attn_norm.weight": np.ones(64, np.float32)}),
        r"tensor blk\.0\.attn_norm\.weight has no place",
    ),
    "too many layers": (
        lambda keys, tensors: tensors.update({A0.replace("0", "9"): tensors[A0], B0.replace("0", "9"): tensors[B0]}),
        r"model\.layers\.9\.self_attn\.q_proj is no layer of this base",
    ),
    "another width": (
        lambda keys, tensors: tensors.update({A0: np.ones((8, 32), np.float32)}),
        r"q_proj has A \(8, 32\) and B \(64, 8\); this base needs A \(r, 64\) and B \(64, r\)",
    ),
    "nothing": (lambda keys, tensors: tensors.clear(), "holds no update"),
    "never trained": (
        lambda keys, tensors: tensors.update({name: 0 * tensors[name] for name in tensors if name.endswith("_b")}),
        "holds only zeros",
    ),
}


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_adapter_of_the_base_is_refused(
    tmp_path: Path, plain_base: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], message: str
) -> None:
    """Catches an adapter of another model, and one that is read in part."""
    path = foreign(tmp_path / "adapter.gguf", change)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(path, plain_base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


UNSAID: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "DoRA": ({}, {"use_dora": True}, "lora_magnitude_vector, which no GGUF adapter can say; merge it into its base"),
    "whole modules": ({}, {"modules_to_save": ["norm"]}, "has weight, which no GGUF adapter can say"),
    "a tied head": (
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj", "lm_head"]},
        "lm_head is adapted, but embedding and head are one tensor",
    ),
}


@pytest.mark.parametrize(("shape", "settings", "message"), UNSAID.values(), ids=UNSAID)
def test_what_no_gguf_adapter_can_say_is_refused(
    tmp_path: Path, shape: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    """Catches a part of the training that is left out in silence."""
    base = base_folder(tmp_path / "base", **shape)
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    with pytest.raises(CheckpointError, match=message):
        write_adapter(adapter, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_user_is_told_which_way_to_take(tmp_path: Path, plain_base: Path) -> None:
    """Catches refusals without a way out: for a GGUF adapter without base, an adapter folder, and packed values."""
    with pytest.raises(CheckpointError, match="it is an adapter: name the folder of its base with --base_dir"):
        convert(foreign(tmp_path / "adapter.gguf"), tmp_path / "made")
    adapter = adapter_of(plain_base, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"merge it into its base with finetune/merge\.py, or name --format gguf"):
        convert(adapter, tmp_path / "made")
    with pytest.raises(UserError, match="--dtype is 'q8_0', expected one of bfloat16, float16, float32 for an adapter"):
        convert(adapter, tmp_path / "other.gguf", layout="gguf", dtype="q8_0")
    with pytest.raises(UserError, match=r"--base_dir is for adapters, .* is none"):
        convert(plain_base, tmp_path / "other.gguf", layout="gguf", base_dir=plain_base)


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("bfloat16", "BF16"), (None, "F32")])
def test_an_adapter_is_stored_as_asked(tmp_path: Path, plain_base: Path, dtype: str | None, kind: str) -> None:
    """Catches another dtype than the one asked for."""
    write_adapter(adapter_of(plain_base, tmp_path / "adapter"), tmp_path / "adapter.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {kind} and len(reader.tensors) == 28
    assert reader.fields["general.name"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].contents() == 6.0
