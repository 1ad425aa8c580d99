"""What stands in front of every page: the token where one is asked for, names of hosts, headers that browsers keep to."""

from __future__ import annotations

import ipaddress
import secrets
from urllib.parse import urlencode

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "heddle-token"
HEADERS = {
    # No script but ours, nothing from elsewhere, no page around ours; plotly sets styles of its own, and makes a PNG of a blob.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def is_local(host: str) -> bool:
    """Whether `host` is an address that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(32)


class Guard:
    """In front of every route: the token where one is asked for, the name of the host, headers on every answer."""

    def __init__(self, inner: ASGIApp, token: str | None) -> None:
        self.inner, self.token = inner, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.inner(scope, receive, send)
            return
        if scope["type"] != "http":
            # There are no sockets here, so none is opened.
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                held = {name.lower() for name, _ in message["headers"]}
                extra = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in held]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        refused = self._refusal(Request(scope))
        await (refused or self.inner)(scope, receive, send_safely)

    def _refusal(self, request: Request) -> Response | None:
        if self.token is None:
            # A page elsewhere may have its own name lead to this machine; it is not answered.
            host = request.headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if is_local(name.removeprefix("[").removesuffix("]")):
                return None
            told = "403: unknown host; open the address that heddle dashboard printed\n"
            return PlainTextResponse(told, 403)
        given = request.query_params.get("token")
        if given is not None and secrets.compare_digest(given.encode(), self.token.encode()):
            return self._admit(request)
        held = request.cookies.get(TOKEN, "") or _bearer(request.headers)
        if secrets.compare_digest(held.encode(), self.token.encode()):
            return None
        told = (
            "403: this dashboard needs the token that heddle dashboard printed: open the address it printed\n"
        )
        return PlainTextResponse(told, 403)

    def _admit(self, request: Request) -> Response:
        """Put the token into a cookie and leave it out of the address, where histories and logs would keep it."""
        assert self.token is not None
        rest = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
        # Slashes in a row would lead to another host.
        path = "/" + request.url.path.lstrip("/\\")
        answer = RedirectResponse(f"{path}?{urlencode(rest)}" if rest else path, 303)
        answer.set_cookie(TOKEN, self.token, httponly=True, samesite="lax", path="/")
        return answer


def _bearer(headers: Headers) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value if kind.lower() == "bearer" else ""
