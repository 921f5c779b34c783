"""Layers of linear attention beyond what all families are compared by: the rule, samples apart, states, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_passes import planned_and_counted
from paged_steps import made_by
from tiny_families import SHAPE, random_ids, write_model
from torch import Tensor

from lit_llama.device import Numerics
from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.engine.draft import DraftModel
from lit_llama.generate.engine.engine import Engine, EngineConfig
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.runner import TorchRunner
from lit_llama.generate.engine.speculative import PromptLookups
from lit_llama.generate.plan import plan_generation, table
from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.assemble import Assembly, assemble
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import Checkpointing, LLaMAConfig, LoRAConfig, Quantization
from lit_llama.model.delta import CHUNK, delta_rule
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.kernels.paged import BLOCK, PagedBatch, PagedCache, paged_logits
from lit_llama.model.llama import LLaMA
from lit_llama.train.loss import TokenLoss
from lit_llama.train.memory.footprint import Build
from lit_llama.train.methods.method import LoRA

LINEAR, FULL = "linear_attention", "full_attention"
QWEN: dict[str, Any] = SHAPE | {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 3,
    "head_dim": 16,
    "layer_types": [LINEAR, FULL, LINEAR],
    "max_position_embeddings": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("qwen")
    return folder, write_model(folder, QWEN)


@pytest.fixture
def model(written: tuple[Path, Any]) -> LLaMA:
    return load_model(written[0])


# ---- the rule


def plainly(
    q: Tensor, k: Tensor, v: Tensor, fading: Tensor, beta: Tensor, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rule, token by token, in whatever precision its inputs have."""
    each = v.shape[2] // k.shape[2]
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x[:, :, torch.arange(v.shape[2]) // each] for x in (q / q.shape[-1] ** 0.5, k))
    memory = torch.zeros(*v.shape[::2], k.shape[3], v.shape[3], dtype=v.dtype) if memory is None else memory
    outputs = []
    for token in range(v.shape[1]):
        memory = memory * fading[:, token].exp()[..., None, None]
        held = torch.einsum("bhde,bhd->bhe", memory, k[:, token])
        change = beta[:, token, :, None] * (v[:, token] - held)
        memory = memory + torch.einsum("bhd,bhe->bhde", k[:, token], change)
        outputs.append(torch.einsum("bhde,bhd->bhe", memory, q[:, token]))
    return torch.stack(outputs, dim=1), memory


@pytest.mark.parametrize("length", [1, 3, CHUNK, 2 * CHUNK + 5])
@pytest.mark.parametrize("begun", [False, True])
def test_chunks_give_what_the_rule_gives_token_by_token(length: int, begun: bool) -> None:
    """Results, memory and all gradients against a loop in float64; catches a fading or correction that is off by a
    token, heads in another order, a last chunk whose filling fades the memory, and a memory that is not gone on from.
    The fading is such that tokens of the chunk before still count."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, 2, 8), (2, length, 2, 8), (2, length, 6, 5), (2, length, 6), (2, length, 6), (2, 6, 8, 5)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes[: 6 if begun else 5]]
    inputs[3], inputs[4] = -0.05 * inputs[3].exp(), inputs[4].sigmoid()
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    for rule, dtype in ((delta_rule, torch.float32), (plainly, torch.float64)):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        results = rule(*given, *([] if begun else [None]))
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(dtype) for x in results]
        loss = sum(((x * weight).sum() for x, weight in zip(results, weights, strict=True)), torch.zeros(()))
        found.append(([x.detach() for x in results], list(torch.autograd.grad(loss, given))))
    for ours, theirs in zip(*(results + gradients for results, gradients in found), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5 * max(1, theirs.abs().max().item()), rtol=0)


def test_gradients_of_all_weights_equal_those_of_transformers(written: tuple[Path, Any]) -> None:
    """As full fine-tuning has them; catches a part of the layer that no gradient comes to."""
    folder, theirs = written
    model, ids = load_model(folder).requires_grad_(True), random_ids(100)
    torch.nn.functional.cross_entropy(model(ids)[:-1], ids[1:]).backward()
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(theirs(ids[None], use_cache=False).logits[0, :-1], ids[1:]).backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0, msg=name)
    theirs.zero_grad()


# ---- samples apart


def test_no_sample_sees_another_through_state_or_convolution(model: LLaMA) -> None:
    """Other tokens in one sample leave the logits of the rest as they were, bit for bit, and a loss in one sample has
    no gradient by the tokens of others; catches a state that is not begun anew, and a convolution over the end of the
    sample before. Lengths about the ends of chunks, and shorter than the convolution."""
    lengths = [70, 2, 64, 1, 3, 130, 65]
    ids, layout = random_ids(sum(lengths)), Packed(lengths)
    before = model(ids, layout).split(lengths)
    for changed in range(len(lengths)):
        parts = list(ids.split(lengths))
        parts[changed] = (parts[changed] - 3 + 7) % 381 + 3
        for sample, logits in enumerate(model(torch.cat(parts), layout).split(lengths)):
            assert torch.equal(logits, before[sample]) == (sample != changed), (changed, sample)
    seen: list[Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda _, __, y: seen.append(y.requires_grad_()) or y)
    for sample in range(len(lengths)):
        logits = model(ids, layout).split(lengths)[sample]
        (gradient,) = torch.autograd.grad(logits.square().sum(), seen[-1])
        by_sample = [part.abs().amax().item() for part in gradient.split(lengths)]
        assert [size > 0 for size in by_sample] == [other == sample for other in range(len(lengths))]


def prepared(folder: Path, checkpointing: Checkpointing = "none") -> LLaMA:
    """The model with an adapter that does something, as a run assembles it."""

    def adapt(model: LLaMA) -> str:
        apply_lora(model, LoRAConfig(r=2))
        torch.manual_seed(1)
        for _, module in adapters(model):
            for part in module.parts().values():
                torch.nn.init.normal_(part, std=0.2)
        return ""

    return assemble(load_model(folder), Assembly(adapt=adapt, checkpointing=checkpointing)).model


def gradients(model: LLaMA) -> dict[str, Tensor]:
    """Of the adapter, which are taken off it."""
    found = {}
    for name, module in adapters(model):
        for part, value in module.parts().items():
            assert value.grad is not None, name
            found[f"{name}.{part}"], value.grad = value.grad, None
    return found


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_packed_step_is_the_sum_of_its_samples(written: tuple[Path, Any], checkpointing: Checkpointing) -> None:
    """Gradients of an adapter on all linear layers, against those of each sample alone by transformers and PEFT's rule
    of the family test; catches a leak in the backward pass, and layers that are recomputed otherwise."""
    lengths = [70, 2, 64, 40]
    ids, model = random_ids(sum(lengths)), prepared(written[0], checkpointing)
    ends = torch.tensor(lengths).cumsum(0)
    places = torch.tensor([place for place in range(len(ids)) if place + 1 not in ends])
    TokenLoss(model).of_layout(ids, Packed(lengths), places, ids[places + 1]).backward()
    found, alone = gradients(model), prepared(written[0])
    for sample in ids.split(lengths):
        own = torch.arange(len(sample) - 1)
        TokenLoss(alone).of_layout(sample, Packed([len(sample)]), own, sample[1:]).backward()
    wanted = gradients(alone)
    assert {name.rpartition("linear_attn.")[2].partition(".")[0] for name in wanted if "linear_attn" in name} == {
        *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    }
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert gradient.any() and (found[name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_projections_are_quantised(written: tuple[Path, Any], quantize: Quantization) -> None:
    """Catches projections of linear attention that stay in full precision where others do not, and a convolution,
    fading or norm that does not."""
    pytest.importorskip("bitsandbytes")
    model = load_model(written[0], quantize=quantize)
    kinds = {name: type(module).__name__ for name, module in model.model.layers[0].linear_attn.named_children()}
    assert {name for name, kind in kinds.items() if kind == "QuantizedLinear"} == {
        *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    }
    plain, found = load_model(written[0])(random_ids(20)), model(random_ids(20))
    assert 0 < (found - plain).abs().mean() < plain.std()


def test_in_bfloat16_the_state_is_not_rounded(written: tuple[Path, Any]) -> None:
    """Against transformers in bfloat16, by their distance from float32; catches a memory in bfloat16, whose errors add
    up over the tokens."""
    folder, theirs = written
    ids = random_ids(200)
    with torch.inference_mode():
        exact = theirs(ids[None], use_cache=False).logits[0]
        other = type(theirs).from_pretrained(folder, dtype=torch.bfloat16).eval()(ids[None], use_cache=False).logits[0]
        found = load_model(folder, dtype=torch.bfloat16)(ids)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().mean() <= 1.2 * (other - exact).abs().mean()


# ---- states


def test_states_are_those_of_their_sequences(model: LLaMA) -> None:
    """Prompts of unequal lengths in pieces, more of them than run together, and blocks for a few, so that some are put
    off and computed again in another's slot; catches a state that is left from the sequence before, or written into
    another's, and one of a prompt that is found computed."""
    prompts = [random_ids(count, seed).tolist() for seed, count in enumerate((28, 1, 70, 2))]
    prompts.append(prompts[2])
    sampling = Sampling(max_new_tokens=40)
    wanted = [made_by(model, [ids], sampling)[0] for ids in prompts]
    assert len({*map(tuple, wanted)}) == 4
    size = PagedCache.bytes_of_block(model.config, torch.float32)
    config = EngineConfig(max_sequences=3, max_batch_tokens=29)
    engine = Engine(TorchRunner(model, 4 * size, max_sequences=3), config=config)
    tickets = [engine.add(Request(ids, sampling)) for ids in prompts]
    tickets.append(engine.add(Request(prompts[2], Sampling(max_new_tokens=40, n=2))))
    while engine.busy:
        engine.step()
        engine.check()
    for ticket, answer in zip(tickets, [*wanted, wanted[2]], strict=True):
        assert ticket.error is None
        for index in {step.answer for step in ticket.steps}:
            made = [token for step in ticket.steps if step.answer == index for token in step.ids]
            assert made == answer
    counts = engine.statistics()
    assert counts.preemptions > 0 and counts.reused == counts.guessed == 0


def test_a_step_that_failed_begins_again(model: LLaMA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that ran out behind the first layers, whose states have gone on; catches tokens that count twice."""
    import lit_llama.model.delta as delta

    prompt, sampling, calls = random_ids(40).tolist(), Sampling(max_new_tokens=10), [0]
    wanted = made_by(model, [prompt], sampling)[0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 8:  # the second layer of the fourth step
            raise KeyboardInterrupt
        return delta_rule(*args)

    monkeypatch.setattr(delta, "delta_rule", failing)
    size = PagedCache.bytes_of_block(model.config, torch.float32)
    engine = Engine(TorchRunner(model, 4 * size))
    ticket = engine.add(Request(prompt, sampling))
    with pytest.raises(KeyboardInterrupt):
        while engine.busy:
            engine.step()
    while engine.busy:
        engine.step()
    assert [token for step in ticket.steps for token in step.ids] == wanted


def test_only_layers_of_attention_have_blocks(model: LLaMA) -> None:
    """Memory of cache and states, by the tensors themselves and by plans; catches keys and values for layers that have
    none, states that a plan leaves out, and a slow way that is not told."""
    config = model.config
    cache = PagedCache(config, 5, "cpu", torch.bfloat16, slots=3)
    assert sum(part.nbytes for part in cache.parts) == 5 * PagedCache.bytes_of_block(config, torch.bfloat16)
    assert PagedCache.bytes_of_block(config, torch.bfloat16) == 2 * 2 * BLOCK * 2 * 16  # of one layer of three
    tails, memories = zip(*(cache.states(layer) for layer in (0, 2)), strict=True)
    assert tails[0].shape == (3, 2 * 24 + 60, 3) and memories[0].shape == (3, 6, 12, 10)
    states = sum(state.nbytes for state in (*tails, *memories))
    assert states == 3 * PagedCache.bytes_of_slot(config, torch.bfloat16)
    plan = plan_generation(config, precision="bf16-true", memory="1GB", max_sequences=3)
    less = replace(plan, max_sequences=2)
    assert plan.states == states and plan.least - less.least - (plan.step - less.step) == states / 3
    (row,) = (cell for cell in table(plan).columns[2].cells if "recurrent" in str(cell) and "know" not in str(cell))
    assert "prompts are not shared, nor tokens guessed" in str(row)


def test_guesses_are_refused_by_name(model: LLaMA) -> None:
    """Of a draft, and for one; catches a state that has gone on over wrong guesses."""
    runner = TorchRunner(model, 4 * PagedCache.bytes_of_block(model.config, torch.float32))
    with pytest.raises(UserError, match="the draft has recurrent layers, whose states cannot be taken back"):
        DraftModel(runner, tokens=384, max_sequences=2, cost=0.1)
    with pytest.raises(UserError, match=r"the model has recurrent layers.*leave --draft_dir out"):
        Engine(runner).add_guesser(PromptLookups())


# ---- plans and configurations


def test_a_plan_counts_what_the_layers_keep() -> None:
    """Bytes of a forward and backward pass, counted on a model without numbers and on one with; and of a deep one, from
    whole turns of its layers. Catches layers of one kind that stand for all, and samples that share a beginning, whose
    state would have to be gone on from."""
    small = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "layer_types": [LINEAR, FULL]}
    config = LLaMAConfig.from_dict(QWEN | small)
    numerics = Numerics(device=torch.device("cpu"), linear=torch.float32, rest=torch.float32)
    build = Build(config=config, method=LoRA(LoRAConfig()), numerics=numerics, checkpointing="none")
    planned, counted = planned_and_counted(build, [80, 40], 100)
    assert planned == pytest.approx(counted, rel=0.01)
    assert not build.shares and not build.evaluation_shares
    asked: list[int] = []

    def peak(build: Build) -> int:
        asked.append(build.config.num_hidden_layers)
        return 1000 + 30 * len(build.config.recurrent_layers) + 7 * len(build.config.attending_layers)

    for turns, more in ((20, ()), (20, (LINEAR,))):
        types = (LINEAR, LINEAR, FULL) * turns + more
        deep = replace(build, config=replace(config, num_hidden_layers=len(types), layer_types=types))
        assert deep._deep(peak) == peak(deep)
    assert asked == [3, 6, 60, 61, 61]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kinds": ({"layer_types": [LINEAR, "sliding_attention", FULL]}, "expected linear_attention or full_attention for"),
    "no attention": ({"layer_types": [LINEAR] * 3}, "expected full_attention in one layer at least"),
    "number": ({"layer_types": [LINEAR, FULL]}, "for each of 3 layers"),
    "interval": ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval is 0"),
    "heads": ({"linear_num_value_heads": 5}, "linear_num_value_heads 5 is not a multiple of linear_num_key_heads 2"),
    "size": ({"linear_key_head_dim": "12"}, "linear_key_head_dim is '12', expected a positive whole number"),
    "gate": ({"attn_output_gate": False}, "attn_output_gate is False, only True is implemented"),
    "window": ({"sliding_window": 7}, "sliding_window is 7"),
}


@pytest.mark.parametrize(("change", "named"), BAD.values(), ids=BAD)
def test_what_is_not_computed_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        LLaMAConfig.from_dict(QWEN | change)
    assert named in str(caught.value)


def test_layers_may_all_be_full(tmp_path: Path) -> None:
    """Catches sizes of linear attention that are asked for where there is none, and gates that come with it."""
    theirs, ids = write_model(tmp_path, QWEN | {"layer_types": [FULL] * 3}), random_ids(30)
    model = load_model(tmp_path)
    assert not model.config.recurrent_layers
    with torch.inference_mode():
        assert (model(ids) - theirs(ids[None], use_cache=False).logits[0]).abs().max() <= 1e-4
    batch = PagedBatch(ids=[ids.tolist()], starts=[0], tables=[[0]], logits=[1])
    paged = paged_logits(model, batch, PagedCache(model.config, 1, "cpu", torch.float32))
    torch.testing.assert_close(paged[0], model(ids)[-1], atol=1e-5, rtol=0)
