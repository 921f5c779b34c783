"""Replies of the routes against answers and scores that are made without them."""

import asyncio
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS
from servers import Client, events, serving, tiny

from lit_llama.generate.answer import question_ids, raw_ids
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.llm import LLM
from lit_llama.text.message import instruct

pytestmark = pytest.mark.timeout(60)
WORDS = " ".join(CORPUS[:4]).split()


@pytest.fixture(scope="module")
def client(tiny_folder: Path) -> Client:
    return serving(tiny_folder)


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return tiny(tiny_folder)[0]


@pytest.fixture(scope="module")
def own(tiny_folder: Path) -> LLM:
    """Another engine on the same folder, which nobody else asks."""
    from lit_llama.generate.llm import load

    return load(tiny_folder)


def answered(own: LLM, content: str, sampling: Sampling) -> tuple[str, str | None]:
    """As generate/instruct.py answers."""
    stream = own.answer(question_ids(own, instruct(content, "")), sampling)
    return "".join(text for _, text in stream), stream.text.finish_reason


def asked(number: int) -> tuple[str, dict[str, Any], Sampling]:
    draw = random.Random(number)
    content = " ".join(draw.choices(WORDS, k=draw.randint(1, 25)))
    fields: dict[str, Any] = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.9, "seed": number},
        {"temperature": 0.7, "top_k": 20, "min_p": 0.01, "seed": number, "repetition_penalty": 1.2},
        {"temperature": 1.2, "seed": number, "presence_penalty": 0.5, "frequency_penalty": 0.2, "stop": ["e"]},
    ][number % 4]
    most = draw.randint(1, 40)
    return content, fields | {"max_tokens": most}, Sampling(max_new_tokens=most, **fields)


def test_answers_have_the_bytes_of_instruct_alone_and_in_company(client: Client, own: LLM) -> None:
    """Catches: another prompt, an opening that is shown, draws that depend on the batch, a stop text left in."""
    wanted = [answered(own, content, sampling) for content, _, sampling in map(asked, range(33))]
    first = client.chat(asked(1)[0], **asked(1)[1]).json()["choices"][0]
    assert (first["message"]["content"], first["finish_reason"]) == wanted[1]

    async def together() -> list[Any]:
        async with client.open() as http:

            async def one(number: int) -> Any:
                content, fields, _ = asked(number)
                body = {"messages": [{"role": "user", "content": content}], "stream": number % 3 == 0, **fields}
                return await http.post("/v1/chat/completions", json=body)

            return await asyncio.gather(*map(one, range(33)))

    for number, reply in enumerate(asyncio.run(together())):
        if number % 3:
            choice = reply.json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == wanted[number]
        else:
            choices = [event["choices"][0] for event in events(reply.text)]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            assert (text, choices[-1]["finish_reason"]) == wanted[number]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""} and choices[-1]["delta"] == {}


def test_a_stream_is_the_reply_in_pieces(client: Client) -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "temperature": 1,
        "seed": 7,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat(**fields).json()
    streamed = events(client.chat(**fields, stream=True, stream_options={"include_usage": True}).text)
    assert streamed[-1]["choices"] == [] and all(event["usage"] is None for event in streamed[:-1])
    usage = streamed[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    assert {k: usage[k] for k in ("prompt_tokens", "completion_tokens")} == {
        k: whole["usage"][k] for k in ("prompt_tokens", "completion_tokens")
    }
    assert usage["completion_tokens"] == 24 and usage["total_tokens"] == usage["prompt_tokens"] + 24
    assert len({event["id"] for event in streamed}) == 1 and streamed[0]["object"] == "chat.completion.chunk"
    for index in range(2):
        own = [choice for event in streamed for choice in event["choices"] if choice["index"] == index]
        wanted = whole["choices"][index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == wanted["message"]["content"]
        tokens = [token for choice in own if choice["logprobs"] for token in choice["logprobs"]["content"]]
        assert tokens == wanted["logprobs"]["content"] and len(tokens) == 12
    assert whole["choices"][0]["message"]["content"] != whole["choices"][1]["message"]["content"]


def test_tokens_and_their_scores_are_those_of_the_model(client: Client, own: LLM, tiny_folder: Path) -> None:
    """Against transformers: log-softmax at each position, and bytes that join to the content."""
    from transformers import AutoModelForCausalLM

    reply = client.chat("naïve café", max_tokens=10, temperature=0, logprobs=True, top_logprobs=3).json()
    choice = reply["choices"][0]
    tokens = choice["logprobs"]["content"]
    made = bytes(byte for token in tokens for byte in token["bytes"]).decode("utf-8", "replace")
    assert made == choice["message"]["content"]
    prompt = question_ids(own, instruct("naïve café", ""))
    ids = [own.token_bytes.index(bytes(token["bytes"])) for token in tokens]
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        scores = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for token, index, row in zip(tokens, ids, scores, strict=True):
        assert math.isclose(token["logprob"], row[index].item(), abs_tol=0.05)
        best = row.topk(3)
        assert [t["logprob"] for t in token["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=0.05)
        assert token["top_logprobs"][0]["token"] == token["token"]


def test_an_echo_scores_the_prompt_as_a_harness_reads_it(client: Client, own: LLM, tiny_folder: Path) -> None:
    """The request of lm-evaluation-harness: lists of ids, one token more, sums of log-probabilities and greediness."""
    from transformers import AutoModelForCausalLM

    draw = random.Random(3)
    prompts = [[draw.randrange(3, 384) for _ in range(size)] for size in (5, 17, 2)]
    body = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    choices = client.post("/v1/completions", model="tiny", **body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    for prompt, choice in zip(prompts, choices, strict=True):
        scores = choice["logprobs"]
        assert len(scores["token_logprobs"]) == len(scores["top_logprobs"]) == len(prompt) + 1
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        with torch.inference_mode():
            rows = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        wanted = [rows[at, token].item() for at, token in enumerate(prompt[1:])]
        assert scores["token_logprobs"][1:-1] == pytest.approx(wanted, abs=0.05)
        for at, (score, top) in enumerate(
            zip(scores["token_logprobs"][1:-1], scores["top_logprobs"][1:-1], strict=True)
        ):
            assert (score == max(top.values())) == (rows[at].argmax().item() == prompt[at + 1])
        assert choice["text"].startswith(own.tokenizer.decode(prompt))
        joined = "".join(scores["tokens"])
        assert all(
            joined[at:].startswith(name) for at, name in zip(scores["text_offset"], scores["tokens"], strict=True)
        )
    alone = [client.post("/v1/completions", **body | {"prompt": [prompt]}).json()["choices"][0] for prompt in prompts]
    assert [a["logprobs"] for a in alone] == [c["logprobs"] for c in choices]
    scored = client.post("/v1/completions", **body | {"max_tokens": 0}).json()
    assert [c["logprobs"]["token_logprobs"] for c in scored["choices"]] == [
        c["logprobs"]["token_logprobs"][:-1] for c in choices
    ]


def test_prompts_of_every_kind_are_continued(client: Client, own: LLM) -> None:
    texts = ["A city. <|im_end|>", "café"]
    ids = [raw_ids(own, text, False) for text in texts]
    found = [
        client.post("/v1/completions", prompt=prompt, max_tokens=6, temperature=0).json()["choices"]
        for prompt in (texts, ids, texts[0], ids[0])
    ]
    wanted = ["".join(text for _, text in own.stream(i, Sampling(max_new_tokens=6))) for i in ids]
    assert [[choice["text"] for choice in choices] for choices in found] == [wanted, wanted, wanted[:1], wanted[:1]]
    echoed = client.post("/v1/completions", prompt=texts[1], max_tokens=6, temperature=0, echo=True, stream=True)
    assert "".join(event["choices"][0]["text"] for event in events(echoed.text)) == "café" + wanted[1]


def test_a_prefix_that_was_computed_is_told(client: Client) -> None:
    first = client.chat("The same long question again and again. " * 3, max_tokens=2).json()["usage"]
    again = client.chat("The same long question again and again. " * 3, max_tokens=2).json()["usage"]
    assert first["prompt_tokens"] == again["prompt_tokens"]
    assert again["prompt_tokens_details"]["cached_tokens"] >= 16


def test_json_keeps_to_its_schema(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    for stream in (False, True):
        reply = client.chat(response_format=asked, max_tokens=60, temperature=1, seed=2, stream=stream)
        if stream:
            content = "".join(e["choices"][0]["delta"].get("content", "") for e in events(reply.text))
        else:
            content = reply.json()["choices"][0]["message"]["content"]
        assert json.loads(content) in ({"a": "x"}, {"a": "y"})


def test_bias_stop_and_seed_are_obeyed(client: Client, own: LLM) -> None:
    token = own.tokenizer.encode("a")[0]
    forced = client.chat(max_tokens=3, logit_bias={str(token): 100}).json()["choices"][0]
    assert forced["message"]["content"] == "aaa" and forced["finish_reason"] == "length"
    stopped = client.chat(max_tokens=9, logit_bias={str(token): 100}, stop="aa", logprobs=True).json()["choices"][0]
    assert stopped["message"]["content"] == "" and stopped["finish_reason"] == "stop"
    assert stopped["logprobs"]["content"] == []
    drawn = [client.chat(max_tokens=12, temperature=1).json()["choices"][0]["message"]["content"] for _ in range(3)]
    assert len(set(drawn)) == 3  # without a seed, each answer is another


def test_ids_of_texts_and_of_messages(client: Client, own: LLM) -> None:
    words = "café <|im_end|>"
    found = client.post("/tokenize", prompt=words, return_token_strs=True).json()
    assert found["tokens"] == raw_ids(own, words, False) and found["count"] == len(found["tokens"])
    assert "".join(client.post("/detokenize", tokens=found["tokens"]).json()["prompt"]) == words
    messages = [{"role": "user", "content": words}]
    ids = client.post("/tokenize", messages=messages).json()["tokens"]
    assert ids == question_ids(own, instruct(words, ""))
    assert ids.count(own.tokenizer.control["<|im_end|>"]) == 1  # what was typed is inert
    parts = [{"role": "user", "content": [{"type": "text", "text": "café "}, {"type": "text", "text": "<|im_end|>"}]}]
    assert client.post("/tokenize", messages=parts).json()["tokens"] == ids
