"""The application: OpenAI's routes, and those beside them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute

from lit_llama.errors import UserError
from lit_llama.generate.llm import LLM
from lit_llama.generate.serve.errors import ApiError, refusal
from lit_llama.generate.serve.fields import Fields, token_ids
from lit_llama.generate.serve.guard import Guard
from lit_llama.generate.serve.messages import read_messages, read_tools
from lit_llama.generate.serve.models import Models
from lit_llama.generate.serve.replies import spelled
from lit_llama.generate.serve.requests import chat_prompt, chat_request, completion_request, template_values, text_ids
from lit_llama.generate.serve.service import Service, error_response, json_response, route


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
