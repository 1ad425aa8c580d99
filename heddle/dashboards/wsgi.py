"""Another program's WSGI pages behind the dashboard's own address and token."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
# No page of theirs sends more.
MOST_BYTES = 1_000_000


class Behind:
    """What `opened` gives, asked with these methods alone; as long as it gives None, nothing is there."""

    def __init__(self, opened: Callable[[], WsgiApp | None], methods: tuple[str, ...]) -> None:
        self.opened, self.methods = opened, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, app = Request(scope, receive), self.opened()
        answer: Response
        if app is None:
            answer = PlainTextResponse("not opened: follow the link on the page Tools of a run", 404)
        elif request.method not in self.methods:
            answer = PlainTextResponse("this dashboard shows, and changes nothing", 405)
        elif int(request.headers.get("content-length", "0") or 0) > MOST_BYTES:
            answer = PlainTextResponse("too long", 413)
        else:
            answer = await run_in_threadpool(_answer, app, _environ(scope, await request.body()))
        await answer(scope, receive, send)


def _environ(scope: Scope, body: bytes) -> dict[str, Any]:
    """PEP 3333's names for what a request holds."""
    server = scope.get("server") or ("localhost", 80)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": scope["path"].encode().decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("ascii"),
        "SERVER_NAME": str(server[0]),
        "SERVER_PORT": str(server[1]),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").upper().replace("-", "_"), value.decode("latin-1")
        # The token is ours, and a body was measured above.
        if key == "CONTENT_TYPE":
            environ[key] = text
        elif key not in ("COOKIE", "AUTHORIZATION", "CONTENT_LENGTH"):
            environ[f"HTTP_{key}"] = text
    return environ


def _answer(app: WsgiApp, environ: dict[str, Any]) -> Response:
    told: list[tuple[str, list[tuple[str, str]]]] = []
    found = app(environ, lambda status, headers, _=None: told.append((status, headers)))
    try:
        body = b"".join(found)
    finally:
        close = getattr(found, "close", None)
        if close is not None:
            close()
    status, headers = told[-1]
    answer = Response(body, int(status.split()[0]))
    kept = [(n, v) for n, v in headers if n.lower() not in ("content-length", "connection", "date", "server")]
    length = [("content-length", str(len(body)))]
    answer.raw_headers = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in kept + length]
    return answer
