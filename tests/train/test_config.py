"""Reading config.json in every spelling, refusing what is not computed, and checking settings on construction."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny_config

from lit_llama.errors import CheckpointError, UserError
from lit_llama.model.config import LINEARS, LLaMAConfig, LoRAConfig
from lit_llama.train.config import TrainConfig

# As transformers 4 wrote TinyLlama's; 32 heads over 4.
V4: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "pretraining_tp": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}


def v5() -> dict[str, Any]:
    """The same in the spelling of transformers 5."""
    raw = {name: value for name, value in V4.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    return raw | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "dtype": "bfloat16"}


def test_both_spellings_of_transformers_read_the_same() -> None:
    """Catches theta left at its default because it stands in another field."""
    config = LLaMAConfig.from_dict(V4)
    assert config == LLaMAConfig.from_dict(v5())
    assert config.rope_theta == 500000.0
    assert (config.head_dim, config.num_key_value_heads, config.rms_norm_eps) == (64, 4, 1e-5)
    assert (config.max_position_embeddings, config.bos_token_id, config.eos_token_id) == (4096, 1, (2,))


def test_what_installed_transformers_writes_is_read(tmp_path: Path) -> None:
    """Catches a new spelling of a field that matters."""
    from transformers import LlamaConfig

    LlamaConfig(**V4 | {"head_dim": 48, "tie_word_embeddings": True}).save_pretrained(tmp_path)
    expected = LLaMAConfig.from_dict(V4 | {"head_dim": 48, "tie_word_embeddings": True})
    assert LLaMAConfig.from_folder(tmp_path) == expected


@pytest.mark.parametrize(
    ("raw", "ids"),
    [([128001, 128008, 128009], (128001, 128008, 128009)), (2, (2,)), (None, ()), (0, (0,)), ([7], (7,))],
)
def test_every_id_that_ends_a_text_is_kept(raw: Any, ids: tuple[int, ...]) -> None:
    """Catches a list of ends of which one is taken, and an id 0 taken for none."""
    config = LLaMAConfig.from_dict(V4 | {"eos_token_id": raw})
    assert config.eos_token_id == ids
    assert LLaMAConfig.from_dict(config.to_dict("bfloat16")) == config


def test_absent_and_null_fields_take_the_defaults_of_transformers() -> None:
    """Catches defaults of our own, such as another epsilon; old files leave these out."""
    from transformers import LlamaConfig

    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    raw = {name: V4[name] for name in (*needed, "num_attention_heads")}
    config, theirs = LLaMAConfig.from_dict(raw | {"num_key_value_heads": None, "head_dim": None}), LlamaConfig(**raw)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]


REFUSED: dict[str, dict[str, Any]] = {
    "model_type": {"model_type": "bert"},
    "hidden_act": {"hidden_act": "gelu"},
    "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "modeling.py"}},
    "use_sliding_window": {"use_sliding_window": True},
    "sliding_window": {"sliding_window": 4096},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "longrope": {"rope_scaling": {"type": "longrope", "factor": 4.0}},
    # Both spellings in one file: neither may be passed over.
    "contradicts": {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


@pytest.mark.parametrize(("named", "changes"), REFUSED.items(), ids=REFUSED)
def test_mathematics_that_is_not_computed_is_refused_by_name(named: str, changes: dict[str, Any]) -> None:
    """Catches fields that are ignored, which would give wrong logits in silence."""
    with pytest.raises(CheckpointError, match=named):
        LLaMAConfig.from_dict(V4 | changes)


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_missing_field_is_named(name: str) -> None:
    """Catches a guessed shape."""
    with pytest.raises(CheckpointError, match=rf"missing.*{name}"):
        LLaMAConfig.from_dict({key: value for key, value in V4.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_key_value_heads": -4}, "num_key_value_heads is -4"),
        ({"head_dim": 63}, "head_dim is 63"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"hidden_size": None}, "config.json"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "config.json"),
        ({"vocab_size": "32000"}, "config.json"),
        ({"rope_parameters": [1]}, "config.json"),
        ({"rope_theta": "much"}, "config.json"),
    ],
)
def test_impossible_values_are_errors_of_the_checkpoint(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    """Catches a traceback, or a model that is built and fails later."""
    (tmp_path / "config.json").write_text(json.dumps(V4 | changes))
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        LLaMAConfig.from_folder(tmp_path)
    assert named in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"<html></html>"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    """Catches a traceback from the parser."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLaMAConfig.from_folder(tmp_path)


def test_a_folder_without_configuration_says_how_to_make_one(tmp_path: Path) -> None:
    """Catches a bare FileNotFoundError."""
    with pytest.raises(CheckpointError, match=r"config\.json does not exist.*prepare/checkpoint\.py"):
        LLaMAConfig.from_folder(tmp_path)


def test_what_is_written_reads_back_equal_here_and_in_transformers(tmp_path: Path) -> None:
    """Catches a field that is written under a name nobody reads."""
    from transformers import AutoConfig

    config = tiny_config(rope_theta=12345.0, eos_token_id=(2, 5), bos_token_id=1, pad_token_id=0, head_dim=24)
    raw = json.loads(json.dumps(config.to_dict("bfloat16")))
    assert LLaMAConfig.from_dict(raw) == config
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == "llama" and theirs.rope_parameters["rope_theta"] == 12345.0
    assert str(theirs.dtype) == "torch.bfloat16"
    for name in ("hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "vocab_size", "pad_token_id"):
        assert getattr(theirs, name) == getattr(config, name), name
    assert theirs.eos_token_id == [2, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0},
        {"alpha": 0},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"target_modules": []},
        {"target_modules": ""},
        {"target_modules": "q_proj,,v_proj"},
        {"target_modules": ".*(q_proj"},
        {"r": 1.5},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": "8"}},
        {"rank_pattern": {"q_(proj": 8}},
        {"alpha_pattern": {"q_proj": -1.0}},
        {"modules_to_save": "lm_head,"},
        {"loraplus_lr_ratio": 0.0},
    ],
)
def test_lora_settings_are_checked(wrong: dict[str, Any]) -> None:
    """Catches a run with a useless adapter. The message names the flag."""
    with pytest.raises(UserError, match=f"--lora.{next(iter(wrong))}"):
        LoRAConfig(**wrong)


def test_lora_scale_and_targets() -> None:
    """Catches r / alpha for alpha / r, a set of layers that is not all-linear, and a bare name taken for all layers."""
    assert LoRAConfig(r=4, alpha=6).shape_of("q_proj") == (4, 1.5)
    assert LoRAConfig(r=4, alpha=6, use_rslora=True).shape_of("q_proj") == (4, 3.0)
    assert LoRAConfig().targets == list(LINEARS)
    others = {"qkv_proj", "gate_up_proj", "w1", "w2", "w3"}  # of families with joined projections, and of Mixtral
    others |= {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}  # of linear attention
    assert {*LINEARS} - others == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert LoRAConfig(target_modules=["q_proj", "lm_head"]).targets == ["q_proj", "lm_head"]
    assert LoRAConfig(target_modules="q_proj").targets == ["q_proj"]
    assert LoRAConfig(target_modules="q_proj, v_proj").targets == ["q_proj", "v_proj"]
    assert LoRAConfig(target_modules="all").targets == LoRAConfig(target_modules=["all"]).targets == list(LINEARS)
    assert LoRAConfig(target_modules=[".*_proj"]).pattern == ".*_proj"


def test_patterns_choose_rank_and_scale() -> None:
    """Catches the last match taken for the first, a name matched in its middle, and a rank without its scale."""
    lora = LoRAConfig(
        r=8,
        alpha=16,
        rank_pattern={"layers.1.mlp.up_proj": 4, "up_proj": 2, r".*\.0\.self_attn\.[qv]_proj": 16},
        alpha_pattern={"up_proj": 6},
    )
    wanted = {
        "model.layers.1.mlp.up_proj": (4, 1.5),
        "model.layers.0.mlp.up_proj": (2, 3.0),
        "model.layers.0.self_attn.v_proj": (16, 1.0),
        "model.layers.1.self_attn.v_proj": (8, 2.0),
        "model.layers.1.mlp.group_proj": (8, 2.0),
        "model.layers.1.mlp.up_proj.more": (8, 2.0),
    }
    assert {name: lora.shape_of(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": -0.5},
        {"epochs": float("inf")},
        {"epochs": float("nan")},
        {"max_steps": 0},
        {"batch_size": 0},
        {"micro_batch_tokens": 0},
        {"eval_interval": 0},
        {"learning_rate": 0.0},
        {"learning_rate": 3.0},
        {"learning_rate": float("nan")},
        {"warmup_ratio": 1.0},
        {"warmup_ratio": -0.1},
        {"weight_decay": -0.1},
        {"max_grad_norm": -1.0},
    ],
)
def test_training_settings_are_checked(wrong: dict[str, Any]) -> None:
    """Catches a run that divides by zero or never learns. The message names the flag."""
    with pytest.raises(UserError, match=f"--train.{next(iter(wrong))}"):
        TrainConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_lr_ratio": 1.0},
        {"min_lr_ratio": 0.1, "schedule": "constant"},
        {"warmup_ratio": 0.1, "warmup_steps": 10},
        {"warmup_steps": -1},
        {"decay_ratio": 0.1},
        {"decay_ratio": 0.0, "schedule": "wsd"},
        {"warmup_ratio": 0.6, "decay_ratio": 0.5, "schedule": "wsd"},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": 0.0},
        {"weight_decay": float("nan")},
        {"max_grad_norm": float("inf")},
        {"patience": 0},
        {"min_delta": -0.1, "patience": 2},
        {"min_delta": 0.1},
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong: dict[str, Any]) -> None:
    """Catches a setting out of its range, and one that would be accepted and read by nothing."""
    with pytest.raises(UserError, match=f"--train.{next(iter(wrong))} "):
        TrainConfig(**wrong)


@pytest.mark.parametrize(
    ("rows", "settings", "steps"),
    [
        (64, {"epochs": 2, "batch_size": 16}, 8),
        (65, {"epochs": 2, "batch_size": 16}, 10),
        (3, {"epochs": 1, "batch_size": 16}, 1),
        (64, {"epochs": 2, "batch_size": 16, "max_steps": 5}, 5),
        (64, {"epochs": 2, "batch_size": 16, "max_steps": 50}, 8),
        (64, {"epochs": 0.5, "batch_size": 16}, 2),
        (64, {"epochs": 3.0, "batch_size": 16}, 12),
        (64, {"epochs": 0.01, "batch_size": 16}, 1),
        (30, {"epochs": 0.1, "batch_size": 1}, 3),  # the product of the floats is a little more than 3
    ],
)
def test_number_of_steps(rows: int, settings: dict[str, int], steps: int) -> None:
    """Catches a last, smaller batch that is dropped, and max_steps that makes a run longer."""
    assert TrainConfig(**settings).steps(rows) == steps


def test_settings_cannot_be_changed() -> None:
    """Catches a default instance, shared by all calls, that somebody edits."""
    for config in (LoRAConfig(), TrainConfig(), tiny_config()):
        with pytest.raises(AttributeError):
            config.r = 1


def test_configurations_import_no_torch() -> None:
    """Catches an import that makes every --help take seconds."""
    code = (
        "import sys, lit_llama.model.config, lit_llama.train.config;"
        "print(sorted({'torch', 'numpy', 'lightning_fabric', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rms_norm_eps", value) for value in (-1, 1, True, "1e-6", float("nan"), float("inf"), 10**400)),
        *(("rope_theta", value) for value in (True, 0, -1.0, "10000", float("inf"), [1])),
        *((name, value) for name in ("hidden_size", "vocab_size") for value in (0, -64, 64.0, True, "64", 2**31)),
        *(("num_attention_heads", value) for value in (0, -4, 4.0, None, [4])),
        *(("num_key_value_heads", value) for value in (3, -2, 2.5, True, "2")),
        *(("eos_token_id", value) for value in ("</s>", [1, "x"], 1.5, True, 2**40)),
        *((name, value) for name in ("bos_token_id", "pad_token_id") for value in ("<s>", 1.5, False)),
        *(("rope_scaling", {"rope_type": "linear", "factor": value}) for value in (True, "2", float("inf"), 10**400)),
    ],
)
def test_nonsense_is_refused_by_its_name(tmp_path: Path, field: str, value: object) -> None:
    """Catches a model that computes with true as 1, or with a negative epsilon, and ends of a text that never come."""
    path = tmp_path / "config.json"
    raw = tiny_config().to_dict("float32")
    path.write_text(json.dumps(raw))
    assert LLaMAConfig.from_folder(tmp_path) == tiny_config()
    path.write_text(json.dumps(raw | {field: value}))
    with pytest.raises(CheckpointError) as caught:
        LLaMAConfig.from_folder(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert field.removesuffix("_scaling") in str(caught.value) or "factor" in str(caught.value)
