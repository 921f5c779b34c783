"""Guard of a server: keys, hosts and origins; and a line in the log and a count for each request."""

import asyncio
import hmac
import ipaddress
import re
import time
from collections.abc import Collection, Sequence
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_llama.console import visible
from lit_llama.generate.serve.errors import ApiError
from lit_llama.generate.serve.service import Service, error_response

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
