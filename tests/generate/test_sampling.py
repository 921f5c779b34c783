"""Sampling against transformers' logits processors and formulas, whatever else is in the batch."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from paged_steps import made_by
from torch import Tensor

from lit_llama.errors import NumericalError, UserError
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.sampling import Sampler, token_logprobs
from lit_llama.wording import param

DRAWN = Sampling(temperature=1.0)
PROMPT, MADE = [3, 7, 7, 9], [7, 11, 12, 11, 11]


def random_logits(seed: int = 0, batch: int = 6, vocabulary: int = 50) -> Tensor:
    return 3 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(seed))


def sampler_of(samplings: Sequence[Sampling], vocabulary: int = 50, **more: Any) -> Sampler:
    """Each sampling in a slot of its own, numbered as the slot, amid an answer."""
    made = Sampler(len(samplings), vocabulary, **more)
    for slot, sampling in enumerate(samplings):
        made.set(slot, sampling, number=slot, prompt=PROMPT, made=MADE)
    return made


def chances(logits: Tensor, *samplings: Sampling, position: int = 5) -> Tensor:
    own = list(samplings) * (len(logits) // len(samplings))
    return sampler_of(own, logits.shape[1]).distribution(logits, range(len(own)), [position] * len(own))


def theirs(logits: Tensor, sampling: Sampling, prompt: Sequence[int] = PROMPT, made: Sequence[int] = MADE) -> Tensor:
    """Probabilities by transformers' processors, in the order in which its `generate` puts them."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
    config = GenerationConfig(
        do_sample=True,
        sequence_bias={(token,): float(bias) for token, bias in sampling.logit_bias.items()} or None,
        suppress_tokens=list(sampling.banned_ids) or None,
        eos_token_id=list(sampling.stop_ids) or None,
        **{name: getattr(sampling, name) for name in names},
    )
    config._eos_token_tensor = torch.tensor(sorted(sampling.stop_ids))
    model: Any = GenerationMixin()
    model.config = SimpleNamespace(is_encoder_decoder=False)
    processors = model._get_logits_processor(config, input_ids_seq_length=len(prompt), device="cpu")
    ids = torch.tensor([[*prompt, *made]]).expand(len(logits), -1)
    return processors(ids, logits.clone()).softmax(-1)


def test_the_filters_are_those_of_transformers() -> None:
    """Another order of the filters, one token more or less in the nucleus, dividing by the wrong temperature, or
    settings of another row: all combinations in one batch."""
    values = {"temperature": (0.3, 1.7), "top_k": (0, 7, 51), "top_p": (1e-6, 0.3, 0.9, 1.0), "min_p": (0.0, 0.05, 1.0)}
    own = [Sampling(**dict(zip(values, chosen, strict=True))) for chosen in product(*values.values())]  # type: ignore[arg-type]
    logits = random_logits(batch=len(own))
    found = chances(logits, *own)
    wanted = torch.cat([theirs(row[None], sampling) for row, sampling in zip(logits, own, strict=True)])
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "top_p": 0.9},
        {"logit_bias": {7: -3.5, 20: 4.0}},
        {"logit_bias": {7: 40.0}, "repetition_penalty": 1.9},  # the bias first: it is divided as well
        {"banned_ids": [0, 7, 49]},
        {"banned_ids": [7], "logit_bias": {7: 90.0}, "top_k": 3},
        {"min_new_tokens": 6, "stop_ids": [1, 2, 30]},
        {"min_new_tokens": 5, "stop_ids": [1, 2, 30]},  # five there are
    ],
)
def test_what_comes_before_the_temperature_is_as_in_transformers(changes: dict[str, Any]) -> None:
    """A penalty of logits below 0 that favours them, one for each time or for the answer alone, a bias after the
    penalty, a ban before the bias, and a stop id that comes a token too early or too late."""
    sampling = Sampling(temperature=0.8, **changes)
    torch.testing.assert_close(
        chances(random_logits(), sampling), theirs(random_logits(), sampling), rtol=1e-4, atol=1e-7
    )


def test_presence_and_frequency_are_those_of_the_formula() -> None:
    """OpenAI's formula, which transformers has not: logit - count * frequency - (count > 0) * presence, of the answer
    alone; catches tokens of the prompt that are counted, and signs."""
    logits = random_logits()
    wanted = logits.clone()
    for token in set(MADE):
        wanted[:, token] -= 0.4 * MADE.count(token) + 1.1
    found = chances(logits, Sampling(temperature=1, presence_penalty=1.1, frequency_penalty=0.4))
    torch.testing.assert_close(found, wanted.softmax(-1))


def test_tokens_count_as_they_are_accepted() -> None:
    """Penalties that stand still, that count one sequence's tokens for another, or that a new sequence inherits."""
    own = Sampling(temperature=1, frequency_penalty=0.5, repetition_penalty=1.2)
    logits = random_logits(batch=3)
    stepwise, at_once = (Sampler(3, 50), sampler_of([own, DRAWN, own]))
    stepwise.set(0, own, prompt=[49] * 9, made=[49])  # a sequence that was there before
    for slot, sampling in enumerate((own, DRAWN, own)):
        stepwise.set(slot, sampling, prompt=PROMPT)
    for token in MADE:
        stepwise.accept([1, 2, 0], torch.tensor([token, token, token]))
    rows = [0, 1, 2], [5] * 3
    assert torch.equal(stepwise.distribution(logits, *rows), at_once.distribution(logits, *rows))
    stepwise.accept([2, 2], [40, 40])
    found, before = stepwise.distribution(logits, *rows), at_once.distribution(logits, *rows)
    assert torch.equal(found[:2], before[:2]) and found[2, 40] < before[2, 40]


MIXED = [
    Sampling(),
    Sampling(temperature=0.9, top_p=0.95, seed=3),
    Sampling(temperature=1.4, top_k=5, repetition_penalty=1.3),
    Sampling(logit_bias={4: 30.0}, banned_ids=[5]),
    Sampling(temperature=1, min_p=0.1, frequency_penalty=0.9, logit_bias={2: 1.5}),
    Sampling(temperature=2, min_new_tokens=9, stop_ids=[0, 1], logprobs=2),
    Sampling(presence_penalty=2, logprobs=0),
    Sampling(temperature=0.7, top_k=40, top_p=0.5, min_p=0.02, seed=3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_alone_and_in_any_company(dtype: torch.dtype) -> None:
    """One row's settings applied to another, sums that depend on the number of rows, and random numbers by place in
    the batch, with which an answer would change when another ends."""
    logits = random_logits(batch=8, vocabulary=5000).to(dtype)
    together, slots = sampler_of(MIXED, 5000), range(8)
    torch.set_num_threads(2)  # which would share a row between them, if a sum let them
    for position in range(5, 12):
        choice = together.sample(logits, slots, [position] * 8)
        wanted = list(zip(choice.ids.tolist(), choice.details(), strict=True))
        for rows in ([4], [6, 2, 5], [7, 0], [3, 1, 0, 6, 5, 4, 2]):
            part = together.sample(logits[rows], rows, [position] * len(rows))
            assert list(zip(part.ids.tolist(), part.details(), strict=True)) == [wanted[row] for row in rows]
        for row, sampling in enumerate(MIXED):
            alone = Sampler(1, 5000)
            alone.set(0, sampling, number=row, prompt=PROMPT, made=MADE)
            assert alone.sample(logits[[row]], [0], [position]).ids.tolist() == [wanted[row][0]]


def test_the_nucleus_is_found_without_sorting_where_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short cut that ends a flat nucleus too early: both ways against transformers, on 3,000 tokens."""
    flat, steep = random_logits(1, 4, 3000) / 30, random_logits(2, 4, 3000)
    logits = torch.cat([flat, steep])
    sampling = Sampling(temperature=1.0, top_p=0.6)
    found, wanted = chances(logits, sampling), theirs(logits, sampling)
    assert torch.equal(found > 0, wanted > 0)
    assert (found[:4] > 0).sum() > 4 * 1000 and (found[4:] > 0).sum() < 4 * 100
    ties = torch.cat([torch.full((1, 400), 5.0), torch.zeros(1, 2600)], dim=1)
    for changes, kept in (({"top_k": 300, "top_p": 0.5}, 400), ({"min_p": 0.9}, 400), ({"min_p": 1e-3}, 3000)):
        found = chances(ties, Sampling(temperature=1, **changes))  # type: ignore[arg-type]
        assert int((found > 0).sum()) == kept


def test_ties_are_kept_together() -> None:
    """Equal logits, of which there are many in bfloat16, that are told apart by how they happened to be sorted."""
    logits = torch.tensor([[2.0, 5.0, 2.0, 1.0, 2.0]])
    for changes in ({"top_k": 2}, {"top_p": float(logits.softmax(-1)[0, 1]) + 1e-3}):
        found = chances(logits, Sampling(temperature=1, **changes))  # type: ignore[arg-type]
        assert (found[0] > 0).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0}, {"temperature": 1e-38}, {"top_p": 0}, {"top_p": 1e-300}, {"top_k": 1}, {"min_p": 1}],
)
def test_what_is_as_good_as_greedy_takes_the_most_likely_token(changes: dict[str, float]) -> None:
    """Logits that overflow, an empty nucleus whose softmax is NaN, or a draw."""
    logits = random_logits()
    own = Sampling(**({"temperature": 0.9} | changes))  # type: ignore[arg-type]
    made = sampler_of([own] * 6)
    for position in range(20):
        assert made.sample(logits, range(6), [position] * 6).ids.tolist() == [int(row.argmax()) for row in logits]
    assert torch.equal(chances(logits, own).argmax(-1), logits.argmax(-1))


def test_bfloat16_logits_are_filtered_in_float32() -> None:
    """Cumulated probabilities in bfloat16, which end far from 1."""
    logits = random_logits(batch=2, vocabulary=4000).bfloat16()
    sampling = Sampling(temperature=0.8, top_p=0.95)
    assert torch.equal(chances(logits, sampling), chances(logits.float(), sampling))


def test_log_probabilities_are_of_the_unmodified_distribution() -> None:
    """Those after temperature, penalties or filters, one token too many, or another row's."""
    logits = random_logits(batch=3)
    own = Sampling(temperature=0.5, top_k=3, frequency_penalty=2, logit_bias={30: 50.0}, logprobs=4)
    made = sampler_of([own, replace(own, logprobs=None), replace(own, logprobs=0)])
    choice = made.sample(logits, [0, 1, 2], [5] * 3)
    wanted = logits.log_softmax(-1)
    first, second, third = choice.details()
    assert choice.ids.tolist() == [30, 30, 30] and second is None and first is not None and third is not None
    assert first.logprob == pytest.approx(float(wanted[0, 30])) and third.logprob == pytest.approx(float(wanted[2, 30]))
    assert [token for token, _ in first.top] == logits[0].argsort(descending=True)[:4].tolist() and third.top == ()
    assert [value for _, value in first.top] == pytest.approx(wanted[0].sort(descending=True).values[:4].tolist())
    assert token_logprobs(logits, torch.tensor([1, 2, 3]), 1)[0].tolist() == pytest.approx(
        [float(wanted[row, row + 1]) for row in range(3)]
    )


def test_a_row_that_is_not_finite_is_marked_and_the_others_go_on() -> None:
    """One broken sequence that ends all, or that draws an arbitrary token."""
    logits = random_logits(batch=5)
    logits[1, 3], logits[2, 4], logits[3] = math.nan, math.inf, -math.inf
    logits[4, :49] = -math.inf
    for own in (Sampling(), DRAWN, replace(DRAWN, top_p=0.9, top_k=4, min_p=0.1), replace(DRAWN, logprobs=2)):
        ids = sampler_of([own] * 5).sample(logits, range(5), [0] * 5).ids.tolist()
        assert ids[1:] == [-1, -1, -1, 49] and ids[0] >= 0
    nothing = sampler_of([replace(DRAWN, banned_ids=range(50))])
    assert nothing.sample(logits[:1], [0], [0]).ids.tolist() == [-1]


def test_a_constraint_lets_its_tokens_through_alone() -> None:
    """A mask that comes before a bias, or that greedy rows pass by."""
    allowed = torch.zeros(8, 50, dtype=torch.bool)
    allowed[:, [6, 8]] = True
    made = sampler_of([replace(own, logprobs=None) for own in MIXED])
    drawn = [made.sample(random_logits(batch=8), range(8), [p] * 8, allowed).ids.tolist() for p in range(9)]
    assert {token for step in drawn for token in step} == {6, 8}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 1.1),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e39),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("min_new_tokens", -1),
        ("min_new_tokens", 257),
        ("max_new_tokens", -1),
        ("seed", -1),
        ("seed", 1 << 63),
        ("n", 0),
        ("logprobs", -1),
    ],
)
def test_a_bad_value_is_named_with_its_range(flag: str, value: Any) -> None:
    """NaN that slips through a comparison, or an error that does not say which flag."""
    shown = repr(value) if isinstance(value, str) else value
    with pytest.raises(UserError, match=re.escape(f"{param(flag)} is {shown}, expected ")) as caught:
        Sampling(**{flag: value})
    assert (caught.value.exit_status, caught.value.parameter, str(caught.value.value)) == (2, flag, str(value))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"banned_ids": [3, -1]}, "--banned_ids holds -1"),
        ({"stop_ids": ["a"]}, "--stop_ids holds 'a'"),
        ({"logit_bias": {1: math.nan}}, "--logit_bias holds 1: nan"),
        ({"logit_bias": {"x": 1.0}}, "--logit_bias holds 'x': 1.0"),
        ({"logit_bias": {1: 1e39}}, "--logit_bias holds 1: 1e[+]39"),
        ({"stop": ["a", ""]}, "--stop holds '', expected texts of 1 to 1000"),
        ({"stop": ["a"] * 10_000}, "--stop holds 10000 texts, expected at most 1000"),
        ({"stop": "x" * 2000}, "--stop holds 'x"),
    ],
)
def test_a_bad_part_is_named(changes: dict[str, Any], named: str) -> None:
    """A traceback amid a batch, where the request should have been refused."""
    with pytest.raises(UserError, match=named):
        Sampling(**changes)


def test_one_stop_string_may_stand_alone() -> None:
    """A text that is taken for its letters."""
    assert Sampling(stop="\n\n").stop == ("\n\n",) and Sampling(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(("ids", "named"), [([], "the prompt is empty"), ([1, -2], "holds -2"), ([1.5], "holds 1.5")])
def test_a_request_needs_ids(ids: list[Any], named: str) -> None:
    """Logits of nothing, or an id that ends in a traceback of the embedding."""
    with pytest.raises(UserError, match=named):
        Request(ids)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_beyond_the_tokenizer_are_never_drawn(temperature: float) -> None:
    """Rows that pad the embedding and have no token: drawing one would fail on decoding."""
    own = Sampling(temperature=temperature, max_new_tokens=60)
    drawn = [token for ids in made_by(tiny_model(), [[3, 4], [5]], own, tokens=20) for token in ids]
    assert len(drawn) == 120 and max(drawn) < 20
    assert max(made_by(tiny_model(), [[3, 4]], own)[0]) >= 20


def test_sequences_of_a_batch_are_drawn_each_in_its_own_way() -> None:
    """The settings of the first for all, and penalties that forget the prompt or an answer's tokens."""
    own = [Sampling(), Sampling(temperature=1), Sampling(repetition_penalty=1.5)]
    own = [replace(each, max_new_tokens=8) for each in own]
    greedy, drawn, penalised = made_by(tiny_model(), [[3, 4]] * 3, own)
    assert len({*penalised, 3, 4}) > len({*greedy, 3, 4}) and drawn not in (greedy, penalised)
    assert made_by(tiny_model(), [[3, 4]], own[2]) == [penalised]


def test_a_model_without_finite_logits_is_an_error_of_its_own() -> None:
    """An arbitrary text, or a traceback, out of damaged weights."""
    model = tiny_model()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(NumericalError, match="logits at token 1 are not finite"):
        made_by(model, [[3]], Sampling(max_new_tokens=2))
