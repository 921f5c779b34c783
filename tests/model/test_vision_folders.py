"""Folders of models that see images, too, of which the text model is read, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tokenizer
from safetensors.torch import load_file, save_file
from tiny_families import SHAPE, random_ids

from lit_llama.conversion.frame import Frame
from lit_llama.conversion.merge import merge
from lit_llama.conversion.native import open_folder
from lit_llama.conversion.source import write_folder
from lit_llama.errors import CheckpointError
from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.adapters.peft_folder import load_adapter, save_adapter
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.files.weights import Weights
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.vocabulary import special_ids

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = SHAPE | {"head_dim": 8, "pad_token_id": 0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 7},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
    },
    "mistral3": {
        "model_type": "mistral3",
        "tie_word_embeddings": False,
        "text_config": TEXT
        | {"model_type": "ministral3", "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0}}
        | {"tie_word_embeddings": False},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
    },
    "mistral3, older": {
        "model_type": "mistral3",
        "tie_word_embeddings": False,
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "tie_word_embeddings": True,
        "text_config": TEXT
        | {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "tie_word_embeddings": True},
        "vision_config": {"model_type": "qwen3_5_vision", "depth": 1, "hidden_size": 16, "intermediate_size": 24}
        | {"num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16},
    },
}
MODELS["mistral3"]["text_config"]["rope_parameters"]["mscale_all_dim"] = 1.0
WANTED = {"gemma3": "gemma3_text", "mistral3": "ministral3", "mistral3, older": "mistral", "qwen3_5": "qwen3_5_text"}


def write(folder: Path, name: str) -> Any:
    """The folder of a random model that transformers makes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(**MODELS[name], attn_implementation="eager")
    theirs = AutoModelForImageTextToText.from_config(config).to(torch.float32).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    theirs.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return theirs


@pytest.mark.parametrize("name", MODELS)
def test_the_text_model_is_read_and_written_alone(tmp_path: Path, name: str) -> None:
    """Converted, framed by a run, and merged with an adapter; catches a folder whose config.json asks for a vision
    tower that is not there, and tensors that are left out in silence."""
    from transformers import AutoModelForCausalLM

    theirs, ids = write(tmp_path / "seeing", name), random_ids(40)
    stored = load_file(tmp_path / "seeing" / "model.safetensors")
    seeing = [tensor for tensor in stored if "language_model." not in tensor and tensor != "lm_head.weight"]
    (remark,) = Weights(tmp_path / "seeing").remarks
    assert f"{len(seeing)} tensors of vision tower and projector" in remark and len(seeing) > 5
    model = load_model(tmp_path / "seeing")
    assert model.config.model_type == WANTED[name] and model.config.tie_word_embeddings == ("mistral3" not in name)
    write_folder(open_folder(tmp_path / "seeing"), tmp_path / "text")
    frame = Frame.read(tmp_path / "seeing", Tokenizer.from_path(tmp_path / "seeing"))
    (tmp_path / "framed").mkdir()
    frame.write(tmp_path / "framed", model.state_dict(), None, "{{ messages }}")
    with torch.inference_mode():
        wanted = theirs(input_ids=ids[None], use_cache=False).logits[0]
        assert wanted.std() > 0.1 and (model(ids) - wanted).abs().max() <= 1e-4
        for folder in (tmp_path / "text", tmp_path / "framed"):
            assert not (folder / "preprocessor_config.json").exists()
            again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
            assert again.config.model_type == WANTED[name]
            assert (again(ids[None]).logits[0] - wanted).abs().max() <= 1e-5
    lora = LoRAConfig(r=2)
    apply_lora(model, lora)
    for _, module in adapters(model):
        for part in module.parts().values():
            torch.nn.init.normal_(part, std=0.2)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, lora, tmp_path / "adapter", str(tmp_path / "seeing"))
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=None, precision="32-true")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    with torch.inference_mode():
        assert (merged(ids[None]).logits[0] - model(ids)).abs().max() <= 1e-4


def test_names_of_other_releases_and_of_peft_mean_the_text_model(tmp_path: Path) -> None:
    """transformers 4 from 4.52 on holds the text model in model.language_model; PEFT names its modules so."""
    write(tmp_path, "mistral3")
    ids, model = random_ids(20), load_model(tmp_path)
    wanted = model(ids)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {
        "model." + name.replace("language_model.model.", "language_model."): value for name, value in stored.items()
    }
    renamed["lm_head.weight"] = renamed.pop("model.language_model.lm_head.weight")
    save_file(renamed, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_model(tmp_path)(ids), wanted)
    lora = LoRAConfig(r=2, target_modules=["q_proj"])
    apply_lora(model, lora)
    for _, module in adapters(model):
        for part in module.parts().values():
            torch.nn.init.normal_(part, std=0.2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, lora, adapter, str(tmp_path))
    named = load_file(adapter / "adapter_model.safetensors")
    theirs = {name.replace("model.model.layers", "model.model.language_model.layers"): t for name, t in named.items()}
    assert theirs.keys().isdisjoint(named)
    save_file(theirs, adapter / "adapter_model.safetensors")
    again = load_model(tmp_path)
    load_adapter(again, adapter)
    torch.testing.assert_close(again.eval()(ids), model.eval()(ids))


def test_ends_of_a_text_are_read_from_the_text_model(tmp_path: Path) -> None:
    """Catches ids that are passed over where they stand: the one of a letter is judged, and left out aloud."""
    write_tokenizer(tmp_path)
    text = {"vocab_size": 384, "eos_token_id": [2, 7]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": text}))
    found = special_ids(tmp_path, Tokenizer.from_path(tmp_path))
    assert found.ends == {2} and "eos_token_id 7" in found.remarks[0]


def test_published_configurations_say_little() -> None:
    """Gemma 3 4B names neither its heads nor its vocabulary; the ends of a text stand beside text_config."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "model_type": "gemma3"}
    config = LLaMAConfig.from_dict(raw | {"text_config": text, "vision_config": {"hidden_size": 1152}})
    assert (config.num_attention_heads, config.vocab_size, config.head_dim) == (8, 262208, 256)
    assert config.eos_token_id == (1, 106) and config.tie_word_embeddings
    assert json.loads(json.dumps(config.to_dict("bfloat16")))["model_type"] == "gemma3_text"
    with pytest.raises(CheckpointError, match="text_config is None"):
        LLaMAConfig.from_dict(raw)
    with pytest.raises(CheckpointError, match=r"model_type is 'llama4_text', expected one of llama, .*mistral3"):
        LLaMAConfig.from_dict(raw | {"text_config": {"model_type": "llama4_text"}})
