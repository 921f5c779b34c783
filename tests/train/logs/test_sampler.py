"""Sample answers during training: the same prompts, the answers of generate/, and a training that does not notice."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import as_transformers, tiny_config, tiny_model

from lit_llama.device import Numerics
from lit_llama.errors import DataError, NumericalError
from lit_llama.folder.publish import write_json_lines
from lit_llama.generate.engine.request import Request
from lit_llama.generate.llm import LLM, make_llm
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.kernels.decode import packs
from lit_llama.model.kernels.paged import BLOCK
from lit_llama.text.prompts.encode import named_style
from lit_llama.text.prompts.styles import Plain
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.train.logs import sampler as sampler_module
from lit_llama.train.logs.sampler import MAX_NEW_TOKENS, Prompt, Sampler, test_prompts

test_prompts.__test__ = False  # type: ignore[attr-defined]
COPIED = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not packs(tiny_config(), torch.float32), reason="needs a compiler")),
]
"""Whether a packed copy answers."""
ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}!"} for n in range(10)]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    """The tiny model with a random adapter."""
    return make(tiny_folder, torch.float32)


def make(folder: Path, dtype: torch.dtype, dropout: float = 0.5) -> LLM:
    model = load_model(folder, torch.device("cpu"), dtype)
    apply_lora(model, LoRAConfig(r=2, dropout=dropout))
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = Tokenizer.from_path(folder)
    return make_llm(model, tokenizer, named_style("alpaca"), frozenset({tokenizer.eos_id}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """test.jsonl of a data folder with ten rows."""
    write_json_lines(tmp_path / "test.jsonl", ROWS)
    return tmp_path / "test.jsonl"


def test_prompts_stand_evenly_over_the_rows_and_are_always_the_same(llm: LLM, file: Path) -> None:
    """Catches prompts drawn by chance, the first rows of a sorted file, and prompts in another style."""
    prompts = test_prompts(llm, file, 4)
    assert [prompt.row for prompt in prompts] == [0, 2, 5, 7]
    assert prompts == test_prompts(llm, file, 4)
    assert (prompts[1].text, prompts[1].reference) == ("Say 2.", "2!")
    text = llm.tokenizer.decode(list(prompts[1].ids))
    assert "### Instruction:\nSay 2.\n" in text and text.endswith("### Response:")
    assert len(test_prompts(llm, file, 99)) == 10


def test_a_row_that_leaves_no_room_is_passed_over(llm: LLM, tmp_path: Path) -> None:
    """Catches a run that ends because one test row is longer than the model reads."""
    rows = [{**row, "input": "x y z " * 200 * (n in (0, 5, 6))} for n, row in enumerate(ROWS)]
    write_json_lines(tmp_path / "test.jsonl", rows)
    assert [prompt.row for prompt in test_prompts(llm, tmp_path / "test.jsonl", 4)] == [1, 2, 7, 8]
    write_json_lines(tmp_path / "test.jsonl", [rows[0]])
    with pytest.raises(DataError, match="no row can be asked of a model that reads 256"):
        test_prompts(llm, tmp_path / "test.jsonl", 4)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        test_prompts(llm, tmp_path / "none.jsonl", 4)


def test_chats_and_plain_texts_are_asked_as_well(llm: LLM, tmp_path: Path) -> None:
    """Catches a style that only instructions have, and an end of a text that is given away."""
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Who?"), ("assistant", "I.")]
    chat = make_llm(llm.model, llm.tokenizer, named_style("chatml"), llm.stop_ids)
    write_json_lines(tmp_path / "chat.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    (prompt,) = test_prompts(chat, tmp_path / "chat.jsonl", 4)
    assert prompt.reference == "I." and prompt.text.endswith("assistant: Ho\n\nuser: Who?")
    plain = make_llm(llm.model, llm.tokenizer, Plain(), llm.stop_ids)
    write_json_lines(tmp_path / "text.jsonl", [{"text": "A city is a city. " * 40}, {"text": "Two words"}])
    long, short = test_prompts(plain, tmp_path / "text.jsonl", 4)
    assert (long.text + long.reference)[:200] == ("A city is a city. " * 40)[:200] and short.text + short.reference
    assert len(long.ids) <= sampler_module.OPENING + 1 and len(short.ids) < len("Two words")


@pytest.mark.parametrize("copied", COPIED)
def test_answers_are_those_of_greedy_decoding_elsewhere(tiny_folder: Path, file: Path, copied: bool) -> None:
    """Against transformers with the adapter merged; catches dropout in an answer, a limit that counts the prompt, and a
    copy without the adapter, or with that of an evaluation before."""
    plain = make(tiny_folder, torch.float32)
    sampler = Sampler(plain, test_prompts(plain, file, 3), 4096, packs=copied)
    plain.model.train()
    sampler.answers()
    for parameter in lora_parameters(plain.model):
        parameter.data.mul_(-0.7)
    answers = sampler.answers()
    for module in [m for m in plain.model.modules() if hasattr(m, "lora_A")]:
        module.weight = torch.nn.Parameter(module.weight + module.scale * module.lora_B @ module.lora_A)
    state = {name: value for name, value in plain.model.state_dict().items() if "lora_" not in name}
    bare = tiny_model(tie_word_embeddings=plain.model.config.tie_word_embeddings)
    bare.load_state_dict(state)
    other = as_transformers(bare)
    for prompt, answer in zip(sampler.prompts, answers, strict=True):
        ids = torch.tensor([list(prompt.ids)])
        made = other.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(plain.stop_ids),
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        stopped = made[-1] in plain.stop_ids
        assert (answer.stopped, answer.tokens) == (stopped, len(made))
        assert answer.text == plain.tokenizer.decode(made[:-1] if stopped else made)


def test_mixed_precision_answers_in_the_numbers_of_the_training(tmp_path: Path, llm: LLM, file: Path) -> None:
    """Catches products of float32 and bfloat16 where a linear layer has no adapter, as a head of its own, and keys in
    bfloat16 that find no place in a cache of float32."""
    half = torch.bfloat16
    numbers = Numerics(device=torch.device("cpu"), linear=half, rest=torch.float32, product=half)
    as_transformers(tiny_model(tie_word_embeddings=False)).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", numbers.device, numbers.rest, linear_dtype=half)
    apply_lora(model, LoRAConfig(r=2, target_modules="q_proj"))
    made, seen = make_llm(model, llm.tokenizer, named_style("alpaca"), llm.stop_ids), []
    (prompt,) = test_prompts(made, file, 1)
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits))
    Sampler(made, [prompt], 4096, numbers).answers()
    with numbers.autocast(), torch.no_grad():
        wanted = model(torch.tensor(list(prompt.ids)))[-1:]
    assert seen[0].dtype == half
    torch.testing.assert_close(seen[0], wanted, atol=0.05, rtol=0)


@pytest.mark.parametrize(("dtype", "copied"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_training_does_not_notice(tiny_folder: Path, file: Path, dtype: torch.dtype, copied: bool) -> None:
    """A step of training before and after answers gives the same gradients; catches a random number that is drawn, a
    mode that stays, gradients that are cleared or added to, and tensors that can no longer be trained on."""
    from lit_llama.model.attention.layout import Packed

    if copied and not packs(tiny_config(), dtype):
        pytest.skip("needs a compiler")
    made = make(tiny_folder, dtype)
    sampler = Sampler(made, test_prompts(made, file, 2), 4096, packs=copied)
    ids = torch.arange(5, 25)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)
        made.model.zero_grad()
        if asked:
            sampler.answers()
        made.model(ids, Packed([20])).float().logsumexp(-1).sum().backward()
        return [parameter.grad.clone() for parameter in lora_parameters(made.model)]

    made.model.train()
    asked = False
    before = gradients()
    asked = True
    after = gradients()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert made.model.training and all(module.training for module in made.model.modules())
    made.model.eval()
    sampler.answers()
    assert not made.model.training


def test_the_mode_comes_back_after_a_failure(llm: LLM, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training that goes on without dropout."""
    sampler = Sampler(llm, test_prompts(llm, file, 2), 4096)
    monkeypatch.setattr(sampler_module, "answer_requests", lambda *_: 1 / 0)
    llm.model.train()
    with pytest.raises(ZeroDivisionError):
        sampler.answers()
    assert llm.model.training


def test_the_cache_is_no_larger_than_a_micro_batch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that is larger than what the training step holds, prompts left out, and answers exchanged."""
    held: list[int] = []

    def answer(asked: LLM, requests: list[Request]) -> list[Any]:
        held.append(asked.engine.statistics().blocks * BLOCK)
        assert all(request.sampling.temperature == 0 for request in requests)
        assert all(len(r.ids) + r.sampling.max_new_tokens <= llm.config.context_length for r in requests)
        return [[SimpleNamespace(text=len(request.ids), stopped=True, error=None)] for request in requests]

    monkeypatch.setattr(sampler_module, "answer_requests", answer)
    prompts = [Prompt(n, "", "", list(range(1, 1 + length))) for n, length in enumerate((10, 20, 200, 30, 40))]
    for limit in (1, 700, 10_000):
        answers = Sampler(llm, prompts, limit).answers()
        assert [answer.text for answer in answers] == [10, 20, 200, 30, 40]
        assert held[-1] <= max(limit, llm.config.context_length) + 2 * BLOCK


def test_an_answer_that_fails_is_no_sample(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a line of samples.jsonl that looks as if the model had said nothing."""
    failed = SimpleNamespace(text="", stopped=False, error=NumericalError("not finite"))
    monkeypatch.setattr(sampler_module, "answer_requests", lambda *_: [[failed]])
    with pytest.raises(NumericalError, match="not finite"):
        Sampler(llm, [Prompt(0, "", "", [1])], 1).answers()


@pytest.mark.parametrize("copied", COPIED)
def test_caches_and_copies_are_let_go(llm: LLM, file: Path, monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    """Catches keys and values, or a second model, that stay in memory until the next evaluation, or until the collector
    of cycles comes by."""
    import gc
    import weakref

    name, held = "copied_engine" if copied else "torch_engine", list[Any]()
    build = getattr(sampler_module, name)

    def remembered(*arguments: Any) -> Any:
        engine = build(*arguments)
        held.extend(map(weakref.ref, (engine.runner, engine.runner._cache)))
        return engine

    monkeypatch.setattr(sampler_module, name, remembered)
    gc.disable()
    try:
        Sampler(llm, test_prompts(llm, file, 2), 1, packs=copied).answers()
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_rows_are_lines_of_json(llm: LLM, file: Path) -> None:
    """Catches a row from which the answer cannot be told from the reference."""
    sampler = Sampler(llm, test_prompts(llm, file, 2), 4096)
    answers = sampler.answers()
    (first, _) = [json.loads(json.dumps(row)) for row in sampler.rows(answers)]
    assert first == {
        "row": 0,
        "prompt": "Say 0.",
        "answer": answers[0].text,
        "reference": "0!",
        "stopped": answers[0].stopped,
    }
