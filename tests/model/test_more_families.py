"""Families that differ from LLaMA in more than biases, norms of heads and windows, against transformers and PEFT."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tokenizer
from paged_steps import Steps, made_by
from tiny_families import MODELS, SHAPE, random_ids, write_model
from torch import Tensor

from lit_llama.conversion.merge import merge
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.plan import plan_generation, table
from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.adapters.peft_folder import load_adapter, save_adapter
from lit_llama.model.assemble import Assembly, assemble
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.kernels.decode import packs
from lit_llama.model.llama import LLaMA
from lit_llama.train.loss import TokenLoss

LENGTH = 150  # beyond every window, and beyond the first context


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, LLaMA]]:
    """Gives the folder, transformers' model and ours for a name of MODELS."""
    made: dict[str, tuple[Path, Any, LLaMA]] = {}

    def get(name: str) -> tuple[Path, Any, LLaMA]:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            theirs = write_model(folder, SHAPE | MODELS[name][0])
            write_tokenizer(folder)
            made[name] = folder, theirs, load_model(folder)
        return made[name]

    return get


Models = Callable[[str], tuple[Path, Any, LLaMA]]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(models: Models, name: str) -> None:
    """Alone, packed, and with a cache; catches a field that only one of the ways through the model knows."""
    _, theirs, model = models(name)
    lengths = [20, LENGTH, 1]
    samples = random_ids(sum(lengths)).split(lengths)
    packed = model(torch.cat(samples), Packed(lengths)).split(lengths)
    with torch.inference_mode():
        for sample, found in zip(samples, packed, strict=True):
            wanted = theirs(sample[None], use_cache=False).logits[0]
            assert wanted.std() > 0.1, "logits must differ visibly for the comparison to mean something"
            assert (model(sample) - wanted).abs().max() <= 1e-4
            assert (found - wanted).abs().max() <= 1e-4
        assert (
            cached(model, samples[1], 70).sub(theirs(samples[1][None], use_cache=False).logits[0]).abs().max() <= 1e-4
        )


def cached(model: LLaMA, ids: Tensor, first: int) -> Tensor:
    """The logits of a sequence that a cache is fed in two pieces and token by token."""
    cache, pieces = (
        Steps(model.config, 1, len(ids)),
        [ids[: first // 2], ids[first // 2 : first], *ids[first:].split(1)],
    )
    return torch.cat([model(piece, cache.extend([len(piece)])) for piece in pieces])


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_under_test_matters(models: Models, name: str) -> None:
    """Without it the logits are others; catches a tiny model on which a wrong implementation would not show."""
    _, _, model = models(name)
    ids = random_ids(LENGTH)
    for change in MODELS[name][1]:
        changed = LLaMA(replace(model.config, **change))
        changed.load_state_dict(model.state_dict(), strict=False)
        assert (changed(ids) - model(ids)).abs().max() > 0.02, change


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


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_merge_equal_those_of_peft(models: Models, name: str, tmp_path: Path) -> None:
    """An adapter on all linear layers, assembled as training does it, against PEFT's own of the same folder; then
    merged, against transformers on the merged folder. Catches fused layers that compute a layer they do not know, a
    loss without the scale or cap of the logits, and a module that PEFT names otherwise."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _, _ = models(name)
    # In transformers experts are no linear layers, and have a test of their own.
    targets = "q_proj,k_proj,v_proj,o_proj" if "expert" in str(MODELS[name][2]) else "all-linear"
    lora = LoRAConfig(r=2, alpha=4, target_modules=targets)

    def adapt(model: LLaMA) -> str:
        apply_lora(model, lora)
        torch.manual_seed(1)
        for _, module in adapters(model):
            for part in module.parts().values():
                torch.nn.init.normal_(part, std=0.2)
        return ""

    assembled = assemble(load_model(folder), Assembly(adapt=adapt))
    assert assembled.plain == MODELS[name][2]
    assert assembled.fused == assembled.model.config.num_hidden_layers - Counter(assembled.plain).total()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(assembled.model, lora, adapter, str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    theirs = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    ids, places, lengths = random_ids(60), torch.arange(5, 30), [40, 20]
    targets = ids[places + 1]
    loss = TokenLoss(assembled.model).of_layout(ids, Packed(lengths), places, targets)
    logits = theirs(ids[None, :40], use_cache=False).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[places], targets, reduction="sum")
    assert abs(loss.item() - wanted.item()) <= 1e-4 * wanted.item()
    loss.backward()
    wanted.backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    ours = {
        f"base_model.model.{module}.{part}": value.grad
        for module, adapted in adapters(assembled.model)
        for part, value in adapted.parts().items()
    }
    assert ours.keys() == gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for key, gradient in gradients.items():
        assert (ours[key] - gradient).abs().max() <= 1e-5 * largest, key
    merge(adapter, tmp_path / "merged", dtype=None, precision="32-true")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    loaded = load_model(folder)
    load_adapter(loaded, adapter)
    with torch.inference_mode():
        wanted = theirs(ids[None], use_cache=False).logits[0]
        for found in (merged(ids[None]).logits[0], load_model(tmp_path / "merged")(ids), loaded.eval()(ids)):
            assert (found - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_answers_as_transformers_and_packs_nothing_it_does_not_know(models: Models, name: str) -> None:
    """Catches packed kernels that compute a layer as a LLaMA's, and a window that loses keys of layers that see all."""
    _, theirs, model = models(name)
    assert not packs(model.config, torch.float32) and model.config.beyond_llama
    prompt, count = random_ids(40), 20
    config = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(prompt[None], attention_mask=torch.ones(1, 40), **config)[0, 40:].tolist()
    assert made_by(model, [prompt.tolist()], Sampling(max_new_tokens=count)) == [wanted]


@pytest.mark.parametrize("name", MODELS)
def test_plans_count_the_model_and_say_why_it_is_not_packed(models: Models, name: str) -> None:
    """Catches a plan that builds one layer with the types of all, and a slow way that is not told."""
    _, _, model = models(name)
    plan = plan_generation(model.config, precision="32-true", memory="1GB")
    stored = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert plan.weights == stored and not plan.packed
    text = [str(cell) for cell in table(plan).columns[2].cells]
    assert any(f"know no {model.config.beyond_llama}" in cell for cell in text)


def test_a_request_that_may_grow_long_turns_so_from_its_first_token(models: Models) -> None:
    """The same prompt with short and with long answers at once, against transformers with the factors of either;
    catches keys of one kind beside queries of the other, and blocks of the cache that both would share."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, theirs, model = models("phi3, long")
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    long = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager").eval()
    prompt, wanted = random_ids(40), []
    for other, count in ((theirs, 24), (long, 25)):
        options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        wanted.append(other.generate(prompt[None], attention_mask=torch.ones(1, 40), **options)[0, 40:].tolist())
    assert wanted[0] != wanted[1][:24]
    found = made_by(model, [prompt.tolist()] * 2, [Sampling(max_new_tokens=count) for count in (24, 25)])
    assert found == wanted
