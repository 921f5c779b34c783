"""Adapters of others, as PEFT and its users save them: the same logits as PEFT, or refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from foreign_adapters import IDS, edit_config, edit_weights, peft_adapter, peft_logits, rename
from safetensors.torch import load_file, save_file

from lit_llama.conversion.gguf.adapter import write_adapter
from lit_llama.conversion.merged import Merged
from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.model.adapters.peft_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from lit_llama.model.adapters.place import Placed
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA
from lit_llama.train.methods.warm_start import read_start


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A base whose head is a matrix of its own."""
    folder = tmp_path_factory.mktemp("untied")
    model = tiny_model()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict("float32")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder)
    return folder


@pytest.fixture
def base(request: pytest.FixtureRequest, tiny_folder: Path) -> Path:
    """The tied base, or with indirect "untied" the other."""
    chosen: Path = request.getfixturevalue("untied") if getattr(request, "param", "") == "untied" else tiny_folder
    return chosen


def loaded(base: Path, folder: Path) -> tuple[torch.Tensor, Placed]:
    """Logits of base + adapter, the same of the merged weights, and what was said."""
    model = load_model(base)
    plain = model(IDS)
    placed = load_adapter(model, folder)
    found = model(IDS)
    merged = Merged(base, folder, "stored", None)
    state = {name: merged[name] for name in merged.specs}
    with torch.device("meta"):
        other = LLaMA(model.config)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    other.load_state_dict(state, assign=True)
    assert (other(IDS) - found).abs().max() <= 2e-4, "a merge says the same"
    assert (found - plain).abs().max() > 0.01 or "lora_alpha is 0" in " ".join(placed.remarks)
    return found, placed


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 2e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer of a pattern": {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "regular expression": {"target_modules": r".*\.1\.(self_attn\.(q|v)|mlp\.down)_proj"},
    "left out": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "left out by a pattern": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"},
    "Conv1D's order, which no linear layer has": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "biases where there are none": {"target_modules": ["q_proj"], "bias": "all"},
    "a negative scale": {"target_modules": ["q_proj"], "lora_alpha": -3},
    "rows of tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 80, 81]},
    "a copy that its head follows": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_has_the_logits_of_peft(tiny_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Catches a layer too many or too few, a scale by habit, rows that are added, and a head that stays behind."""
    wanted = peft_adapter(tiny_folder, tmp_path, **settings)
    found, placed = loaded(tiny_folder, tmp_path)
    assert close(found, wanted)
    config, _ = read_adapter_config(tmp_path)
    assert not isinstance(config.target_modules, str) or settings["target_modules"] == "all-linear"
    assert config.targets and placed.lora.targets


def test_rows_of_embedding_and_head_are_trained_apart(untied: Path, tmp_path: Path) -> None:
    """Catches ids of one taken for those of the other."""
    tokens = {"embed_tokens": [5, 80], "lm_head": [7]}
    wanted = peft_adapter(untied, tmp_path, target_modules=["q_proj"], trainable_token_indices=tokens)
    assert close(loaded(untied, tmp_path)[0], wanted)


def test_rows_are_saved_as_peft_reads_them(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches an adapter that loses its rows, or their ids, when it is saved again."""
    wanted = peft_adapter(tiny_folder, tmp_path / "theirs", target_modules=["q_proj"], trainable_token_indices=[5, 80])
    model = load_model(tiny_folder)
    placed = load_adapter(model, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_adapter(model, placed.lora, tmp_path / "ours", str(tiny_folder))
    assert close(peft_logits(tiny_folder, tmp_path / "ours"), wanted)


def test_a_scale_of_zero_leaves_the_base(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches an error for what PEFT accepts, and silence about an adapter that does nothing."""
    wanted = peft_adapter(tiny_folder, tmp_path, target_modules=["q_proj"], lora_alpha=0)
    found, placed = loaded(tiny_folder, tmp_path)
    assert close(found, wanted) and "lora_alpha is 0" in placed.remarks[-1]


def test_no_targets_are_those_of_the_tensors(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches settings that were written by hand and say nothing."""
    wanted = peft_adapter(tiny_folder, tmp_path, target_modules=["k_proj", "gate_proj"])
    edit_config(tmp_path, target_modules=None)
    assert close(loaded(tiny_folder, tmp_path)[0], wanted)
    assert read_adapter_config(tmp_path)[0].targets[0] == "model.layers.0.mlp.gate_proj"


def test_settings_that_ask_for_less_are_a_contradiction(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches tensors that PEFT would pass over and that were used here, and the other way round in silence."""
    peft_adapter(tiny_folder, tmp_path, target_modules=["q_proj", "v_proj"])
    edit_config(tmp_path, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"v_proj and 1 more, which adapter_config.json does not ask for"):
        load_adapter(load_model(tiny_folder), tmp_path)
    edit_config(tmp_path, target_modules=["q_proj", "v_proj", "o_proj", "query_key_value"])
    found, placed = loaded(tiny_folder, tmp_path)
    assert close(found, peft_logits(tiny_folder, tmp_path))
    assert "asks for model.layers.0.self_attn.o_proj and 1 more" in placed.remarks[0]


def test_torch_files_are_read_without_running_them(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches an adapter that "has to be downloaded again" although it is there."""
    wanted = peft_adapter(tiny_folder, tmp_path, target_modules=["q_proj", "v_proj"])
    torch.save(load_file(tmp_path / WEIGHTS_FILE), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS_FILE).unlink()
    assert close(loaded(tiny_folder, tmp_path)[0], wanted)

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"a": Hostile()}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        load_adapter(load_model(tiny_folder), tmp_path)
    assert not (tmp_path / "run").exists()


PEFT = "base_model.model."
NAMES: dict[str, Callable[[str], str]] = {
    "DataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile inside": lambda name: name.replace(PEFT, f"{PEFT}_orig_mod."),
    "wrapped twice": lambda name: f"{PEFT}{name}",
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix": lambda name: name.removeprefix(PEFT),
    "no model": lambda name: name.replace("model.layers", "layers").removeprefix(PEFT),
    "of AutoModel": lambda name: name.replace("model.layers", "layers"),
}


@pytest.mark.parametrize("new", NAMES.values(), ids=NAMES)
def test_prefixes_of_wrappers_are_taken_off_and_said(
    tiny_folder: Path, tmp_path: Path, new: Callable[[str], str]
) -> None:
    """Catches names that are refused although they mean one thing, or an adapter that is loaded in part."""
    wanted = peft_adapter(tiny_folder, tmp_path, target_modules=["q_proj", "down_proj"])
    rename(tmp_path, new)
    found, placed = loaded(tiny_folder, tmp_path)
    assert close(found, wanted) and "8 names are as a wrapper saves them" in placed.remarks[0]


def test_names_that_mean_two_things_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches the last of two tensors, taken in silence."""
    peft_adapter(tiny_folder, tmp_path, target_modules=["q_proj"])
    edit_weights(tmp_path, lambda t: t | {f"module.{name}": value + 1 for name, value in t.items()})
    with pytest.raises(CheckpointError, match=r"holds .*q_proj\.lora_[AB]\.weight twice: as .* and as "):
        load_adapter(load_model(tiny_folder), tmp_path)


def test_two_adapters_in_one_file_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches the second adapter of a training state, taken for the first."""
    peft_adapter(tiny_folder, tmp_path, target_modules=["q_proj"])

    def twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n.replace(".weight", f".{end}.weight"): v.clone() for n, v in tensors.items() for end in "ab"}

    edit_weights(tmp_path, twice)
    with pytest.raises(CheckpointError, match="twice"):
        load_adapter(load_model(tiny_folder), tmp_path)


@pytest.mark.parametrize("base", ["tied", "untied"], indirect=True)
@pytest.mark.parametrize("changed", [False, True])
def test_whole_matrices_that_nothing_names_are_those_of_the_base_or_copies(
    base: Path, tmp_path: Path, changed: bool
) -> None:
    """Catches embeddings that were trained on and are left out, equal ones that are refused, and a tied head that does
    not follow its embedding."""
    wanted = peft_adapter(base, tmp_path, {"save_embedding_layers": True}, target_modules=["q_proj"])
    if changed:
        edit_weights(tmp_path, lambda t: [value.mul_(1.3) for name, value in t.items() if ".layers." not in name])
        wanted = peft_logits(base, tmp_path)
    found, placed = loaded(base, tmp_path)
    assert close(found, wanted)
    said = " ".join(placed.remarks)
    assert ("taken as whole copies" in said) == changed and ("that of the base and left out" in said) == (not changed)
    assert placed.lora.saved == (["lm_head", "model.embed_tokens"] if changed else [])
    if changed:
        edit_weights(tmp_path, lambda t: t.pop(f"{PEFT}lm_head.weight"))
        assert close(loaded(base, tmp_path)[0], peft_logits(base, tmp_path))


def test_more_rows_than_the_base_name_the_way_out(tiny_folder: Path, untied: Path, tmp_path: Path) -> None:
    """Catches two shapes without a word of what to do."""
    grow = lambda t: {n: torch.cat([v, v[:1]]) if ".layers." not in n else v for n, v in t.items()}  # noqa: E731
    peft_adapter(untied, tmp_path, {"save_embedding_layers": True}, target_modules=["q_proj"])
    edit_weights(tmp_path, grow)
    with pytest.raises(CheckpointError, match=r"has 385 rows, .* 384: .*--resize_vocab 385, then .* --base_dir"):
        load_adapter(load_model(untied), tmp_path)
    peft_adapter(tiny_folder, tmp_path / "rows", target_modules=["q_proj"], trainable_token_indices=[5, 80])
    edit_config(tmp_path / "rows", trainable_token_indices=[5, 384])
    with pytest.raises(CheckpointError, match=r"has 384, the base has 384 rows: .*--resize_vocab"):
        load_adapter(load_model(tiny_folder), tmp_path / "rows")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable_token_indices": None}, "trainable_token_indices does not say which"),
        ({"trainable_token_indices": [5, 5]}, "names an id twice"),
        ({"trainable_token_indices": [-1, 5]}, "expected ids"),
        ({"trainable_token_indices": [5, 6, 7]}, "delta is (2, 64)"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": [3]}, "target_modules is [3]"),
        ({"exclude_modules": "["}, "no regular expression"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"peft_type": "IA3"}, "found peft_type 'IA3'"),
        ({"lora_alpha": "x"}, "alpha is 'x'"),
        ({"lora_alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(
    tiny_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Catches a traceback, and rows put where they were not trained."""
    peft_adapter(tiny_folder, tmp_path, target_modules=["q_proj"], trainable_token_indices=[5, 80])
    edit_config(tmp_path, **change)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(load_model(tiny_folder), tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_trained_bias_is_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a bias that is left out in silence."""
    peft_adapter(tiny_folder, tmp_path, target_modules=["q_proj"])
    edit_weights(tmp_path, lambda t: t.update({f"{PEFT}model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(CheckpointError, match="trained biases are not implemented"):
        load_adapter(load_model(tiny_folder), tmp_path)


def test_a_lost_configuration_is_named(tmp_path: Path) -> None:
    """Catches "finetune/lora.py writes adapter folders" for a folder that it wrote."""
    save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"without {CONFIG_FILE}.*bring it back from where"):
        read_adapter_config(tmp_path)
    state = tmp_path / "states" / "step-000010"
    state.mkdir(parents=True)
    (state / CONFIG_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"copy .*step-000010/adapter_config\.json"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("base", ["tied", "untied"], indirect=True)
def test_rows_of_new_tokens_below_an_adapted_embedding_are_the_adapters(base: Path, tmp_path: Path) -> None:
    """Catches "another base" for a base that was given rows as we advise, whose values are not those of the training,
    and such rows left as they are. Another base is still told."""
    peft_adapter(base, tmp_path, target_modules=["embed_tokens", "q_proj"])
    name = f"{PEFT}model.embed_tokens.base_layer.weight"
    edit_weights(tmp_path, lambda t: t[name].index_fill_(0, torch.tensor([5, 200]), 0.3))
    found, placed = loaded(base, tmp_path)
    assert close(found, peft_logits(base, tmp_path))
    assert "2 rows of model.embed_tokens.weight are taken from the adapter" in placed.remarks[0]
    model = load_model(base)
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="merge that adapter first"):
        save_adapter(model, load_adapter(model, tmp_path).lora, tmp_path / "again", str(base))
    with pytest.raises(CheckpointError, match="which no GGUF adapter can say"):
        write_adapter(tmp_path, tmp_path / "a.gguf", base_dir=base)
    with pytest.raises(CheckpointError, match=r"along that are not its base's: .*merge\.py"):
        read_start(tmp_path, base, LoRAConfig())
    edit_weights(tmp_path, lambda t: t[name].add_(0.1))
    with pytest.raises(IntegrityError, match="was trained on another base"):
        load_adapter(load_model(base), tmp_path)
