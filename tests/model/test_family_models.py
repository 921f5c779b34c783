"""Tiny models of every family against transformers: logits, packing, cached generation, adapters, files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_adapter, write_tokenizer
from paged_steps import Steps, made_by
from tiny_families import SHAPE, random_ids, write_model
from torch import Tensor

from lit_llama.conversion.merge import merge
from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.model.adapters.peft_folder import load_adapter
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA

TINY = SHAPE | {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}
SLIDING, FULL = "sliding_attention", "full_attention"
# Settings as transformers 5 spells them, and fields of ours which, changed, must change the logits visibly.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"model_type": "llama"}, {"rope_theta": 500.0}),
    "llama, every bias": (
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False},
    ),
    "llama, linear": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_scaling": None},
    ),
    "llama, dynamic": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_scaling": None},
    ),
    "llama, llama3": (
        {
            "model_type": "llama",
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {"rope_scaling": None},
    ),
    "mistral": ({"model_type": "mistral", "sliding_window": 7, "head_dim": 24}, {"sliding_window": 8}),
    "mistral, no window": ({"model_type": "mistral", "sliding_window": None, "head_dim": 24}, {"sliding_window": 64}),
    "qwen2": ({"model_type": "qwen2"}, {"attention_bias": False}),
    "qwen2, window": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"layer_types": (FULL, FULL, SLIDING)},
    ),
    "qwen2, layer types": (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
        {"layer_types": (FULL, SLIDING, SLIDING)},
    ),
    "qwen2, yarn": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {"rope_scaling": None},
    ),
    "qwen3": ({"model_type": "qwen3", "head_dim": 24}, {"use_qk_norm": False}),
    "qwen3, bias, window, tied": (
        {
            "model_type": "qwen3",
            "head_dim": 24,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
        {"attention_out_bias": False},
    ),
}
LENGTH = 150  # beyond every window, and beyond the first context


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, LLaMA]]:
    """Gives the folder, transformers' model and ours for a name of MODELS."""
    made: dict[str, tuple[Path, Any, LLaMA]] = {}

    def get(name: str) -> tuple[Path, Any, LLaMA]:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            theirs = write_model(folder, TINY | MODELS[name][0])
            made[name] = folder, theirs, load_model(folder)
        return made[name]

    return get


Models = Callable[[str], tuple[Path, Any, LLaMA]]


@pytest.mark.parametrize("length", [20, LENGTH])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(models: Models, name: str, length: int) -> None:
    """Catches a bias or norm left out or misplaced, a window off by one, frequencies that are not stretched."""
    _, theirs, model = models(name)
    ids = random_ids(length)
    with torch.inference_mode():
        found, wanted = model(ids), theirs(ids[None], use_cache=False).logits[0]
    assert found.std() > 0.3, "logits must differ visibly for the comparison to mean something"
    assert (found - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_setting_under_test_matters(models: Models, name: str) -> None:
    """Without it the logits are others; catches a tiny model on which a wrong implementation would not show."""
    _, _, model = models(name)
    changed = LLaMA(replace(model.config, **MODELS[name][1]))
    changed.load_state_dict(model.state_dict(), strict=False)
    ids = random_ids(LENGTH)
    assert (changed(ids) - model(ids)).abs().max() > 0.05


@pytest.mark.parametrize("name", MODELS)
def test_packed_samples_give_the_logits_of_each_alone(models: Models, name: str) -> None:
    """Catches windows and stretched frequencies that follow the row instead of the sample."""
    _, _, model = models(name)
    lengths = [5, 130, 70, 64, 65, 1]
    samples = random_ids(sum(lengths)).split(lengths)
    packed = model(torch.cat(samples), Packed(lengths))
    alone = torch.cat([model(sample) for sample in samples])
    torch.testing.assert_close(packed, alone, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in MODELS if "dynamic" not in name])
def test_a_cache_gives_the_logits_of_the_whole(models: Models, name: str) -> None:
    """Two sequences of unequal lengths, in pieces and token by token; catches a window that is counted from the wrong
    end of the cache, and a norm or bias that only one of the two paths has."""
    _, _, model = models(name)
    samples = [random_ids(LENGTH, seed) for seed in range(2)]
    cache, done = Steps(model.config, 2, LENGTH), [0, 0]
    found: list[list[Tensor]] = [[], []]
    for counts in ([50, 3], [20, 60], *[[1, 1]] * 50):
        new = [sample[start : start + count] for sample, start, count in zip(samples, done, counts, strict=True)]
        for row, logits in enumerate(model(torch.cat(new), cache.extend(counts)).split(counts)):
            found[row].append(logits)
        done = cache.lengths
    for sample, logits, length in zip(samples, found, done, strict=True):
        torch.testing.assert_close(torch.cat(logits), model(sample[:length]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_equal_those_of_transformers(models: Models, name: str) -> None:
    """Prompt, then token by token across the end of the first context, each with its own cache; catches keys of the
    dynamic type that are rotated again, and frequencies that follow the prompt instead of the sequence so far."""
    from transformers import DynamicCache

    _, theirs, model = models(name)
    ids = random_ids(80)
    cache, their_cache = Steps(model.config, 1, len(ids)), DynamicCache(config=theirs.config)
    with torch.inference_mode():
        for piece in (ids[:50], *ids[50:].split(1)):
            found = model(piece, cache.extend([len(piece)]))
            wanted = theirs(piece[None], past_key_values=their_cache, use_cache=True).logits[0]
            assert (found - wanted).abs().max() <= 1e-4, cache.lengths


@pytest.mark.parametrize("name", ["llama, dynamic", "mistral"])
def test_greedy_generation_equals_that_of_transformers(models: Models, name: str) -> None:
    """Catches a decoding loop that tells the layout another length than transformers' positions do."""
    _, theirs, model = models(name)
    prompt = random_ids(50)
    count = min(40, model.config.context_length - 50)
    config = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(prompt[None], attention_mask=torch.ones(1, 50), **config)[0, 50:].tolist()
    assert made_by(model, [prompt.tolist()], Sampling(max_new_tokens=count)) == [wanted]
    assert len(set(wanted)) > 5, "a model that repeats itself shows little"


def test_the_context_that_generation_allows_is_the_stretched_one(models: Models) -> None:
    """Catches a long-context model held to its first context, and a llama3 one, whose context is written stretched
    already, stretched once more."""
    for name, limit in {"llama": 64, "llama, linear": 256, "llama, llama3": 256, "qwen2, yarn": 256}.items():
        model = models(name)[2]
        assert len(made_by(model, [[1] * (limit - 1)], Sampling(max_new_tokens=1))[0]) == 1
        with pytest.raises(UserError, match=f"more than the {limit}"):
            made_by(model, [[1] * limit], Sampling(max_new_tokens=1))


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
V4_ROPES: dict[str, dict[str, Any]] = {
    "llama, linear": {"type": "linear", "factor": 4.0},
    "llama, dynamic": {"type": "dynamic", "factor": 4.0},
    "llama, llama3": {"rope_type": "llama3", "factor": 8.0} | LLAMA3,
    "qwen2, yarn": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64},
    "qwen3": {"type": "default"},
}


@pytest.mark.parametrize("name", V4_ROPES)
def test_the_older_spelling_gives_the_same_model(models: Models, name: str) -> None:
    """Catches a scaling that is found under one of its names only."""
    folder, _, model = models(name)
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    raw["torch_dtype"] = raw.pop("dtype")
    assert LLaMAConfig.from_dict(raw | {"rope_theta": 10000.0, "rope_scaling": V4_ROPES[name]}) == model.config
    if name != "qwen3":
        assert LLaMAConfig.from_dict(raw | {"rope_theta": 10000.0}) != model.config


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_written(models: Models, name: str, tmp_path: Path) -> None:
    """Our config.json beside the same weights; catches another architecture, or a setting lost on the way out."""
    from transformers import AutoModelForCausalLM

    folder, theirs, model = models(name)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict("float32")))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert LLaMAConfig.from_folder(tmp_path) == model.config
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    ids = random_ids(LENGTH)[None]
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama, every bias", "qwen2", "qwen3, bias, window, tied"])
def test_an_adapter_and_its_merge_equal_those_of_peft(models: Models, name: str, tmp_path: Path) -> None:
    """Catches a bias that is lost under an adapter or in a merge."""
    from peft import PeftModel

    base, _, model = tmp_path / "base", *models(name)[1:]
    theirs = write_model(base, TINY | MODELS[name][0])
    write_tokenizer(base)
    adapter = write_adapter(tmp_path / "adapter", base)
    ids = random_ids(60)
    with torch.inference_mode():
        plain, wanted = model(ids), PeftModel.from_pretrained(theirs, adapter)(ids[None], use_cache=False).logits[0]
    adapted = load_model(base)
    load_adapter(adapted, adapter)
    merge(adapter, tmp_path / "merged", dtype=None, precision="32-true")
    scale = wanted.abs().max()
    assert (plain - wanted).abs().max() > 0.05 * scale, "the adapter must do something"
    for found in (adapted.eval()(ids), load_model(tmp_path / "merged")(ids)):
        assert (found - wanted).abs().max() <= 2e-5 * scale


def test_a_missing_bias_is_an_error(models: Models, tmp_path: Path) -> None:
    """Catches random or zero biases where the file has none."""
    (tmp_path / "config.json").write_text(json.dumps(models("qwen2")[2].config.to_dict("float32")))
    (tmp_path / "model.safetensors").write_bytes((models("llama")[0] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"missing.*k_proj\.bias"):
        load_model(tmp_path)
