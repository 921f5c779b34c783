"""llama.cpp itself as the reader of our GGUF files, from the wheel `xllamacpp`; tests skip where it cannot be had."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """A model that llama.cpp has loaded on the CPU, with float32 caches.

    Args:
        path: The GGUF file.
        adapters: GGUF adapters to put on it.
    """

    def __init__(self, path: Path, adapters: tuple[Path, ...] = ()) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
        params.warmup, params.verbosity = False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0) for adapter in adapters]
        self._server = xllamacpp.Server(params)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text: with the token that begins one, and control tokens in it as such, if `special`."""
        return list(self._ask("/tokenize", content=text, add_special=special, parse_special=special)["tokens"])

    def logprobs(self, ids: list[int], count: int) -> dict[int, float]:
        """The most likely ids to come next, and their log-probabilities."""
        # Half a character, or an end of text, would come without numbers: they are those before the sampler, which is
        # made to choose the digit at id 20.
        options = {"n_predict": 1, "n_probs": count, "temperature": 0, "cache_prompt": False}
        answer = self._ask("/completion", prompt=ids, logit_bias=[[20, 1000.0]], **options)
        return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The most likely continuation."""
        answer = self._ask("/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True)
        return list(answer["tokens"])

    def _ask(self, path: str, **body: Any) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, data, headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)
