"""Routes of the page: its files, and conversations as JSON."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from lit_llama.errors import UserError
from lit_llama.generate.chat import rows
from lit_llama.generate.chat.dialogue import Dialogue, Record
from lit_llama.generate.chat.lines import NoConversation, encode
from lit_llama.generate.chat.session import SETTINGS, check_settings, check_system, message, system_records, title
from lit_llama.generate.chat.store import Store
from lit_llama.generate.serve.fields import ApiError, Fields, refusal
from lit_llama.generate.serve.page.desk import Desk, Listener
from lit_llama.generate.serve.service import Endpoint, Service, json_response, route

T = TypeVar("T")
Handler = Callable[[Request, Desk, Service], Awaitable[Response]]
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/page/tree.js": ("tree.js", "text/javascript; charset=utf-8"),
    "/page/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/page/markdown.js": ("markdown.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_PING = 15.0
_CHOICES = ("model", "compare")


def page_routes(service: Service, store: Store) -> tuple[Sequence[BaseRoute], Sequence[str]]:
    """Return the routes of the page, and those among them that hold nothing of anybody and need no key.

    Args:
        service: Of the server.
        store: Conversations that the page shows.
    """
    desk = Desk(store, service)
    files = [_file(path, *file) for path, file in _FILES.items()]
    one = "/api/conversations/{id}"
    handlers: list[tuple[str, str, Handler]] = [
        ("GET", "/api/info", info),
        ("GET", "/api/conversations", conversations),
        ("POST", "/api/conversations", create),
        ("POST", "/api/load", load),
        ("GET", "/api/rows", all_rows),
        ("PATCH", one, change),
        ("DELETE", one, delete),
        ("POST", f"{one}/ask", ask),
        ("POST", f"{one}/answer", put_answer),
        ("POST", f"{one}/stop", stop),
        ("GET", f"{one}/events", events),
        ("GET", f"{one}/rows", own_rows),
        ("GET", f"{one}/file", own_file),
    ]
    routes = [route(service, method, path, _endpoint(handler, desk)) for method, path, handler in handlers]
    return [*files, *routes], list(_FILES)


def _file(path: str, name: str, kind: str) -> Route:
    data = (Path(__file__).parent / name).read_bytes()

    async def get(request: Request) -> Response:
        return Response(data, media_type=kind, headers=_HEADERS)

    return Route(path, get, methods=["GET"])


def _endpoint(handler: Handler, desk: Desk) -> Endpoint:
    async def answered(service: Service, request: Request) -> Response:
        try:
            return await handler(request, desk, service)
        except NoConversation as error:
            raise ApiError(404, str(error), "id") from error

    return answered


async def _run(function: Callable[..., T], *arguments: Any) -> T:
    """Do what waits for the disk, or counts tokens, elsewhere than in the event loop."""
    return await anyio.to_thread.run_sync(function, *arguments)


def _reply(value: Any) -> Response:
    return json_response(value, headers=_NO_STORE)


# ---- all conversations


async def info(request: Request, desk: Desk, service: Service) -> Response:
    """Return the models, and how each is sampled."""
    models = service.ready()
    found = []
    for name, llm in models.llms.items():
        default = desk.default(name, llm)
        settings = {key: getattr(default, key) for key in SETTINGS}
        found.append({**models.described(name), "context": llm.config.context_length, "settings": settings})
    kept = desk.store.folder
    return _reply({"models": found, "folder": None if kept is None else str(kept)})


async def conversations(request: Request, desk: Desk, service: Service) -> Response:
    """Return the list of the side bar."""
    found = await _run(desk.store.list)
    listed = [
        {"id": s.id, "name": s.name, "changed": s.changed, "messages": s.messages, "model": s.model} for s in found
    ]
    return _reply({"conversations": listed, "remarks": desk.store.remarks})


async def create(request: Request, desk: Desk, service: Service) -> Response:
    """Begin a conversation, named by its first message."""
    fields = Fields(await service.body(request))
    text, system = fields.text("text") or "", fields.text("system") or ""
    settings = _settings(fields.object("settings") or {}, desk, service)
    fields.end()

    def work() -> str:
        check_system(next(iter(service.ready().llms.values())), system)
        records: list[Record] = [{"type": "set", "name": key, "value": value} for key, value in settings.items()]
        if system:
            records.append(message(1, 0, "system", system, time.time()))
        return desk.store.create(desk.store.free_name(title(text)), records)

    return _reply({"id": await _run(work)})


async def load(request: Request, desk: Desk, service: Service) -> Response:
    """Read a saved conversation, or rows of messages."""
    fields = Fields(await service.body(request))
    name, text = fields.text("name") or "file", fields.text("text") or ""
    fields.end()

    def work() -> Sequence[str]:
        return desk.store.load(rows.loaded(text.encode(), name[:100], Path(name).stem))

    return _reply({"ids": await service.read(work)})


async def all_rows(request: Request, desk: Desk, service: Service) -> Response:
    """Return all conversations as training rows."""
    return _download(await _run(_rows, desk, [s.id for s in await _run(desk.store.list)]), "rows.jsonl")


# ---- one conversation


async def change(request: Request, desk: Desk, service: Service) -> Response:
    """Change the name, settings, branch, system message, or what is learned."""
    id, fields = request.path_params["id"], Fields(await service.body(request))
    name, system = fields.text("name"), fields.text("system")
    settings = _settings(fields.object("settings") or {}, desk, service)
    head, side = fields.whole("head", 0, 1 << 31), fields.whole("side", 0, 1) or 0
    train = fields.inner("train")
    records: list[Record] = [{"type": "set", "name": key, "value": value} for key, value in settings.items()]
    if head is not None:
        records.append({"type": "head", "id": head, "side": side})
    if train is not None:
        number = train.whole("id", 1, 1 << 31)
        records.append({"type": "train", "id": number, "train": train.flag("train")})
        train.end()
    fields.end()

    def work() -> None:
        if system is not None:
            check_system(next(iter(service.ready().llms.values())), system)

        def make(dialogue: Dialogue) -> list[Record]:
            named: list[Record] = [] if name is None else [{"type": "name", "name": desk.store.new_name(name, id)}]
            return [*named, *records, *([] if system is None else system_records(dialogue, system, side))]

        after = desk.change(id, make)
        if system is not None:
            desk.tell(id, *({"type": "head", "id": h, "side": s} for s, h in enumerate(after.heads)))

    await _run(work)
    return _reply({})


async def delete(request: Request, desk: Desk, service: Service) -> Response:
    """Remove it."""
    await _run(desk.delete, request.path_params["id"])
    return _reply({})


async def ask(request: Request, desk: Desk, service: Service) -> Response:
    """Let a message be answered; what comes of it is told by `events`."""
    fields = Fields(await service.body(request))
    text, model = fields.text("text"), fields.text("model")
    parent, side = fields.whole("parent", 0, 1 << 31) or 0, fields.whole("side", 0, 1) or 0
    fields.end()
    if text is not None and not text.strip():
        raise refusal("text", "is empty, expected a message")
    id = request.path_params["id"]
    if parent and parent not in (await _run(desk.store.get, id)).nodes:
        raise refusal("parent", f"is {parent}, expected the id of a message")
    answer = await service.read(lambda: desk.ask(id, text=text, parent=parent, model=model, side=side))
    return _reply({"user": answer.user, "id": answer.id, "forgotten": answer.prompt.forgotten})


async def put_answer(request: Request, desk: Desk, service: Service) -> Response:
    """Put the user's own words in the place of an answer, on a branch of their own."""
    fields = Fields(await service.body(request))
    number, text, side = fields.whole("id", 1, 1 << 31), fields.text("text") or "", fields.whole("side", 0, 1) or 0
    fields.end()

    def make(dialogue: Dialogue) -> list[Record]:
        node = dialogue.nodes.get(number or 0)
        if node is None or node.role != "assistant" or not text.strip():
            raise UserError("an answer is changed by its id and a text that is not empty")
        said = message(dialogue.next_id, node.parent, "assistant", text, time.time(), side)
        return [said, {"type": "end", "id": said["id"], "finish_reason": "stop"}]

    await _run(desk.change, request.path_params["id"], make)
    return _reply({})


async def stop(request: Request, desk: Desk, service: Service) -> Response:
    """Stop an answer; what there is of it is kept."""
    fields = Fields(await service.body(request))
    number = fields.whole("id", 1, 1 << 31) or 0
    fields.end()
    return _reply({"stopped": desk.stop(request.path_params["id"], number)})


async def events(request: Request, desk: Desk, service: Service) -> Response:
    """Stream the conversation, and then what becomes of it: a line of JSON for each event."""
    id, listener = request.path_params["id"], Listener()
    await _run(desk.listen, id, listener)
    stopping: Callable[[], bool] = getattr(request.app.state, "stopping", lambda: False)

    async def lines() -> AsyncIterator[bytes]:
        try:
            quiet = time.monotonic()
            while not stopping():
                try:
                    event = await asyncio.wait_for(listener.events.get(), 1.0)
                except TimeoutError:
                    if time.monotonic() - quiet > _PING:
                        quiet = time.monotonic()
                        yield b"{}\n"
                    continue
                if event is None:
                    return
                quiet = time.monotonic()
                yield (json.dumps(event) + "\n").encode()
        finally:
            desk.leave(id, listener)

    return StreamingResponse(lines(), media_type="application/x-ndjson", headers=_NO_STORE)


async def own_rows(request: Request, desk: Desk, service: Service) -> Response:
    """Return the branch in use as a training row."""
    return _download(await _run(_rows, desk, [request.path_params["id"]]), "rows.jsonl")


async def own_file(request: Request, desk: Desk, service: Service) -> Response:
    """Return the conversation with all its branches."""
    dialogue = await _run(desk.store.get, request.path_params["id"])
    return _download(rows.text_of(dialogue), "conversation.jsonl")


def _rows(desk: Desk, ids: Sequence[str]) -> bytes:
    found = [rows.row(desk.store.get(id).path()) for id in ids]
    lines = [encode(row) for row in found if row is not None]
    if not lines:
        raise UserError("no answer is to be learned: those that were stopped or cut off are not, unless marked so")
    return b"".join(lines)


def _download(data: bytes, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', **_NO_STORE}
    return Response(data, media_type="application/jsonl", headers=headers)


def _settings(given: Mapping[str, Any], desk: Desk, service: Service) -> dict[str, Any]:
    """Settings as they are kept; null takes one back.

    Raises:
        UserError: One is unknown or out of its range.
        ApiError: There is no such model.
    """
    models = service.ready()
    for name in _CHOICES:
        if given.get(name) is not None:
            models.find(str(given[name]))
    numbers = {name: value for name, value in given.items() if name not in _CHOICES}
    first = next(iter(models.llms))
    check_settings(models.default(first), {name: value for name, value in numbers.items() if value is not None})
    for name in numbers:
        if name not in SETTINGS:
            raise refusal(f"settings.{name}", "is not a field that is known here", "unknown_field")
    return dict(given)
