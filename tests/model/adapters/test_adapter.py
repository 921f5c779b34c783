"""Adapter folders: the same to us and to PEFT, and refused by name where they are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.adapters.peft_folder import (
    CONFIG_FILE,
    META_FILE,
    WEIGHTS_FILE,
    base_of,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import fingerprint, load_model
from lit_llama.model.llama import LLaMA

LORA = LoRAConfig(r=4, alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
IDS = torch.arange(3, 40)


def save_random(base: Path, folder: Path, lora: LoRAConfig = LORA) -> LLaMA:
    """Save an adapter with random weights; gives the model that carries it."""
    model = load_model(base)
    apply_lora(model, lora)
    torch.manual_seed(0)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    folder.mkdir(exist_ok=True)
    save_adapter(model, lora, folder, str(base))
    return model


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A good adapter folder to be damaged."""
    save_random(tiny_folder, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["model.layers.1.mlp.up_proj"], r".*\.[qk]_proj"]
)
def test_peft_loads_our_adapter_with_the_same_logits(tiny_folder: Path, tmp_path: Path, targets: Any) -> None:
    """Catches names, scale or settings that PEFT understands otherwise."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = save_random(tiny_folder, tmp_path, LoRAConfig(r=4, alpha=6, target_modules=targets))
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    plain = base(IDS[None]).logits[0]
    twin = PeftModel.from_pretrained(base, tmp_path).eval()
    wanted, found = twin(IDS[None]).logits[0], model(IDS)
    assert (wanted - plain).abs().max() > 0.05, "PEFT must see the adapter at all"
    assert (found - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("targets", ["all-linear", ["o_proj", "gate_proj"]])
@pytest.mark.parametrize("rank", [1, 6])
def test_an_adapter_of_peft_loads_here_with_the_same_logits(
    tiny_folder: Path, tmp_path: Path, targets: Any, rank: int
) -> None:
    """Catches a neutral setting that is refused, a scale that is 2 by habit, a forgotten layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1)
    twin = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config).eval()
    for name, parameter in twin.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    twin.save_pretrained(tmp_path)
    model = load_model(tiny_folder)
    plain = model(IDS)
    load_adapter(model, tmp_path)
    found, wanted = model(IDS), twin(IDS[None]).logits[0]
    assert (found - plain).abs().max() > 0.05
    assert (found - wanted).abs().max() <= 1e-4
    lora, named = read_adapter_config(tmp_path)
    assert (lora.r, lora.alpha, named) == (rank, 5, str(tiny_folder))


def test_what_is_saved_loads_back_bit_for_bit(tiny_folder: Path, folder: Path) -> None:
    """Catches rounding on the way, and A and B exchanged."""
    saved, loaded = save_random(tiny_folder, folder), load_model(tiny_folder)
    load_adapter(loaded, folder)
    assert torch.equal(loaded(IDS), saved(IDS))
    state = saved.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.state_dict().keys() == state.keys()


# Settings that PEFT itself writes when a variant is chosen.
VARIANTS: dict[str, Any] = {
    "lora_bias": True,
    "target_parameters": ["experts.gate"],
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "layer_replication": [[0, 2]],
    "arrow_config": {"a": 1},
    "alora_invocation_tokens": [1],
    "use_bdlora": {"a": 1},
    "monteclora_config": {"a": 1},
    "kasa_config": {"a": 1},
    "init_lora_weights": "pissa",
}


@pytest.mark.parametrize(("key", "value"), VARIANTS.items(), ids=VARIANTS)
def test_a_variant_of_lora_that_is_not_computed_is_refused(folder: Path, key: str, value: Any) -> None:
    """Catches a setting that is ignored, which would give other outputs than PEFT in silence."""
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=f"{CONFIG_FILE}: {key} is"):
        read_adapter_config(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_a_way_to_start_that_leaves_the_base_alone_is_accepted(folder: Path, init: Any) -> None:
    """Catches ordinary adapters refused for how they were initialised."""
    edit_config(folder, init_lora_weights=init)
    assert read_adapter_config(folder)[0].r == 4


def test_every_setting_of_the_installed_peft_is_known() -> None:
    """Catches a variant that a new PEFT brings: it must be refused above or be listed here as one that changes no
    output."""
    from peft import LoraConfig

    harmless = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    harmless |= {"inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "runtime_config"}
    harmless |= {
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
    }  # computed: test_variants
    # What the tensors say: test_foreign_adapters.
    harmless |= {"bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "exclude_modules"}
    harmless |= {"trainable_token_indices", "ensure_weight_tying"}
    harmless |= {"megatron_core", "qalora_group_size"}  # of variants refused by another key
    harmless |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"}  # start and training
    assert set(LoraConfig.__dataclass_fields__) == harmless | VARIANTS.keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type LORA"),
        ({"r": 0}, "r is 0"),
        ({"r": "eight"}, CONFIG_FILE),
        ({"lora_alpha": None}, CONFIG_FILE),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
        ({"rank_pattern": ["q_proj"]}, CONFIG_FILE),
        ({"use_dora": "yes"}, "use_dora"),
    ],
)
def test_settings_that_make_no_sense_are_errors(folder: Path, changes: dict[str, Any], named: str) -> None:
    """Catches a traceback, or another kind of adapter taken for LoRA."""
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=CONFIG_FILE) as caught:
        read_adapter_config(folder)
    assert named in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}"])
def test_settings_that_are_no_json_are_errors(folder: Path, content: bytes) -> None:
    """Catches a traceback from the parser."""
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=CONFIG_FILE):
        read_adapter_config(folder)


def test_a_missing_key_is_named(folder: Path) -> None:
    """Catches a guessed scale."""
    raw = json.loads((folder / CONFIG_FILE).read_text())
    del raw["lora_alpha"]
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="lora_alpha"):
        read_adapter_config(folder)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "empty": (lambda tensors: tensors.clear(), "is empty"),
    "all B zero": (
        lambda tensors: [value.zero_() for name, value in tensors.items() if "lora_B" in name],
        "holds only zeros",
    ),
    "not a number": (lambda tensors: tensors[f"{Q_PROJ}.lora_A.weight"].view(-1)[3:4].fill_(torch.nan), "not finite"),
    "infinite": (lambda tensors: tensors[f"{Q_PROJ}.lora_B.weight"].view(-1)[3:4].fill_(torch.inf), "not finite"),
    "other rank": (
        lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.weight": torch.ones(5, 64)}),
        "q_proj.lora_A is (5, 64)",
    ),
    "transposed": (
        lambda tensors: tensors.update({f"{Q_PROJ}.lora_B.weight": torch.ones(4, 64)}),
        "q_proj.lora_B is (4, 64)",
    ),
    "B missing": (lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"), "1 missing"),
    "DoRA": (
        lambda tensors: tensors.update({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(64)}),
        "1 unknown",
    ),
    "layer that is not there": (
        lambda tensors: tensors.update({Q_PROJ.replace("0", "7") + ".lora_A.weight": torch.ones(4, 64)}),
        "adapts model.layers.7.self_attn.q_proj",
    ),
    "embedding": (
        lambda tensors: tensors.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 384)}),
        "adapts model.embed_tokens, which adapter_config.json does not ask for",
    ),
    "saved whole": (
        lambda tensors: tensors.update({"base_model.model.model.other.weight": torch.ones(384, 64)}),
        "model.other whole, which is no module of the base model",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_weights_that_do_not_fit_are_errors(
    tiny_folder: Path, folder: Path, damage: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    """Catches an adapter that loads in part, does nothing, or poisons the model."""
    edit_weights(folder, damage)
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE) as caught:
        load_adapter(load_model(tiny_folder), folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_cut_file_is_an_error(tiny_folder: Path, folder: Path, size: int) -> None:
    """Catches a traceback of the package."""
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cannot be read|is empty"):
        load_adapter(load_model(tiny_folder), folder)


def test_missing_files_are_named(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    """Catches a bare FileNotFoundError."""
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        load_adapter(load_model(tiny_folder), folder)
    with pytest.raises(CheckpointError, match=rf"{CONFIG_FILE} does not exist; finetune/lora\.py"):
        read_adapter_config(tmp_path)


def test_values_that_are_not_finite_are_not_saved(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a diverged run that leaves a folder behind that looks whole."""
    model = load_model(tiny_folder)
    apply_lora(model, LORA)
    lora_parameters(model)[3].data[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        save_adapter(model, LORA, tmp_path, str(tiny_folder))
    assert not list(tmp_path.iterdir())


def test_base_of_finds_the_base(tiny_folder: Path, folder: Path) -> None:
    """Catches a base that is refused though it is the right one, with and without our meta.json."""
    assert base_of(folder) == tiny_folder
    (folder / META_FILE).write_text(json.dumps({"base": {"fingerprint": fingerprint(tiny_folder)}}))
    assert base_of(folder) == tiny_folder


def test_a_missing_base_is_named(folder: Path) -> None:
    """Catches a traceback, or a download in secret."""
    edit_config(folder, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    with pytest.raises(CheckpointError, match="'meta-llama/Llama-2-7b-hf', which is no checkpoint folder here"):
        base_of(folder)
    edit_config(folder, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        base_of(folder)


def test_another_base_is_an_integrity_error(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    """Catches an adapter put on other weights of the same shape, which would run and talk nonsense."""
    (folder / META_FILE).write_text(json.dumps({"base": {"fingerprint": fingerprint(tiny_folder)}}))
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    edit_config(folder, base_model_name_or_path=str(other))
    assert base_of(folder) == other, "a copy of the base is the base"
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="another fingerprint"):
        base_of(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"base": 3}'])
def test_a_broken_meta_file_is_an_error(folder: Path, content: str) -> None:
    """Catches a traceback, and a check that is skipped because its file is damaged."""
    (folder / META_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=META_FILE):
        base_of(folder)
