"""Mixtures of experts as GGUF: those of a layer are one tensor there, and many matrices in Hugging Face's files."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_model, write_tokenizer
from gguf_files import EXPERTS, fields_of, tokenizer_keys, write_keys, write_model
from llama_cpp import LlamaCpp

from lit_llama.conversion import convert
from lit_llama.conversion.gguf.architectures import entry_of
from lit_llama.conversion.gguf.metadata import to_metadata
from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.gguf.writer import plan, write_gguf
from lit_llama.conversion.native import open_folder
from lit_llama.conversion.source import Source
from lit_llama.errors import CheckpointError
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.adapters.peft_folder import save_adapter
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
"""Of rows that a block of 256 divides."""
NAMES = {
    "mixtral": ("llama", "block_sparse_moe", {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}),
    "qwen3_moe": (
        "qwen3moe",
        "mlp",
        {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"},
    ),
}


def folder(path: Path, family: str, dtype: str = "float32", **changes: Any) -> tuple[Source, LLaMA]:
    """A model folder with experts."""
    path.mkdir(exist_ok=True)
    write_tokenizer(path)
    model = tiny_model(**fields_of(EXPERTS[family]) | changes)
    return open_folder(write_model(path, model, dtype)), model


@pytest.mark.parametrize("family", EXPERTS)
def test_a_file_holds_the_experts_of_a_layer_one_after_the_other(tmp_path: Path, family: str) -> None:
    """Read by the gguf package; catches experts in another order, gate and up exchanged, and keys of other names."""
    source, model = folder(tmp_path / "model", family, "bfloat16")
    write_gguf(source, tmp_path / "model.gguf")
    reader, state = gguf.GGUFReader(tmp_path / "model.gguf"), model.state_dict()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture, block, stacks = NAMES[family]
    for stack, name in stacks.items():
        found = tensors[f"blk.1.{stack}.weight"]
        experts = range(model.config.num_local_experts or 0)
        wanted = torch.stack([state[f"model.layers.1.{block}.experts.{index}.{name}.weight"] for index in experts])
        assert found.tensor_type.name == "BF16" and list(found.shape) == [*reversed(wanted.shape)]
        assert np.array_equal(
            np.asarray(found.data).reshape(-1), wanted.bfloat16().view(torch.uint8).numpy().reshape(-1)
        )
    router = tensors["blk.1.ffn_gate_inp.weight"]
    assert router.tensor_type.name == "F32"
    assert np.array_equal(router.data, state[f"model.layers.1.{block}.gate.weight"].bfloat16().float().numpy())
    keys = {key: reader.fields[f"{architecture}.{key}"].contents() for key in ("expert_count", "expert_used_count")}
    assert keys == {
        "expert_count": model.config.num_local_experts,
        "expert_used_count": model.config.num_experts_per_tok,
    }
    assert (f"{architecture}.expert_feed_forward_length" in reader.fields) is (family == "qwen3_moe")


@pytest.mark.parametrize("family", EXPERTS)
def test_both_ways_a_model_stays_as_it_was(tmp_path: Path, family: str) -> None:
    """Every tensor, dtype and setting, and the file written again byte by byte; catches a router that comes back in
    float32, and a mixture that is read as a dense model."""
    source, _ = folder(tmp_path / "model", family, "float16")
    write_gguf(source, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "back")
    back = open_folder(tmp_path / "back")
    assert dict(back.specs) == dict(source.specs) and back.shape == source.shape
    assert all(torch.equal(back.read(name), source.read(name)) for name in source.specs)
    write_gguf(open_gguf(tmp_path / "model.gguf"), tmp_path / "again.gguf", name="model")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", "q4_k_m"), ("qwen3_moe", "q8_0"), ("qwen3_moe", "q4_0")])
def test_llama_cpp_computes_with_the_packed_experts(tmp_path: Path, family: str, dtype: str) -> None:
    """Against our model of what the bytes stand for; catches blocks that run from one expert into the next."""
    source, _ = folder(
        tmp_path / "model", family, **WIDE | ({"moe_intermediate_size": 256} if "qwen" in family else {})
    )
    write_gguf(source, tmp_path / "model.gguf", dtype)
    convert(tmp_path / "model.gguf", tmp_path / "back", dtype="float32")
    ids = list(range(5, 45))
    ours = load_model(tmp_path / "back")(torch.tensor(ids))[-1].log_softmax(-1)
    theirs = LlamaCpp(tmp_path / "model.gguf").logprobs(ids, 384)
    # It rounds the inputs of each product to 8 bits.
    assert max(abs(ours[index].item() - logprob) for index, logprob in theirs.items()) < 0.3


def test_a_mixture_of_types_is_that_of_llama_cpp(tmp_path: Path) -> None:
    """By hand from its rule for eight experts; catches projections down that are packed like the rest, and attention
    with as few bits as experts."""
    source, _ = folder(tmp_path / "model", "mixtral", **WIDE, num_local_experts=8, num_hidden_layers=2)
    kinds = {name: kind.name for name, kind in plan(source, "q4_k_m").kinds.items()}
    of = {"q_proj": "Q4_K", "k_proj": "Q8_0", "v_proj": "Q8_0", "o_proj": "Q5_K", "gate": "F32"}
    of |= {"w1": "Q4_K", "w3": "Q4_K"}
    for name, kind in kinds.items():
        last = name.split(".")[-2]
        assert kind == of.get(last, kind), name
        if last == "w2":
            assert kind == ("Q6_K" if ".layers.1." in name else "Q4_K"), name


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3_moe", {"mlp_only_layers": (1,)}, r"layers \[1\] have no experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"layers \[0\] have no experts"),
        ("mixtral", {"moe_intermediate_size": 32}, "moe_intermediate_size is 32"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_not_written(family: str, changes: dict[str, Any], message: str) -> None:
    """Catches a file that llama.cpp computes as another model, or cannot load."""
    with pytest.raises(CheckpointError, match=message):
        to_metadata(LLaMAConfig(**fields_of(EXPERTS[family]) | changes))


def written(path: Path, keys: dict[str, Any], stacks: dict[str, tuple[int, ...]]) -> Path:
    """A file of one layer with these keys more, and nothing but an embedding, experts and these tensors."""
    write_tokenizer(path.parent)
    writer = gguf.GGUFWriter(path, "llama")
    dense = {"block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96}
    dense |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    write_keys(writer, {f"llama.{key}": value for key, value in (dense | keys).items()} | tokenizer_keys(path.parent))
    experts = {"blk.0.ffn_gate_exps": (4, 96, 64), "blk.0.ffn_up_exps": (4, 96, 64), "blk.0.ffn_down_exps": (4, 64, 96)}
    for name, shape in ({"token_embd": (384, 64)} | (experts if keys else {}) | stacks).items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


USED: dict[str, Any] = {"expert_count": 4, "expert_used_count": 2}


@pytest.mark.parametrize(
    ("keys", "stacks", "message"),
    [
        ({"expert_count": 4}, {}, "no llama.expert_used_count"),
        (USED | {"expert_used_count": 5}, {}, "num_experts_per_tok is 5, more than the 4 experts"),
        (USED | {"expert_count": 2**30}, {}, "num_local_experts is 1073741824, which cannot be"),
        (USED | {"expert_count": 2**16}, {}, "expert_count is 65536, but the file has 12 matrices of experts"),
        (USED | {"expert_weights_norm": False}, {}, "expert_weights_norm is false"),
        (USED | {"expert_weights_scale": 2.5}, {}, "expert_weights_scale is 2.5"),
        (USED | {"expert_gating_func": 2}, {}, "expert_gating_func is 2"),
        (USED | {"expert_shared_count": 1}, {}, "expert_shared_count is 1"),
        (USED, {"blk.0.ffn_up_exps": (4, 64)}, r"blk.0.ffn_up_exps.weight is \(4, 64\), expected \(experts, rows, col"),
        (USED, {"blk.0.ffn_up_exps": (5000, 1, 32)}, r"is \(5000, 1, 32\), expected \(experts"),
        (USED, {"blk.0.ffn_up_exps": (3, 96, 64)}, "expert_count is 4, but the file has 11 matrices of experts"),
        (USED, {"blk.0.ffn_up.3": (96, 64)}, "blk.0.ffn_up.3.weight has no place"),
    ],
    ids=str,
)
def test_what_is_no_mixture_is_refused(
    tmp_path: Path, keys: dict[str, Any], stacks: dict[str, tuple[int, ...]], message: str
) -> None:
    """Catches experts that are lost, and a count that nobody has checked before so many are made."""
    path = written(tmp_path / "model.gguf", keys, stacks)
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "made")


def test_names_go_both_ways() -> None:
    """Catches a tensor that is called one thing when read and another when written."""
    for raw in EXPERTS.values():
        model = tiny_model(**fields_of(raw))
        entry = entry_of(model.config)
        for name in model.state_dict():
            index = name.partition(".experts.")[2].partition(".")[0]
            assert (entry.native_name(entry.names(name) or "") or "").format(index) == name


@pytest.mark.parametrize(("target", "fits"), [("q_proj", True), ("w1", False)])
def test_an_adapter_is_of_attention_alone(tmp_path: Path, target: str, fits: bool) -> None:
    """Catches updates of all experts of a layer under one name, of which the last would win."""
    folder(tmp_path / "model", "mixtral")
    model = load_model(tmp_path / "model")
    apply_lora(model, config := LoRAConfig(r=2, alpha=4, target_modules=target))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, config, tmp_path / "adapter", str(tmp_path / "model"))
    if not fits:
        with pytest.raises(
            CheckpointError, match=r"experts.0.w1 is an expert, and .* blk.0.ffn_gate_exps.weight in GGUF"
        ):
            convert(tmp_path / "adapter", tmp_path / "adapter.gguf", layout="gguf")
        return
    convert(tmp_path / "adapter", tmp_path / "adapter.gguf", layout="gguf")
    convert(tmp_path / "model", tmp_path / "model.gguf", layout="gguf")
    ids = list(range(5, 45))
    theirs = LlamaCpp(tmp_path / "model.gguf", (tmp_path / "adapter.gguf",)).logprobs(ids, 384)
    ours = model(torch.tensor(ids))[-1].log_softmax(-1)
    assert max(abs(ours[index].item() - logprob) for index, logprob in theirs.items()) < 1e-4
