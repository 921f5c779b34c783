"""Sampling against transformers' logits processors and against the distribution itself."""

import math

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

from lit_llama.errors import UserError
from lit_llama.generate.decode import generate
from lit_llama.generate.sampling import Sampling, choose, generators, probabilities


def random_logits(seed: int = 0, batch: int = 6, vocabulary: int = 50) -> Tensor:
    return 3 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 51])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_the_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    """Another order of the filters, one token more or less in the nucleus, or dividing by the wrong temperature."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits()
    wanted = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    wanted = TopPLogitsWarper(top_p)(None, wanted).softmax(-1)
    found = probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_the_most_likely_token_is_always_kept() -> None:
    """An empty nucleus, whose softmax is NaN."""
    found = probabilities(random_logits(), Sampling(temperature=1.0, top_p=1e-9, top_k=1))
    assert torch.equal(found.argmax(-1), random_logits().argmax(-1))
    assert torch.equal(found.max(-1).values, torch.ones(6))


def test_bfloat16_logits_are_filtered_in_float32() -> None:
    """Cumulated probabilities in bfloat16, which end far from 1."""
    logits = random_logits(batch=2, vocabulary=4000).bfloat16()
    sampling = Sampling(temperature=0.8, top_p=0.95)
    assert torch.equal(probabilities(logits, sampling), probabilities(logits.float(), sampling))


def test_temperature_0_takes_the_most_likely_token() -> None:
    """A draw, or a division by zero, where the answer must be the argmax whatever the other filters say."""
    logits = random_logits()
    streams = generators(range(len(logits)), Sampling())
    assert choose(logits, Sampling(top_k=5, top_p=0.5), streams) == [int(row.argmax()) for row in logits]


def draw(logits: Tensor, seed: int, count: int = 40) -> list[list[int]]:
    sampling = Sampling(temperature=1.0, seed=seed)
    streams = generators(range(len(logits)), sampling)
    return [choose(logits, sampling, streams) for _ in range(count)]


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    """A generator that is not seeded, or a seed that is ignored."""
    assert draw(random_logits(), seed=3) == draw(random_logits(), seed=3)
    assert draw(random_logits(), seed=3) != draw(random_logits(), seed=4)


def test_sequences_of_a_batch_draw_from_different_streams() -> None:
    """One stream for all, with which equal prompts would give equal answers."""
    columns = list(zip(*draw(random_logits(batch=1).expand(3, -1), seed=0), strict=True))
    assert len(set(columns)) == 3


def test_the_global_generator_is_left_alone() -> None:
    """Draws that depend on, or disturb, whatever else is random in the process."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(random_logits(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rows", [[4], [1, 3], [5, 0, 2]])
def test_a_batch_draws_the_same_as_each_sequence_alone(rows: list[int]) -> None:
    """Streams by place in the batch, with which a sequence that ends early would change the others."""
    logits, sampling = random_logits(), Sampling(temperature=0.9, top_p=0.95, seed=11)
    together = generators(range(6), sampling)
    apart = dict(zip(rows, generators(rows, sampling), strict=True))
    for _ in range(20):
        drawn = choose(logits, sampling, together)
        found = choose(logits[rows], sampling, [apart[row] for row in rows])
        assert found == [drawn[row] for row in rows]


def test_frequencies_fit_the_distribution() -> None:
    """Draws from other probabilities than those computed: chi-squared over 20,000 draws of a known distribution."""
    wanted = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    sampling, draws = Sampling(temperature=2.0, seed=5), 20_000
    streams = generators([0], sampling)
    logits = 2 * wanted.log()[None]
    counts = torch.zeros(5)
    for _ in range(draws):
        counts[choose(logits, sampling, streams)[0]] += 1
    chi_squared = ((counts - draws * wanted) ** 2 / (draws * wanted)).sum().item()
    assert chi_squared < 18.47  # 99.9 % of true distributions with 4 degrees of freedom


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 1 << 64),
    ],
)
def test_a_bad_value_is_named_with_its_range(flag: str, value: float) -> None:
    """NaN that slips through a comparison, or an error that does not say which flag."""
    with pytest.raises(UserError, match=rf"--{flag} is {value}, expected .+") as caught:
        Sampling(**{flag: value})  # type: ignore[arg-type]
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_beyond_the_tokenizer_are_never_drawn(temperature: float) -> None:
    """Rows that pad the embedding and have no token: drawing one would fail on decoding."""
    model = tiny_model()
    steps = generate(
        model,
        [[3, 4], [5]],
        max_new_tokens=60,
        stop_ids=(),
        sampling=Sampling(temperature=temperature),
        tokens=20,
    )
    drawn = [token for step in steps for _, token in step]
    assert len(drawn) == 120 and max(drawn) < 20
    free = generate(model, [[3, 4]], max_new_tokens=60, stop_ids=(), sampling=Sampling(temperature=temperature))
    assert max(token for step in free for _, token in step) >= 20
