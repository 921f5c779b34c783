"""The model against transformers, and its parts against their formulas."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_transformers, tiny_model
from torch import Tensor

from lit_llama.model.attention.layout import Packed
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key head for each query head": {"num_key_value_heads": 4},
    "one key head for all": {"num_key_value_heads": 1},
    "tied head": {"tie_word_embeddings": True},
    "head size apart from hidden / heads": {"head_dim": 24},
    "other theta and epsilon": {"rope_theta": 500.0, "rms_norm_eps": 0.1},
}
PROMPTS = [
    [{"role": "user", "content": "What food do llamas eat?"}],
    [{"role": "user", "content": "Extract the order as JSON: item, quantity.\n\nTwo blue lamps for Zoë, please."}],
    [{"role": "system", "content": "Answer in Chinese."}, {"role": "user", "content": "用一句话介绍北京。"}],
    [{"role": "user", "content": "def add(a, b):\n    return a + b\n" * 12}],
]


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(384, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def real_models(real_folder: Path) -> Iterator[tuple[LLaMA, Any]]:
    """The real model in both implementations, in float32."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32, attn_implementation="eager")
    yield load_model(real_folder, dtype=torch.float32), theirs.eval()


@pytest.fixture(scope="module")
def real_prompts(real_folder: Path) -> list[list[int]]:
    """Ids of several chats, made by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in PROMPTS]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_equal_those_of_transformers(changes: dict[str, Any]) -> None:
    """Catches wrong heads, head size, rotary layout, epsilon, tying."""
    model = tiny_model(**changes)
    ids = random_ids(40)
    wanted = as_transformers(model)(ids[None]).logits[0]
    found = model(ids)
    assert found.std() > 0.3, "logits must differ visibly for the comparison to mean something"
    assert (found - wanted).abs().max() <= 1e-4


def test_names_and_shapes_of_the_state_dict_are_those_of_transformers() -> None:
    """Catches a module renamed, a bias or a buffer that creeps into the state dict."""
    model = tiny_model()
    theirs = {name: tuple(value.shape) for name, value in as_transformers(model).state_dict().items()}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == theirs


def test_a_model_without_numbers_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches normal ones on the meta device, for which torch imports its compiler: 70 MB, and time, of each start."""
    config = tiny_model().config
    expected = LLaMA(config)

    def drawn(*arguments: Any, **more: Any) -> None:
        raise AssertionError("normal_ was called")

    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(torch.nn.init, "normal_", drawn)
        model = LLaMA(config)
    assert all(p.is_meta and p.requires_grad for p in model.parameters())
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in expected.state_dict().items()}
    assert repr(model) == repr(expected)


def test_packed_samples_give_the_logits_of_each_alone() -> None:
    """Catches attention or positions that run on from one sample into the next."""
    model = tiny_model()
    lengths = [5, 1, 40, 38, 7, 1]
    samples = random_ids(sum(lengths)).split(lengths)
    packed = model(torch.cat(samples), Packed(lengths))
    alone = torch.cat([model(sample) for sample in samples])
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)


def test_select_is_indexing() -> None:
    """Catches selection by the wrong axis or in another order."""
    model = tiny_model()
    ids, places = random_ids(20), torch.tensor([19, 0, 7, 7])
    torch.testing.assert_close(model(ids, select=places), model(ids)[places], atol=1e-6, rtol=0)


def test_logits_are_causal() -> None:
    """Catches a mask that lets a token see what follows it."""
    model = tiny_model()
    ids = random_ids(20)
    changed = torch.cat([ids[:12], random_ids(8, seed=1)])
    torch.testing.assert_close(model(changed)[:12], model(ids)[:12], atol=1e-6, rtol=0)
    assert not torch.allclose(model(changed)[12:], model(ids)[12:], atol=1e-2)


def test_norm_divides_by_the_root_of_the_mean_square() -> None:
    """Catches a subtracted mean, an epsilon outside the root or not that of the configuration, a forgotten weight."""
    norm = tiny_model(rms_norm_eps=0.5).model.norm
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_shape_and_dtype_and_are_finite(dtype: torch.dtype) -> None:
    """Catches an upcast that leaks out, or an overflow in low precision."""
    logits = tiny_model().to(dtype)(random_ids(9))
    assert (logits.dtype, tuple(logits.shape)) == (dtype, (9, 384))
    assert logits.isfinite().all() and logits.abs().max() < 1000


@pytest.mark.real
def test_real_logits_equal_those_of_transformers(real_models: tuple[LLaMA, Any], real_prompts: list[list[int]]) -> None:
    """Catches whatever tiny random weights hide: long positions, real magnitudes, 9 heads over 3."""
    ours, theirs = real_models
    packed = ours(torch.tensor([i for ids in real_prompts for i in ids]), Packed([len(ids) for ids in real_prompts]))
    for ids, found in zip(real_prompts, packed.split([len(ids) for ids in real_prompts]), strict=True):
        with torch.inference_mode():
            wanted = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)  # of logits up to 30


@pytest.mark.real
def test_real_model_has_its_published_size(real_models: tuple[LLaMA, Any]) -> None:
    """Catches a layer too few, a head counted twice, a name of its own."""
    ours, theirs = real_models
    assert sum(parameter.numel() for parameter in ours.parameters()) == 134_515_008
    assert len(ours.model.layers) == 30
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.real
def test_real_model_in_bfloat16_stays_near_float32(
    real_folder: Path, real_models: tuple[LLaMA, Any], real_prompts: list[list[int]]
) -> None:
    """Catches a part that loses more than bfloat16 must, such as rotary angles rounded before the cosine."""
    model = load_model(real_folder)
    ids = torch.tensor(real_prompts[-1])
    found, wanted = model(ids), real_models[0](ids)
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and found.abs().max() < 200
    assert (found.float() - wanted).abs().mean() < 0.15
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9
