"""The models of a server: each with its tokenizer and its style, all on one engine that a thread drives."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_llama.generate.engine.request import Overflow, Sampling
from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.llm import LLM
from lit_llama.generate.serve.fields import ApiError
from lit_llama.model.kernels.paged import BLOCK

MAX_NEW_TOKENS = 4096
"""Tokens of a chat's answer where the request does not say, as far as the context has room."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server.

    Args:
        max_body: Bytes of a request.
        max_length: Tokens of a prompt with its answer; None for what the model reads and the cache holds.
        max_choices: Answers of a request: its prompts, `n` times each.
        max_waiting: Answers that may wait, beside those that are made together.
        max_seconds: That a request may take.
        overflow: What becomes of a prompt that is too long with its answer.
        body_seconds: In which a request has to arrive.
    """

    max_body: int = 16 << 20
    max_length: int | None = None
    max_choices: int = 128
    max_waiting: int = 256
    max_seconds: float = 600.0
    body_seconds: float = 30.0
    overflow: Overflow = "error"


@dataclass(frozen=True)
class Models:
    """The models by their names, the first one is that of requests that name none.

    Args:
        llms: All on one engine.
        worker: The thread that drives it.
        limits: Of requests.
        defaults: How each is sampled where a request does not say; those left out take the most likely token.
    """

    llms: Mapping[str, LLM]
    worker: EngineThread
    limits: Limits
    defaults: Mapping[str, Sampling] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def find(self, name: str | None) -> tuple[str, LLM]:
        """Find a model by its name.

        Raises:
            ApiError: There is none.
        """
        name = next(iter(self.llms)) if name is None else name
        if name not in self.llms:
            known = ", ".join(self.llms)
            raise ApiError(
                404, f"model: there is no {name[:100]!r}, expected one of {known}", "model", "model_not_found"
            )
        return name, self.llms[name]

    def default(self, name: str) -> Sampling:
        """Return the sampling of a model where a request does not say."""
        return self.defaults.get(name) or Sampling(max_new_tokens=MAX_NEW_TOKENS)

    def capacity(self, llm: LLM) -> int:
        """Return the most tokens of a prompt with its answer."""
        reads, holds = llm.config.context_length, self.worker.engine.statistics().blocks * BLOCK
        return min(reads, holds, self.limits.max_length or reads)

    def described(self, name: str) -> dict[str, Any]:
        """Describe a model as /v1/models lists it; an adapter with its `parent`."""
        llm = self.llms[name]
        base = next((other for other, own in self.llms.items() if own.adapter is None), None)
        parent = None if llm.adapter is None else base
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "lit_llama",
            "root": name,
            "parent": parent,
            "max_model_len": self.capacity(llm),
        }
