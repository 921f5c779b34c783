"""A server out of folders: checked before anything is loaded, listening while it is.

Its process has a socket and signals, and gives up connections that send too slowly.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute
from uvicorn.protocols.http.h11_impl import H11Protocol

from lit_llama.device import share_freed_memory
from lit_llama.errors import Interrupted, ResourceError, UserError
from lit_llama.generate.engine.request import Overflow, Sampling
from lit_llama.generate.engine.worker import EngineThread
from lit_llama.generate.flags import Asked, Loading
from lit_llama.generate.llm import LLM, Opened, open_folder
from lit_llama.generate.models import check_merging, load_models, open_adapter
from lit_llama.generate.serve.app import create_app, is_loopback
from lit_llama.generate.serve.models import MAX_NEW_TOKENS, Limits
from lit_llama.generate.serve.service import Service
from lit_llama.progress import stderr
from lit_llama.wording import param

KEYS = "LIT_LLAMA_API_KEY"
"""Environment variable with a key, or several that commas part."""
_HEAD_SECONDS = 10.0
_CONNECTIONS = 1024
_SHORTEST_KEY = 16


def read_keys(file: Path | None) -> list[str]:
    """Read keys out of a file, one a line, and out of the environment.

    Raises:
        UserError: The file cannot be read or holds none, or a key is short or has blanks.
    """
    lines = os.environ.get(KEYS, "").split(",")
    if file is not None:
        try:
            own = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: the keys cannot be read: {error}") from error
        own = [line for line in own if line and not line.startswith("#")]
        if not own:
            raise UserError(f"{file} holds no key, expected one on each line")
        lines += own
    keys = [line.strip() for line in lines if line.strip()]
    for key in keys:
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"an API key has {len(key)} characters, expected at least {_SHORTEST_KEY} letters, digits and signs "
                "without blanks, as `openssl rand -hex 24` gives them"
            )
    return keys


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens.

    Raises:
        ResourceError: The address is taken, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ResourceError(f"{host} is no address of this machine: {error}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except (OSError, OverflowError) as error:
        made.close()
        raise ResourceError(f"nothing can listen at {host} port {port}: {error}; name another port") from error
    return made


class Impatient(H11Protocol):
    """HTTP of uvicorn, that gives up a connection on which no request comes, or half of one.

    uvicorn has no such limit of its own, but for connections that are idle after a reply.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the head of a request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take data, and wait for the rest of a head."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Wait for the rest of a head, from when its beginning came."""
        if not self._waiting():
            self._calm()
        elif self._patience is None:
            self._patience = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _calm(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _waiting(self) -> bool:
        cycle: Any = self.cycle  # None before the first request, whatever its type says
        return cycle is None or bool(cycle.response_complete)

    def _give_up(self) -> None:
        self._patience = None
        if self._waiting() and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer, as the connection is lost."""
        self._calm()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """A server whose first signal lets it answer what it was asked, and whose second ends it at once.

    Attributes:
        ended_by: The second signal.
        stopped: When the first one came.
    """

    ended_by: int | None = None
    stopped: float | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as long as it serves, where that is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._stop)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP  # as under nohup
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        if self.should_exit:
            self.ended_by, self.force_exit = number, True
        self.should_exit, self.stopped = True, self.stopped or time.monotonic()


def make_server(app: Starlette, drain: float) -> Server:
    """Build a server of an application, which `serve(sockets=[...])` runs; `drain` as for `serve`."""
    config = uvicorn.Config(
        app,
        http=Impatient,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(drain)),
    )
    server = Server(config)
    app.state.stopping = lambda: server.should_exit  # for replies that have no end of their own
    return server


def serve(
    app: Starlette,
    made: socket.socket,
    load: Callable[[], Callable[[], object]],
    *,
    drain: float,
    said: Callable[[str], object],
) -> None:
    """Serve until a signal comes; answers that are being made are finished first.

    Args:
        app: See `create_app`.
        made: A socket that listens.
        load: Loads the models meanwhile, in a thread, and gives what ends them.
        drain: Seconds for the last answers.
        said: Takes lines for people.

    Raises:
        UserError: The models cannot be loaded.
        Interrupted: A second signal came.
    """
    server = make_server(app, drain)
    errors: list[BaseException] = []
    ends: list[Callable[[], object]] = []

    def prepare() -> None:
        try:
            ends.append(load())
        except BaseException as error:
            errors.append(error)
            server.should_exit = True

    thread = threading.Thread(target=prepare, name="loading", daemon=True)
    thread.start()
    asyncio.run(server.serve(sockets=[made]))
    if errors:
        raise errors[0]
    if server.ended_by is None:
        late = server.stopped is not None and time.monotonic() - server.stopped >= max(1, round(drain))
        said(_stopped(app.state.service, late))
    if thread.is_alive():  # in the midst of native code, which an interpreter that goes down could crash
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if server.ended_by is None else 128 + server.ended_by)
    for end in ends:
        end()
    if server.ended_by is not None:
        raise Interrupted(server.ended_by, "stopped at once; answers that were being made are lost")


def _stopped(service: Service, late: bool) -> str:
    """A line on what became of the answers; those that no connection waits for go on until the engine ends."""
    if service.models is None:
        return "stopped while loading"
    lost = ["answers that took longer are lost"] if late else []
    if cut := service.answers:
        lost.append(f"{cut} {'answers' if cut > 1 else 'answer'} of the page cut off; what there is is kept")
    return f"stopped; {', '.join(lost) or 'all that was asked is answered'}"


def addresses(made: socket.socket) -> Sequence[str]:
    """Return the addresses at which a socket is reached, for people."""
    host, port = made.getsockname()[:2]
    return [f"http://{f'[{host}]' if ':' in host else host}:{port}"]


_DRAIN = 60.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Address and limits of a server.

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
                raise UserError(parameter=name, value=value, expected=f"{least.get(name, 1)} or more")
        if not 0 <= self.port < 1 << 16:
            raise UserError(parameter="port", value=self.port, expected="0 (any that is free) to 65535")

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
            f"is reached by other machines, so a key is needed: put one into a file for {param('api_key_file')}, or "
            f"into {KEYS}, such as {secrets.token_hex(24)}",
            parameter="host",
            value=settings.host,
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
    for name, path in adapters.items():
        open_adapter(name, path, loading)
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
