"""Every variant of an adapter against PEFT's: logits, gradients, files both ways, and what a merge makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from peft_twins import apart as apart  # a fixture
from peft_twins import base as base  # a fixture
from peft_twins import lora_of, pairs, peft_config, stir, trained, transformers_model, twin_of, write_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_llama.conversion.merge import merge
from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.generate.llm import load
from lit_llama.model.adapters.lora import adapters, apply_lora, lora_parameters
from lit_llama.model.adapters.peft_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.files.weights import Weights
from lit_llama.model.kernels.paged import PagedBatch

IDS = torch.arange(3, 40)
SETTINGS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 7}, "alpha_pattern": {"v_proj": 20}},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "DoRA": {"use_dora": True},
    "DoRA of some, with the head, and scaled otherwise": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"lm_head": 2},
        "target_modules": ["o_proj", "down_proj", "lm_head"],
    },
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 3}},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embedding, head and all norms": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "whole norms beside DoRA": {"use_dora": True, "modules_to_save": ["model.norm", "input_layernorm"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logits_and_gradients_equal_those_of_peft(base: Path, settings: dict[str, Any]) -> None:
    """Catches a wrong scale or rank, a length that carries a gradient, factors of an embedding exchanged, a copy that
    is trained and not used, a head that follows its embedding."""
    lora = lora_of(settings)
    model = trained(base, lora)
    twin = twin_of(base, lora, model)
    found, wanted = model(IDS), twin(IDS[None]).logits[0]
    scale = wanted.detach().abs().max()
    assert (found - load_model(base)(IDS)).abs().max() > 1e-2 * scale, "the adapter must do something"
    assert (found - wanted).abs().max() <= 1e-5 * scale
    for logits in (found, wanted):
        nn.functional.cross_entropy(logits[:-1], IDS[1:]).backward()
    for name, (ours, theirs) in pairs(model, twin).items():
        assert ours.grad is not None and ours.grad.any(), name
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_start_equals_that_of_peft(apart: Path, settings: dict[str, Any]) -> None:
    """Catches an adapter that changes the base before it is trained, a magnitude that is no length, factors that start
    the wrong way round."""
    from peft import get_peft_model

    lora, model = lora_of(settings), load_model(apart)
    apply_lora(model, lora)
    torch.testing.assert_close(model(IDS), load_model(apart)(IDS), atol=1e-5, rtol=1e-5)
    twin = get_peft_model(transformers_model(apart), peft_config(lora))
    for name, (ours, theirs) in pairs(model, twin).items():
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        if name.endswith((".lora_A.weight", ".lora_embedding_B")):  # drawn: the same distribution
            assert abs(ours.std().item() / theirs.std().item() - 1) < 0.25, name
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_peft_loads_our_folder_with_the_same_logits(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Catches names, shapes or settings that PEFT understands otherwise, and a tensor it misses in silence."""
    from peft import PeftModel

    lora = lora_of(settings)
    model = trained(base, lora)
    save_adapter(model, lora, tmp_path, str(base))
    twin = PeftModel.from_pretrained(transformers_model(base), tmp_path, is_trainable=True).eval()
    for name, (ours, theirs) in pairs(model, twin).items():
        assert torch.equal(ours, theirs), name
    torch.testing.assert_close(model(IDS), twin(IDS[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_we_load_the_folder_of_peft_with_the_same_logits(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Catches a setting of PEFT that is passed over, and the copies of the base that it writes taken for unknown."""
    lora = lora_of(settings)
    twin = twin_of(base, lora, trained(base, lora))
    twin.save_pretrained(tmp_path)
    model = load_model(base)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS), twin(IDS[None]).logits[0], atol=1e-4, rtol=1e-4)
    read, _ = read_adapter_config(tmp_path)
    assert {name: read.shape_of(name) for name, _ in adapters(model)} == {
        name: lora.shape_of(name) for name, _ in adapters(model)
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_merge_is_base_plus_adapter(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Catches a variant merged as plain LoRA, a tied head that is changed with its embedding, or loses its own copy."""
    lora = lora_of(settings)
    model = trained(base, lora)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    save_adapter(model, lora, adapter, str(base))
    proof = merge(adapter, merged, dtype=None, precision="32-true")
    assert proof.mean_difference < 1e-4 < proof.adapter_effect
    wanted = twin_of(base, lora, model)(IDS[None]).logits[0]
    torch.testing.assert_close(transformers_model(merged)(IDS[None]).logits[0], wanted, atol=1e-3, rtol=1e-3)
    spoken = load(adapter, precision="32-true", packed=False).model(IDS)
    torch.testing.assert_close(spoken, wanted, atol=1e-4, rtol=1e-4)
    loading: dict[str, Any] = {"precision": "32-true", "merge_adapter": True}
    own, written = load(adapter, packed=False, **loading).model, dict(Weights(merged))
    for name, value in own.state_dict().items():
        stored = written.get(name, written["model.embed_tokens.weight"])  # of a tied head
        assert value.dtype == stored.dtype and torch.equal(value, stored), "as it is loaded and as merge.py writes it"
    assert written.keys() <= own.state_dict().keys()
    at_once, after = load(adapter, **loading).engine.runner, load(merged, precision="32-true").engine.runner
    batch = PagedBatch(ids=[IDS.tolist()], starts=[0], tables=[list(range(8))], logits=[len(IDS)])
    assert torch.equal(at_once.logits(batch), after.logits(batch))
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    touched = {"embed_tokens", "lm_head"} & {name.rpartition(".")[2] for name, _ in adapters(model)}
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is (tied and not touched)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_merge_writes_the_weights_of_peft(apart: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Tensor by tensor against merge_and_unload, where nothing is tied."""
    lora = lora_of(settings)
    model = trained(apart, lora)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    save_adapter(model, lora, adapter, str(apart))
    merge(adapter, merged, dtype=None, precision="32-true")
    theirs = twin_of(apart, lora, model).merge_and_unload().state_dict()
    ours = load_file(merged / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-5, msg=name)


def test_a_copy_that_still_equals_the_other_stays_tied(tmp_path: Path) -> None:
    """Catches a head stored twice for nothing."""
    base, adapter = write_base(tmp_path / "base", tied=True), tmp_path / "adapter"
    lora = lora_of({"modules_to_save": ["embed_tokens", "lm_head"]})
    model = trained(base, lora)
    model.lm_head.trained.data.copy_(model.model.embed_tokens.trained.data)
    adapter.mkdir()
    save_adapter(model, lora, adapter, str(base))
    merge(adapter, tmp_path / "merged", dtype=None, precision="32-true")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["model.embed_tokens.weight"], model.model.embed_tokens.trained)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"target_modules": ["embed_tokens", "up_proj"]}])
def test_dropout_falls_where_it_falls_in_peft(apart: Path, settings: dict[str, Any]) -> None:
    """The same draws give the same logits; catches dropout of the base's own product, or none of DoRA's share of it."""
    lora = lora_of(settings, dropout=0.3)
    model = trained(apart, lora)
    twin = twin_of(apart, lora, model)
    results = []
    for other in (model, twin):
        other.train()
        torch.manual_seed(5)
        results.append(other(IDS) if other is model else other(IDS[None]).logits[0])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert (results[0] - twin.eval()(IDS[None]).logits[0]).abs().max() > 1e-2


def test_small_changes_of_a_length_are_heard_in_bfloat16(apart: Path) -> None:
    """Catches m / |V| rounded to bfloat16, which has nothing between 1.0039 and 1.0078."""
    model = load_model(apart, dtype=torch.bfloat16)
    apply_lora(model, lora_of({"use_dora": True, "target_modules": ["up_proj"]}))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = layer(x).float()
    layer.magnitude.data *= 1.0055
    change = (layer(x).float() / before).nanmean().item()
    assert abs(change - 1.0055) < 5e-4


def test_dora_notices_new_weights_in_evaluation(apart: Path) -> None:
    """Catches lengths kept from an earlier step."""
    model = trained(apart, lora_of({"use_dora": True})).eval()
    with torch.no_grad():
        before = model(IDS)
        assert torch.equal(model(IDS), before)
        model.train()
        for parameter in lora_parameters(model):
            parameter.mul_(1.5)
        model.eval()
        kept = model(IDS)
    # With gradients nothing is kept, and attention is computed in another order.
    torch.testing.assert_close(kept, model(IDS), atol=1e-5, rtol=1e-5)
    assert (kept - before).abs().max() > 1e-2


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_trained_is_float32_on_a_bfloat16_base(apart: Path, settings: dict[str, Any]) -> None:
    """Catches a copy that rounds its steps away, and logits that leave the dtype of the base."""
    model = load_model(apart, dtype=torch.bfloat16)
    apply_lora(model, lora_of(settings))
    assert {parameter.dtype for parameter in lora_parameters(model)} == {torch.float32}
    logits = model(IDS)
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(model))
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a copy of nothing": ({"modules_to_save": ["embed_token"]}, "did you mean embed_tokens"),
    "a copy of a block": ({"modules_to_save": ["mlp"]}, "is no embedding, norm, or linear layer"),
    "a copy of an adapted layer": ({"modules_to_save": ["v_proj"]}, "name it once"),
    "head adapted and copied": (
        {"modules_to_save": ["lm_head"], "target_modules": ["lm_head"]},
        "both name lm_head",
    ),
    "DoRA of the embedding": ({"use_dora": True, "target_modules": ["embed_tokens"]}, "embed_tokens is an embedding"),
}


@pytest.mark.parametrize(("settings", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_an_error(apart: Path, settings: dict[str, Any], named: str) -> None:
    """Catches a request that is passed over, or two trainings of one weight."""
    with pytest.raises(UserError, match="--lora") as caught:
        apply_lora(load_model(apart), lora_of(settings))
    assert named in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_computes_and_we_do_not_is_refused(apart: Path, tmp_path: Path) -> None:
    """Catches DoRA of an embedding loaded as a plain update, and an adapter on a base that PEFT had resized."""
    from peft import get_peft_model

    config = peft_config(lora_of({"target_modules": ["embed_tokens"]}))
    config.use_dora = True
    twin = get_peft_model(transformers_model(apart), config)
    twin.base_model.model.model.embed_tokens.lora_embedding_A["default"].data.normal_()
    twin.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="embed_tokens is an embedding"):
        load_adapter(load_model(apart), tmp_path)
    (tmp_path / CONFIG_FILE).write_text(
        (tmp_path / CONFIG_FILE).read_text().replace('"use_dora": true', '"use_dora": false')
    )
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors.pop("base_model.model.model.embed_tokens.lora_magnitude_vector")
    matrix = "base_model.model.model.embed_tokens.base_layer.weight"
    for changed, error, message in (
        (tensors[matrix] + 1, IntegrityError, "trained on another base"),
        (tensors[matrix][:-1].clone(), CheckpointError, r"the base model has one of \(384, 64\)"),
    ):
        save_file(tensors | {matrix: changed}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(error, match=message):
            load_adapter(load_model(apart), tmp_path)


def test_whole_rows_of_a_resized_vocabulary_are_learned(apart: Path, tmp_path: Path) -> None:
    """A new token after --resize_vocab, its rows trained whole, survives file and merge."""
    grown = tmp_path / "grown"
    made = run_here("prepare/checkpoint.py", "--source", apart, "--destination_path", grown, "--resize_vocab", 400)
    assert made.returncode == 0, made.stderr
    lora = lora_of({"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]})
    model = load_model(grown)
    apply_lora(model, lora)
    ids = torch.tensor([5, 399, 7, 398, 399])
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids)[:-1], ids[1:])
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, lora, adapter, str(grown))
    merge(adapter, tmp_path / "merged", dtype=None, precision="32-true")
    assert load_model(tmp_path / "merged")(ids)[:-1].argmax(-1).tolist() == ids[1:].tolist()


def test_the_embedding_update_is_that_of_its_formula(apart: Path) -> None:
    """E + alpha / r (B A)', row by row, without PEFT."""
    model = load_model(apart)
    apply_lora(model, lora_of({"target_modules": ["embed_tokens"], "use_rslora": True}))
    stir(model)
    embedding = model.model.embed_tokens
    rows: Tensor = embedding.weight + 6 / math.sqrt(4) * (embedding.lora_B @ embedding.lora_A).T
    torch.testing.assert_close(embedding(IDS), rows[IDS], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embedding.merged(embedding.weight), rows, atol=1e-5, rtol=1e-5)
