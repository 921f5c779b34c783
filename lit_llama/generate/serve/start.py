"""A server out of folders: checked before anything is loaded, listening while it is."""

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.routing import BaseRoute

from lit_llama.device import share_freed_memory
from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.engine.request import Overflow, Sampling
from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.flags import Asked
from lit_llama.generate.llm import LLM, Opened, open_folder
from lit_llama.generate.loading import Loading
from lit_llama.generate.models import check_merging, load_models
from lit_llama.generate.serve.app import create_app
from lit_llama.generate.serve.guard import is_loopback
from lit_llama.generate.serve.models import MAX_NEW_TOKENS, Limits
from lit_llama.generate.serve.server import KEYS, addresses, listen, read_keys, serve
from lit_llama.generate.serve.service import Service
from lit_llama.progress import stderr

_DRAIN = 60.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Address and limits of a server; see generate/serve.py.

    Raises:
        UserError: A limit is below 1, or the port is none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    max_waiting: int = 256
    max_choices: int = 128
    max_length: int | None = None
    max_body: int = 16 << 20
    max_seconds: float = 600.0
    log_content: bool = False
    overflow: Overflow = "error"

    def __post_init__(self) -> None:
        least = {"max_waiting": 0, "max_length": 2}
        for name in ("max_waiting", "max_choices", "max_length", "max_body", "max_seconds"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise UserError(f"--{name} is {value}, expected {least.get(name, 1)} or more")
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"--port is {self.port}, expected 0 (any that is free) to 65535")

    @property
    def limits(self) -> Limits:
        """Limits of requests."""
        return Limits(
            max_body=self.max_body,
            max_length=self.max_length,
            max_choices=self.max_choices,
            max_waiting=self.max_waiting,
            max_seconds=self.max_seconds,
            overflow=self.overflow,
        )


def start(
    folder: Path,
    adapters: Mapping[str, Path],
    settings: Settings,
    loading: Loading | None = None,
    *,
    routes: Callable[[Service], tuple[Sequence[BaseRoute], Sequence[str]]] = lambda service: ((), ()),
) -> None:
    """Serve a folder and adapters until a signal comes.

    Args:
        folder: A checkpoint folder or an adapter folder.
        adapters: Further adapter folders by name.
        settings: Address and limits.
        loading: How models are loaded.
        routes: Gives further routes, and the paths among them that need no key.

    Raises:
        UserError: The models cannot be loaded, the address cannot be had, or others could ask without a key.
    """
    share_freed_memory()
    keys, local = read_keys(settings.api_key_file), is_loopback(settings.host)
    if not local and not keys:
        raise UserError(
            f"--host {settings.host} is reached by other machines, so a key is needed: put one into a file for "
            f"--api_key_file, or into {KEYS}, such as {secrets.token_hex(24)}"
        )
    loading = loading or Loading()
    check_folders(folder, adapters, loading)
    console = stderr()
    made = listen(settings.host, settings.port)
    content = console.print if settings.log_content else None
    service = Service(settings.limits, log=console.print, content_log=content)
    more, public = routes(service)
    app = create_app(service, keys=keys, local=local, routes=more, public=public)

    def load() -> Callable[[], object]:
        llms, defaults = _load(folder, adapters, loading)
        worker = EngineThread(next(iter(llms.values())).engine)
        service.start(llms, worker, defaults)
        console.print(f"serving {', '.join(llms)} at {' '.join(addresses(made))}/v1")
        with contextlib.suppress(ResourceError):  # for the first constraint, meanwhile
            _ = next(iter(llms.values())).token_table
        return worker.close

    console.print(f"listening at {' '.join(addresses(made))}, loading {folder}")
    serve(app, made, load, drain=min(_DRAIN, settings.max_seconds), said=console.print)


def check_folders(folder: Path, adapters: Mapping[str, Path], loading: Loading) -> Opened:
    """Open the folder, if it and all others can be opened, as far as that is seen without their weights.

    Raises:
        CheckpointError: One is no checkpoint folder, or no adapter folder.
        UserError: One is to be merged, and others to be beside it.
    """
    check_merging(loading, adapters)
    opened = open_folder(folder, loading)
    for path in adapters.values():
        open_folder(path, loading)
    if loading.draft_dir is not None:
        open_folder(loading.draft_dir)
    return opened


def _load(
    folder: Path, adapters: Mapping[str, Path], loading: Loading
) -> tuple[Mapping[str, LLM], Mapping[str, Sampling]]:
    """The models, and how each is sampled where a request does not say."""
    opened = open_folder(folder, loading)
    llms: Mapping[str, LLM]
    if opened.style is None and not adapters:  # it continues texts, and no more
        llms = {folder.resolve().name: opened.load()}
    else:
        llms = load_models(folder, adapters, loading)
    asked = Asked({}, Sampling(max_new_tokens=MAX_NEW_TOKENS))
    own = {name: open_folder(path, loading).sampling for name, path in adapters.items()}
    return llms, {name: asked.over(own.get(name, opened.sampling)) for name in llms}
