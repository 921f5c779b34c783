"""Low-rank adapters against PEFT's, and what they promise about the base."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_transformers, tiny_model
from torch import Tensor, nn

from lit_llama.errors import UserError
from lit_llama.model.adapters.lora import adapters, apply_lora, lora_parameters, parameter_groups
from lit_llama.model.adapters.low_rank import LoRALinear, merge_weight
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.llama import LLaMA

SETTINGS: dict[str, dict[str, Any]] = {
    "all linear layers, alpha = 2 r": {"r": 4, "alpha": 8},
    "alpha apart from 2 r": {"r": 4, "alpha": 3},
    "rank 1": {"r": 1, "alpha": 1},
    "queries and values only": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "with the head": {"r": 4, "alpha": 8, "target_modules": ["o_proj", "lm_head"]},
}


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(384, (count,), generator=torch.Generator().manual_seed(seed))


def trained_model(lora: LoRAConfig, seed: int = 1, **changes: Any) -> LLaMA:
    """A tiny model with an adapter whose B is not zero."""
    model = tiny_model(**changes)
    apply_lora(model, lora)
    torch.manual_seed(seed)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def peft_twin(model: LLaMA, lora: LoRAConfig) -> Any:
    """The same base in transformers with the same A and B in PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets)
    twin = get_peft_model(as_transformers(tiny_model()), config)
    for name, module in adapters(model):
        theirs = twin.get_submodule(f"base_model.model.{name}")
        theirs.lora_A["default"].weight.data.copy_(module.lora_A)
        theirs.lora_B["default"].weight.data.copy_(module.lora_B)
    return twin.eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logits_and_gradients_equal_those_of_peft(settings: dict[str, Any]) -> None:
    """Catches a wrong scale, A and B exchanged, an adapter on the wrong or on no layer."""
    lora = LoRAConfig(**settings)
    model = trained_model(lora)
    twin, ids = peft_twin(model, lora), random_ids(24)
    found, wanted = model(ids), twin(ids[None]).logits[0]
    scale = wanted.detach().abs().max()
    assert (found - tiny_model()(ids)).abs().max() > 1e-2 * scale, "the adapter must do something"
    assert (found - wanted).abs().max() <= 1e-5 * scale
    for logits in (found, wanted):
        nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
    count = 0
    for name, module in adapters(model):
        theirs = twin.get_submodule(f"base_model.model.{name}")
        for ours, other in ((module.lora_A, theirs.lora_A), (module.lora_B, theirs.lora_B)):
            assert ours.grad is not None and ours.grad.any(), name
            torch.testing.assert_close(ours.grad, other["default"].weight.grad, atol=1e-5, rtol=1e-5)
            count += 1
    assert count == sum(".lora_" in name for name, _ in twin.named_parameters())


def test_dropout_acts_only_in_training_and_leaves_the_base_path_whole() -> None:
    """Catches dropout during evaluation, and dropout of x W beside that of x A."""
    lora = LoRAConfig(r=4, alpha=8, dropout=0.5)
    model, ids = trained_model(lora), random_ids(24)
    model.eval()
    scale = model(ids).abs().max()
    assert (model(ids) - peft_twin(model, lora)(ids[None]).logits[0]).abs().max() <= 1e-5 * scale
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model(ids), model(ids), atol=1e-3)
    for _, module in adapters(model):
        module.scale = 0.0
    torch.testing.assert_close(model(ids), tiny_model()(ids), atol=1e-5, rtol=0)


def test_dropout_keeps_the_mean() -> None:
    """Catches dropout that is not scaled up by 1 / (1 - p), or taken after A."""
    base = nn.Linear(64, 3, bias=False)
    layer = LoRALinear(base, rank=2, scale=2.0, dropout=0.25)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    wanted = layer.eval()(x)
    torch.manual_seed(0)
    draws = layer.train()(x.expand(40_000, 64))
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - wanted[0]).abs() < 5 * error).all()


def test_a_fresh_adapter_changes_nothing() -> None:
    """Catches a B that does not start at zero, or an A that does (then nothing is ever learned)."""
    model, ids = tiny_model(), random_ids(24)
    with torch.no_grad():  # with gradients, attention is another kernel's
        before = model(ids)
        apply_lora(model, LoRAConfig())
        assert torch.equal(model(ids), before)
    for _, module in adapters(model):
        assert not module.lora_B.any()
        bound = 1 / math.sqrt(module.in_features)  # kaiming_uniform_ with a = sqrt(5), as in PEFT and in lit-llama
        assert 0.8 * bound < module.lora_A.abs().max() <= bound
        assert module.lora_A.mean().abs() < bound / 5


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["lm_head"], ["model.layers.1.mlp.up_proj"]])
def test_number_of_trainable_parameters(targets: Any) -> None:
    """r (in + out) for each adapted layer; catches layers left out, and base weights left trainable."""
    model = tiny_model()
    adapted = apply_lora(model, LoRAConfig(r=3, target_modules=targets))
    sizes = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 112), "up": (64, 112)}
    sizes |= {"down": (112, 64), "lm_head": (64, 384)}
    chosen = {"all-linear": [*list(sizes)[:7]] * 2, "q_proj": ["q", "v"] * 2, "lm_head": ["lm_head"]}
    layers = chosen.get(targets if isinstance(targets, str) else targets[0], ["up"])
    expected = sum(3 * (sizes[layer][0] + sizes[layer][1]) for layer in layers)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert sum(p.numel() for p in lora_parameters(model)) == expected
    assert len(adapted) == len(layers)


@pytest.mark.real
def test_trainable_parameters_of_the_real_model(real_folder: Path) -> None:
    """The number PEFT prints for r 8 on all linear layers."""
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.from_folder(real_folder))
        adapted = apply_lora(model, LoRAConfig(r=8))
    assert sum(parameter.numel() for parameter in lora_parameters(model)) == 2_442_240
    assert len(adapted) == 30 * 7


def test_a_step_changes_a_and_b_only() -> None:
    """Catches a base weight, a norm or the tied embedding that is trained along."""
    model, ids = tiny_model(tie_word_embeddings=True), random_ids(24)
    apply_lora(model, LoRAConfig(target_modules=["q_proj", "down_proj", "lm_head"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.1)
    for _ in range(2):  # in the first step A has no gradient, because B is zero
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids)[:-1], ids[1:]).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed == name.endswith((".lora_A", ".lora_B")), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_adapters_are_float32_on_a_bfloat16_base() -> None:
    """Catches updates that vanish in bfloat16's 8 bits."""
    model = tiny_model().to(torch.bfloat16)
    apply_lora(model, LoRAConfig())
    assert {parameter.dtype for parameter in lora_parameters(model)} == {torch.float32}
    logits = model(random_ids(5))
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(model))


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("q_porj", "did you mean q_proj"),
        ("gate", "gate_proj"),
        ("embed_token", "did you mean embed_tokens"),
        ("Q_proj", "did you mean q_proj"),
        ("q", "there are"),
        ("norm", "there are"),
        ("roj", "roj"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(target: str, hint: str) -> None:
    """Catches a typing error that trains fewer layers than asked for, and a match by part of a name."""
    model = tiny_model()
    with pytest.raises(UserError, match=r"--lora\.target_modules") as caught:
        apply_lora(model, LoRAConfig(target_modules=["v_proj", target]))
    assert hint in str(caught.value)
    assert not list(adapters(model)), "the model must be left as it was"


@pytest.mark.parametrize(
    "pattern", [r".*\.(q|v)_proj", r"model\.layers\.1\..*(up|k)_proj", r".*[13]\.mlp\.(up|down)_proj"]
)
def test_a_regular_expression_means_the_modules_that_it_means_to_peft(pattern: str) -> None:
    """Catches one that is matched at the beginning or the end alone, or against other names than PEFT's."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    adapted = apply_lora(model, LoRAConfig(r=2, target_modules=pattern))
    twin = get_peft_model(as_transformers(tiny_model()), LoraConfig(r=2, target_modules=pattern))
    theirs = [name for name, module in twin.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == theirs


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "all-linear,lm_head",
            "--lora.target_modules is all-linear,lm_head, but all-linear stands alone, for the linear layers of the "
            "decoder; name all of them, --lora.target_modules "
            "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head, or have lm_head train whole, "
            "--lora.target_modules all-linear --lora.modules_to_save lm_head",
        ),
        (["embed_tokens", "all"], "or have embed_tokens train whole, --lora.target_modules all --lora.modules_to_save"),
        (
            "all-linear,q_proj",
            "but all-linear stands for q_proj, too; give --lora.target_modules all-linear alone",
        ),
        ("all-linear,lm_hed", "'lm_hed' matches no linear layer or embedding of the model; did you mean lm_head?"),
    ],
)
def test_what_stands_beside_the_word_for_all_has_a_way_out(targets: str | list[str], message: str) -> None:
    """Catches "'all-linear' matches no linear layer", which sends people to look for another word."""
    with pytest.raises(UserError) as caught:
        apply_lora(tiny_model(), LoRAConfig(target_modules=targets))
    assert message in str(caught.value)


def test_a_regular_expression_that_matches_nothing_is_an_error() -> None:
    """Catches a run of nothing, where only the beginning of the names was forgotten."""
    with pytest.raises(
        UserError, match=r"'\(q\|v\)_proj' matches no linear layer .* such as model\.layers\.0\..*_proj"
    ):
        apply_lora(tiny_model(), LoRAConfig(target_modules="(q|v)_proj"))


def test_patterns_that_match_nothing_are_errors() -> None:
    """Catches a rank that is asked for and not given, by a typing error or for a layer that is not adapted."""
    for option, key, hint in (
        ("rank_pattern", "v_porj", "did you mean v_proj"),
        ("rank_pattern", "norm", "there are q_proj, v_proj"),
        ("alpha_pattern", "layers.7.v_proj", "did you mean v_proj"),
    ):
        model = tiny_model()
        with pytest.raises(UserError, match=rf"--lora\.{option}: '{key}' matches no adapted module") as caught:
            apply_lora(model, LoRAConfig(target_modules=["q_proj", "v_proj"], **{option: {key: 4}}))
        assert hint in str(caught.value)
        assert not list(adapters(model)), "the model must be left as it was"


def test_b_learns_faster_than_a_by_the_ratio() -> None:
    """Catches A and B exchanged, a parameter in no group or in two, and vectors that decay."""
    model = tiny_model()
    apply_lora(model, LoRAConfig(target_modules=["embed_tokens", "q_proj"], modules_to_save=["model.norm", "lm_head"]))
    groups = parameter_groups(model, 16.0, 0.1)
    where = {id(p): (g["lr_ratio"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sorted(map(id, (p for g in groups for p in g["params"]))) == sorted(map(id, lora_parameters(model)))
    assert set(where) == {id(p) for p in model.parameters() if p.requires_grad}
    layer, decoder = model.model.layers[0].self_attn.q_proj, model.model
    assert where[id(layer.lora_A)] == (1, 0.1) and where[id(layer.lora_B)] == (16, 0.1)
    assert where[id(decoder.embed_tokens.lora_A)] == where[id(decoder.embed_tokens.lora_B)] == (1, 0.1)
    assert where[id(decoder.norm.trained)] == (1, 0) and where[id(model.lm_head.trained)] == (1, 0.1)


def test_groups_agree_with_those_of_peft() -> None:
    """PEFT's LoRA+ optimizer gives the same learning rate to the same factor of linear layers."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    twin = get_peft_model(as_transformers(tiny_model()), LoraConfig(r=8, target_modules=["q_proj", "o_proj"]))
    optimizer = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    theirs = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    model = tiny_model()
    apply_lora(model, LoRAConfig(target_modules=["q_proj", "o_proj"]))
    ours = {id(p): 1e-3 * group["lr_ratio"] for group in parameter_groups(model, 8.0) for p in group["params"]}
    for name, module in adapters(model):
        other = twin.get_submodule(f"base_model.model.{name}")
        assert ours[id(module.lora_A)] == theirs[id(other.lora_A["default"].weight)]
        assert ours[id(module.lora_B)] == theirs[id(other.lora_B["default"].weight)] == 8e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weight_is_the_exact_sum_rounded_once(dtype: torch.dtype) -> None:
    """Values whose products and sums are exact in float32, so that only the last rounding remains; catches B A added in
    the precision of the weights, and a scale rounded on the way."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randint(-128, 128, (48, 40), generator=generator) / 64).to(dtype)
    a, b = (torch.randint(-64, 64, shape, generator=generator) / 1024 for shape in ((4, 40), (48, 4)))
    exact = weight.double() + 0.75 * (b.double() @ a.double())
    assert not torch.equal(exact.to(dtype), weight)
    assert torch.equal(merge_weight(weight, a, b, 0.75, dtype), exact.to(dtype))


def test_merged_weight_of_any_values_is_within_one_rounding() -> None:
    """With values that are not exact, float32 may tip the last rounding of a few; never by more than one step."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator).to(torch.bfloat16)
    a, b = torch.randn(8, 128, generator=generator) / 10, torch.randn(256, 8, generator=generator) / 10
    exact = weight.double() + 2 * (b.double() @ a.double())
    found = merge_weight(weight, a, b, 2.0, torch.bfloat16)
    half_step = exact.abs() * 2**-8
    assert ((found.double() - exact).abs() <= half_step * (1 + 1e-4) + 1e-6).all()
    assert (found != exact.to(torch.bfloat16)).float().mean() < 1e-3
    assert torch.allclose(merge_weight(weight, a, b, 2.0, torch.float32).double(), exact, atol=1e-6, rtol=1e-6)


def test_merged_weight_gives_the_logits_of_the_adapter() -> None:
    """Catches B A transposed, or A' B' merged into the wrong layer."""
    model, ids = trained_model(LoRAConfig(r=4, alpha=6)), random_ids(24)
    merged = tiny_model()
    for name, module in adapters(model):
        value = merge_weight(module.weight, module.lora_A, module.lora_B, module.scale, torch.float32)
        merged.get_submodule(name).weight.data.copy_(value)
    torch.testing.assert_close(merged(ids), model(ids), atol=1e-4, rtol=0)
