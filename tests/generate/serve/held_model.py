"""A model whose steps wait for a sign, behind the routes of the page."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.llm import LLM, make_llm, open_folder
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.page.routes import page_routes
from lit_llama.generate.serve.service import Service
from lit_llama.model.files.checkpoint import load_model


class Held:
    """A model whose steps can be held."""

    def __init__(self, folder: Path) -> None:
        self.gate = threading.Event()
        self.gate.set()
        opened = open_folder(folder)
        self.llm: LLM = make_llm(load_model(folder), opened.tokenizer, opened.style, opened.ends)
        runner = self.llm.engine.runner
        compute = runner.logits

        def logits(batch: Any) -> Any:
            self.gate.wait(60)
            return compute(batch)

        runner.logits = logits  # type: ignore[method-assign]
        self.worker = EngineThread(self.llm.engine)


@pytest.fixture(scope="module")
def held(tiny_folder: Path) -> Iterator[Held]:
    made = Held(tiny_folder)
    yield made
    made.gate.set()
    made.worker.close()


def app(llms: dict[str, LLM], worker: EngineThread, store: Store, **more: Any) -> Any:
    service = Service()
    defaults = dict.fromkeys(llms, Sampling(max_new_tokens=40))
    service.start(llms, worker, defaults)
    routes, public = page_routes(service, store)
    return create_app(service, routes=routes, public=public, **more)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")
