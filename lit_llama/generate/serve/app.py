"""The application: OpenAI's routes and those beside them, behind a guard.

The guard knows keys, hosts and origins, and has a line in the log and a count for each request.
"""

import asyncio
import hmac
import ipaddress
import re
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_llama.console import visible
from lit_llama.errors import UserError
from lit_llama.generate.llm import LLM
from lit_llama.generate.serve.fields import ApiError, Fields, refusal, token_ids
from lit_llama.generate.serve.messages import read_messages, read_tools
from lit_llama.generate.serve.models import Models
from lit_llama.generate.serve.replies import spelled
from lit_llama.generate.serve.requests import chat_prompt, chat_request, completion_request, template_values, text_ids
from lit_llama.generate.serve.service import Service, error_response, json_response, route

_LOCAL = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Guard that lets those requests through that may be answered.

    Browsers are told nothing about other origins, and those of other pages are refused, so that no page on the web can
    have a server on the user's machine answer. Where only this machine is served, the name that it is called by has to
    be a local one, whatever a name server says.

    Args:
        app: What answers.
        service: What is counted and where lines go.
        keys: One of them has to come with each request; without any, none has to.
        public: Paths that need no key.
        local: Whether only this machine is served.
    """

    def __init__(
        self, app: ASGIApp, service: Service, keys: Sequence[str], public: Collection[str], local: bool
    ) -> None:
        self._app, self._service = app, service
        self._keys = [key.encode() for key in keys]
        self._public, self._local = frozenset(public), local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an ASGI request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope.setdefault("state", {})
        try:
            with self._service.metrics.open.track_inprogress():
                if (error := self._refused(scope)) is not None:
                    await error_response(error)(scope, receive, noted)
                else:
                    await self._app(scope, receive, noted)
        except asyncio.CancelledError:  # by the server, which goes down; raised further, it would be logged as a fault
            if not status:
                await error_response(ApiError(503, "the server is stopping"))(scope, receive, noted)
        finally:
            known = "other" if status in (0, 401, 403, 404, 405) else _shape(scope["path"])  # whose paths may be any
            self._service.metrics.replies.labels(known, str(status)).inc()
            told = scope["state"].get("told")
            about = f", {told}" if told else ""
            seconds = time.monotonic() - started
            path = visible(scope["path"][:200], lines=True)
            self._service.log(f"{scope['method']} {path} {status} {seconds:.3f} s{about}")

    def _refused(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:  # where it ends is a matter of opinion
            message = "the request has both Content-Length and Transfer-Encoding, expected one of them"
            return ApiError(400, message, headers={"Connection": "close"})
        host = headers.get("host", "")
        name = (_split(f"//{host}").hostname or "") if re.fullmatch(r"[\w.:\[\]-]*", host) else ""
        if self._local and name not in _LOCAL and not is_loopback(name):
            return ApiError(403, "this server answers requests to localhost only, by its name or address")
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            return ApiError(403, "requests of pages of other origins are not answered")
        if self._keys and scope["path"] not in self._public and not self._has_key(headers.get("authorization", "")):
            return ApiError(
                401, "an API key is needed: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"}
            )
        return None

    def _has_key(self, header: str) -> bool:
        """Whether a header carries one of the keys; takes as long whichever it is."""
        scheme, _, given = header.partition(" ")
        right = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return scheme.lower() == "bearer" and any(right)


def _split(address: str) -> SplitResult:
    """The parts of an address; none where it is no address."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _shape(path: str) -> str:
    """A path for counts, of which there are few: without names of models and ids."""
    return "/".join(part for part in path.split("/")[:3])


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    local: bool = True,
    routes: Sequence[BaseRoute] = (),
    public: Collection[str] = (),
) -> Starlette:
    """Create the application of a server.

        service = Service(Limits(), log=print)
        app = create_app(service, routes=[Route("/", page)], public=["/"])
        service.start({"base": llm, "tuned": other}, EngineThread(llm.engine))

    It answers at once; until `service.start`, everything but /health is refused with 503, and that says so.
    Routes that are given are answered after the same checks of host, origin and key; they find the service as
    `request.app.state.service`, may raise `ApiError`, and should read bodies by `await service.body(request)`.

    Args:
        service: What the routes share.
        keys: One of them has to come with each request; without any, none has to.
        local: Whether only this machine is served, so that requests by other names are refused.
        routes: Further ones.
        public: Paths of these that need no key, such as a page that asks for one.
    """
    own = [
        route(service, "GET", "/health", health),
        route(service, "GET", "/v1/health", health),
        route(service, "GET", "/metrics", metrics),
        route(service, "GET", "/v1/models", list_models),
        route(service, "GET", "/v1/models/{name:path}", show_model),
        route(service, "POST", "/v1/chat/completions", chat),
        route(service, "POST", "/v1/completions", complete),
        route(service, "POST", "/tokenize", tokenize),
        route(service, "POST", "/detokenize", detokenize),
        route(service, "GET", "/tokenizer_info", tokenizer_info),
    ]
    open_paths = {"/health", "/v1/health", *public}
    guard = Middleware(Guard, service=service, keys=keys, public=open_paths, local=local)
    handlers: Mapping[Any, Any] = {ApiError: _told, HTTPException: _translated}
    app = Starlette(routes=[*own, *routes], middleware=[guard], exception_handlers=handlers)
    app.state.service = service
    return app


async def _told(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _translated(request: Request, error: HTTPException) -> Response:
    """Starlette's refusals in OpenAI's words."""
    message = {404: f"there is no {request.url.path[:100]}", 405: f"{request.method} is not answered here"}
    told = ApiError(error.status_code, message.get(error.status_code, error.detail), headers=error.headers)
    return error_response(told)


async def health(service: Service, request: Request) -> Response:
    """Tell whether requests are answered."""
    service.ready()
    return json_response({"status": "ok"})


async def metrics(service: Service, request: Request) -> Response:
    """Return counts and times for Prometheus."""
    return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def list_models(service: Service, request: Request) -> Response:
    """Return the base and its adapters."""
    models = service.ready()
    return json_response({"object": "list", "data": [models.described(name) for name in models.llms]})


async def show_model(service: Service, request: Request) -> Response:
    """Return one of the models."""
    models = service.ready()
    name, _ = models.find(request.path_params["name"])
    return json_response(models.described(name))


async def chat(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    return await service.answer(request, chat_request)


async def complete(service: Service, request: Request) -> Response:
    """Continue texts."""
    return await service.answer(request, completion_request)


async def tokenize(service: Service, request: Request) -> Response:
    """Return the ids of a text, or of a conversation as it is put to a model."""
    models = service.ready()
    body = await service.body(request)
    return json_response(await service.read(_tokenized, body, models))


def _tokenized(body: Mapping[str, Any], models: Models) -> dict[str, Any]:
    fields = Fields(body)
    _, llm = models.find(fields.text("model"))
    text, messages = fields.text("prompt"), fields.list("messages")
    begin, strings = fields.flag("add_special_tokens", True), fields.flag("return_token_strs")
    tools, more = read_tools(fields.list("tools")), template_values(fields.object("chat_template_kwargs"), llm)
    fields.end()
    if (text is None) == (messages is None):
        raise refusal("prompt", "and messages are both given or both missing, expected one of them")
    ids = _ids(llm, text, begin) if text is not None else chat_prompt(llm, read_messages(messages), tools, more).ids
    found = {"count": len(ids), "max_model_len": models.capacity(llm), "tokens": ids}
    return found | ({"token_strs": [spelled(llm, token)[0] for token in ids]} if strings else {})


def _ids(llm: LLM, text: str, begin: bool) -> list[int]:
    """Ids of a text; one that is a control token and no more is that token, as programs ask for the id of one."""
    control = llm.tokenizer.control
    return [control[text]] if text in control and not begin else text_ids(llm, text, begin)


async def tokenizer_info(service: Service, request: Request) -> Response:
    """Return the control tokens of the first model, as lm-evaluation-harness asks for them.

    There is no chat template among it: rendered elsewhere, its control tokens would come back as words.
    """
    _, llm = service.ready().find(None)
    tokenizer = llm.tokenizer
    named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    return json_response({name: spelling or None for name, spelling in named.items()} | {"chat_template": None})


async def detokenize(service: Service, request: Request) -> Response:
    """Return the text of ids, without control tokens."""
    models = service.ready()
    fields = Fields(await service.body(request))
    _, llm = models.find(fields.text("model"))
    given = fields.list("tokens")
    fields.end()
    if given is None:
        raise refusal("tokens", "is missing, expected token ids")
    ids = token_ids(given, "tokens", llm.tokenizer.size)
    try:
        return json_response({"prompt": await service.read(llm.tokenizer.decode, ids)})
    except UserError as error:
        raise refusal("tokens", str(error)) from error
