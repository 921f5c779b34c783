"""What is given for a checkpoint folder and is none: what it is, and the command that helps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lit_llama
from lit_llama.conversion import convert, convert_adapter
from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.llm import load
from lit_llama.generate.questions import choose_questions
from lit_llama.model.adapters.peft_folder import read_adapter_config
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.train.config import RunConfig
from lit_llama.train.methods.method import LoRA
from lit_llama.train.start import begin

Put = Callable[[Path], Any]
Door = Callable[[dict[str, Path], Path], object]


def train(given: dict[str, Path], out: Path) -> object:
    return begin(LoRA(LoRAConfig()), RunConfig(out_dir=out, **{"checkpoint_dir": None, **given}))


def merge_to(given: dict[str, Path], out: Path) -> object:
    return lit_llama.merge(**given, destination_path=out)


def evaluate(given: dict[str, Path], out: Path) -> object:
    return lit_llama.evaluate(**given, out_dir=out)


def ask(given: dict[str, Path], out: Path) -> object:
    return choose_questions("", "", **given, input_file=None, output_file=out, limit=None)


def files(*names: str) -> Put:
    """Folders and files of these names, each with an empty object in it."""

    def write(home: Path) -> None:
        for name in names:
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")

    return write


PLACES: dict[str, tuple[str, Put, str]] = {
    "GGUF": ("m.gguf", files("m.gguf"), r"is a GGUF file: .*--source \S*m\.gguf --destination_path checkpoints/m$"),
    "folder of GGUF": ("g", files("g/a.gguf", "g/b.gguf"), r"holds GGUF files: .*--source \S*g/a\.gguf --dest"),
    "weight file": (
        "m/model.safetensors",
        files("m/config.json", "m/model.safetensors"),
        r"is a file of the folder \S*/m: give the folder",
    ),
    "torch file": ("lit.pth", files("lit.pth"), r"is a torch file: .*prepare/checkpoint\.py --source \S*lit\.pth"),
    "unfinished run": (
        "out",
        files("out/run.yaml", "out/states/step-000004/adapter_config.json"),
        r"has not ended: .*finetune/lora\.py --config \S*out/run\.yaml --resume auto, or give .*states/step-000004",
    ),
    "unfinished full run": (
        "out",
        files("out/run.yaml", "out/states/step-000004/config.json"),
        r"finetune/full\.py --config \S*out/run\.yaml --resume auto",
    ),
    "lost settings": (
        "out",
        files("out/run.yaml", "out/states/x", "out/adapter_model.bin"),
        r"holds adapter_model\.bin without adapter_config\.json",
    ),
    "Meta": ("m", files("m/consolidated.00.pth", "m/params.json"), r"convert it with .*checkpoint\.py --source \S*/m "),
    "Mistral": ("m", files("m/consolidated.safetensors", "m/params.json"), r"Mistral's own layout .*--repo_id OWNER/m"),
    "mlx": (
        "m",
        files("m/adapters.safetensors", "m/adapter_config.json"),
        r"an adapter of mlx: .*--base_dir BASE --destination_path out/lora/m",
    ),
    "torchtune": ("t", files("t/hf_model_0001_0.pt"), r"holds hf_model_0001_0\.pt of torchtune"),
    "data": (
        "d",
        files("d/dataset_dict.json"),
        r"is a data folder and no model: train .*finetune/lora\.py --data_dir \S*d$",
    ),
    "Trainer": (
        "t",
        files("t/checkpoint-90/config.json", "t/checkpoint-100/config.json", "t/trainer_state.json"),
        r"give \S*t/checkpoint-100$",
    ),
    "anything else": ("e", files("e/x"), r"a checkpoint folder has config\.json, \*\.safetensors and tokenizer files"),
    "nothing": ("n/o/where", files(), "does not exist: there is no folder"),
}


@pytest.mark.parametrize(("given", "put", "message"), PLACES.values(), ids=PLACES)
def test_each_wrong_place_has_its_own_way_out(tmp_path: Path, given: str, put: Put, message: str) -> None:
    """ "X.gguf/config.json does not exist; make one with prepare/checkpoint.py" for all of them."""
    put(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / given)


SWAPS: dict[str, tuple[Door, dict[str, str], str]] = {
    "data and model": (
        train,
        {"checkpoint_dir": "data", "data_dir": "model"},
        "--checkpoint_dir {data} is a data folder, expected a model (config.json); --data_dir {model} is a model, "
        "expected a data folder (dataset_dict.json); they are swapped: give --data_dir {data} --checkpoint_dir {model}",
    ),
    "three in a circle": (
        train,
        {"checkpoint_dir": "adapter", "data_dir": "model", "adapter_dir": "data"},
        "they are swapped: give --adapter_dir {adapter} --data_dir {data} --checkpoint_dir {model}",
    ),
    "a base for an adapter to go on with": (
        train,
        {"adapter_dir": "model", "data_dir": "data"},
        "--adapter_dir {model} is a model, expected an adapter (adapter_config.json); give it as --checkpoint_dir "
        "{model}",
    ),
    "a model for data": (
        train,
        {"checkpoint_dir": "model", "data_dir": "model"},
        "--data_dir {model} is a model, expected a data folder (dataset_dict.json); give a data folder such as "
        "prepare/records.py makes as --data_dir",
    ),
    "a base to be merged": (
        merge_to,
        {"adapter_dir": "model"},
        "--adapter_dir {model} is a model, expected an adapter (adapter_config.json); give it as --base_dir {model}, "
        "and an adapter such as finetune/lora.py makes as --adapter_dir",
    ),
    "an adapter and its base": (
        merge_to,
        {"adapter_dir": "model", "base_dir": "adapter"},
        "they are swapped: give --base_dir {model} --adapter_dir {adapter}",
    ),
    "models and data to evaluate on": (
        evaluate,
        {"checkpoint_dir": "data", "data_dir": "adapter"},
        "they are swapped: give --data_dir {data} --checkpoint_dir {adapter}",
    ),
    "a question to data": (
        ask,
        {"checkpoint_dir": "data", "data_dir": "model"},
        "they are swapped: give --data_dir {data} --checkpoint_dir {model}",
    ),
}


@pytest.mark.parametrize(("door", "given", "said"), SWAPS.values(), ids=SWAPS)
def test_folders_in_each_others_place_are_all_named(
    tmp_path: Path, door: Door, given: dict[str, str], said: str
) -> None:
    """Catches an error that tells of one folder alone, and sends it to where the other one already is."""
    files("model/config.json", "adapter/adapter_config.json", "data/dataset_dict.json", "data/meta.json")(tmp_path)
    paths = {name: tmp_path / name for name in ("model", "adapter", "data")}
    with pytest.raises(UserError) as caught:
        door({name: paths[folder] for name, folder in given.items()}, tmp_path / "out")
    assert str(caught.value).endswith(said.format(**paths))


@pytest.mark.parametrize("name", ["checkpoints/mine", "out/lora", "here/mine", "a/b/c", "mine"])
def test_a_path_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a mistyped folder taken for a repository that nobody has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(CheckpointError, match=f"there is no folder {name}"):
        load(name)


def test_a_name_on_the_hub_is_told_by_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches prepare/checkpoint.py, or "does not exist", for the name of a repository."""
    monkeypatch.chdir(tmp_path)
    name = Path("HuggingFaceTB/SmolLM2-135M")
    wanted = r"python prepare/download\.py --repo_id HuggingFaceTB/SmolLM2-135M"
    with pytest.raises(CheckpointError, match=f"{wanted}, then give checkpoints/SmolLM2-135M"):
        load(name)
    with pytest.raises(CheckpointError, match=wanted):
        convert(name, tmp_path / "made")
    with pytest.raises(CheckpointError, match=wanted):
        read_adapter_config(name)


QUANTISED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "with bitsandbytes in 4 bits"),
    "old bitsandbytes": ({"load_in_8bit": True}, "with bitsandbytes in 8 bits"),
    "GPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "with GPTQ in 4 bits"),
    "AWQ": ({"quant_method": "awq", "bits": 4}, "with AWQ in 4 bits"),
    "unknown": ({"quant_method": "hqq"}, "with hqq,"),
}


@pytest.mark.parametrize(("settings", "said"), QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_model_names_its_method_and_the_way_out(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    """Catches a dictionary on the screen, and "only None is implemented"."""
    folder = tmp_path / "Llama-3-8B-bnb-4bit"
    folder.mkdir()
    raw = {"model_type": "llama", "quantization_config": settings, "_name_or_path": "owner/Llama-3-8B-bnb-4bit"}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        LLaMAConfig.from_folder(folder)
    for part in (said, "16-bit model", "--repo_id owner/Llama-3-8B)"):
        assert part in str(caught.value)
    assert "{" not in str(caught.value)


FILES: dict[str, tuple[list[str], str]] = {
    "LLaMA-Adapter": (["transformer.h.2.attn.adapter_wte.weight", "transformer.h.2.attn.gating_factor"], "no LoRA"),
    "GPTQ": (["transformer.h.0.attn.c_attn.quant_weight", "transformer.h.0.attn.c_attn.scales"], "GPTQ"),
    "LoRA of litgpt": (["transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"], "litgpt merge_lora"),
    "torchtune": (
        ["tok_embeddings.weight", "layers.0.attn.q_proj.weight", "layers.0.sa_norm.scale"],
        "torchtune's own",
    ),
    "LoRA of torchtune": (["layers.0.attn.q_proj.lora_a.weight"], "LoRA of torchtune"),
    "Meta": (["tok_embeddings.weight", "layers.0.attention.wq.weight"], "part of Meta's layout"),
    "PEFT": (["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], r"call it adapter_model\.bin"),
    "Hugging Face": (["model.layers.0.self_attn.q_proj.weight"], r"call it pytorch_model\.bin"),
}


@pytest.mark.parametrize(("names", "message"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_torch_file_of_another_program_is_named(
    tmp_path: Path, names: list[str], message: str, adapter: bool
) -> None:
    """Catches "holds no weights of lit-llama" for files whose names say what they are."""
    path = tmp_path / "file.pth"
    torch.save({name: torch.ones(2, 2) for name in names}, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        if adapter:
            convert_adapter(path, tmp_path, tmp_path / "made", 16)
        else:
            convert(path, tmp_path / "made")
    assert str(path) in str(caught.value)
