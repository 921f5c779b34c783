"""Loading a checkpoint or an adapter folder with all that belongs to it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, write_adapter

from lit_llama.errors import CheckpointError, IntegrityError
from lit_llama.generate.llm import load
from lit_llama.model.adapters.lora import adapters
from lit_llama.text.prompts.encode import named_style
from lit_llama.text.tokenizer.base import Tokenizer


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def add_words(folder: Path, *ids: int) -> None:
    """Make control tokens of words, as an end has to be one."""
    words = Tokenizer.from_path(folder).vocabulary
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [plain | {"id": i, "content": words[i]} for i in sorted(ids)]
    edit(folder / "tokenizer.json", lambda value: value["added_tokens"].extend(added))


def test_an_adapter_folder_gives_base_plus_adapter(base: Path, adapter: Path) -> None:
    """An adapter that is found but not applied, checked against PEFT on transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([5, 80, 200, 31])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    ours = load(adapter, precision="32-true", packed=False)
    with torch.inference_mode():
        found, wanted = ours.model(ids), theirs(ids[None]).logits[0]
        plain = load(base, precision="32-true", packed=False).model(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).abs().max() > 0.1
    assert len(list(adapters(ours.model))) == 14


def test_what_is_loaded_is_ready_to_generate(base: Path, adapter: Path) -> None:
    """Dropout or gradients left on."""
    for folder in (base, adapter):
        model = load(folder, precision="32-true", packed=False).model
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_the_precision_asked_for_is_used(base: Path) -> None:
    """A flag that is ignored."""
    assert load(base, precision="bf16-true", packed=False).model.lm_head.weight.dtype == torch.bfloat16
    assert load(base, precision="32-true", packed=False).model.lm_head.weight.dtype == torch.float32


def test_the_adapter_is_asked_in_the_style_it_was_trained_in(base: Path, adapter: Path) -> None:
    """The template of the base, in which the adapter never saw an instruction."""
    alpaca = named_style("alpaca")
    assert load(adapter).style == alpaca
    style = load(base).require_style()
    assert style.user("Say hi", "to Zoë") == "Say hi\n\nto Zoë" != alpaca.user("Say hi", "to Zoë")


def test_an_adapter_without_a_template_has_that_of_its_base(base: Path, tmp_path: Path) -> None:
    """A plain PEFT folder, which need not carry a template, refused although its base says how to ask."""
    adapter = write_adapter(tmp_path / "peft", base, style=None)
    assert load(adapter).require_style().jinja(bos=False) == CHATML


def test_a_template_inside_the_settings_counts(base: Path) -> None:
    """Older folders, which keep the template in tokenizer_config.json."""
    (base / "chat_template.jinja").unlink()
    edit(base / "tokenizer_config.json", lambda value: value.update(chat_template=named_style("chatml").jinja(False)))
    assert load(base).style == named_style("chatml")


def test_the_style_asked_for_wins(adapter: Path) -> None:
    """--prompt_style without effect."""
    assert load(adapter, prompt_style="chatml").style == named_style("chatml")


def test_a_folder_without_a_template_says_how_to_go_on(base: Path) -> None:
    """A guessed style, or an error without a way out."""
    (base / "chat_template.jinja").unlink()
    llm = load(base)
    with pytest.raises(CheckpointError, match=r"no chat template.*--prompt_style alpaca.*generate/base\.py"):
        llm.require_style()


def test_the_end_of_an_answer_in_the_style_stops(base: Path) -> None:
    """Catches a model tuned in ChatML on a base with another end of text: it would say <|im_end|> and go on."""
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file():
            values = json.loads((base / name).read_text()) | {"eos_token_id": 0}
            (base / name).write_text(json.dumps(values))
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(base, prompt_style="alpaca").stop_ids == {0}
    assert load(base, prompt_style="chatml").stop_ids == {0, 2}
    assert load(base).stop_ids == {0, 2}, "a foreign template ends its answers in a control token, too"


def test_stop_ids_come_from_every_file_that_names_one(base: Path) -> None:
    """A model that never stops because one of three files was not read."""
    add_words(base, 300, 301, 7, 8, 9)
    edit(base / "config.json", lambda value: value.update(eos_token_id=[300, 301]))
    (base / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load(base).stop_ids == {2, 300, 301, 7, 8}
    (base / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load(base).stop_ids == {2, 300, 301, 9}
    (base / "generation_config.json").write_text("{}")
    assert load(base).stop_ids == {2, 300, 301}
    (base / "generation_config.json").unlink()
    assert load(base).stop_ids == {2, 300, 301}


def test_the_adapter_stops_where_its_base_does(base: Path, tmp_path: Path) -> None:
    """Settings sought in the adapter folder, which has none."""
    add_words(base, 7)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load(write_adapter(tmp_path / "other", base)).stop_ids == {2, 7}


def test_broken_settings_are_named(base: Path) -> None:
    """A traceback out of the JSON module."""
    (base / "generation_config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not JSON"):
        load(base)
    (base / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not a JSON object"):
        load(base)


def test_a_base_that_moved_is_named_with_the_way_out(base: Path, adapter: Path) -> None:
    """A search elsewhere, or an error that does not say which folder is missing."""
    base.rename(base.with_name("gone"))
    with pytest.raises(CheckpointError, match=r"names the base model '.*base'.*correct base_model_name_or_path"):
        load(adapter)
    edit(adapter / "adapter_config.json", lambda v: v.update(base_model_name_or_path=str(base.with_name("gone"))))
    assert load(adapter, packed=False).model is not None


def test_another_base_is_refused(base: Path, adapter: Path) -> None:
    """Answers of an adapter on weights it was never trained on."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="not the base") as caught:
        load(adapter)
    assert caught.value.exit_status == 6


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"base": {}}', '{"base": null}'])
def test_a_broken_record_of_the_base_is_an_error(adapter: Path, text: str) -> None:
    """A damaged meta.json, taken as none or as a traceback."""
    (adapter / "meta.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"meta\.json does not say which base"):
        load(adapter)


def test_a_tokenizer_larger_than_the_embedding_is_refused(base: Path) -> None:
    """An index error, or silence, as soon as the first new token is typed."""
    added = {"id": 384, "content": "<extra>", "special": True, "single_word": False}
    added |= {"lstrip": False, "rstrip": False, "normalized": False}
    edit(base / "tokenizer.json", lambda value: value["added_tokens"].append(added))
    with pytest.raises(CheckpointError, match=r"tokenizer has 385 tokens.*only 384 rows.*came with these weights"):
        load(base)


def test_a_folder_without_tokenizer_or_weights_is_refused(base: Path) -> None:
    """A door that fails long after the first line."""
    (base / "tokenizer.json").rename(base / "t")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json and no tokenizer\.model"):
        load(base)
    (base / "t").rename(base / "tokenizer.json")
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load(base)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(base / "nowhere")


def test_a_notebook_completes_what_there_is() -> None:
    """Catches names that nobody finds, because they are imported only when they are named."""
    import lit_llama

    assert set(lit_llama.__all__) <= set(dir(lit_llama))
    assert all(getattr(lit_llama, name) is not None for name in lit_llama.__all__)
