"""What stands before every request to the board: whose it may be, where it may go, how large it may be.

In: an ASGI application and the names that it is reached by. Out: one that answers 4xx to the rest. In front of Gradio:

    uvicorn.run(Guard(application, hosts("127.0.0.1", 7860)))

- Host must be one of ours: a page of another site that points its own name at 127.0.0.1 (DNS rebinding) is refused.
- Origin and Sec-Fetch-Site, where a browser sends them, must be our own: no other page can post, or read, in the name
  of who has the board open. Websockets, which the board does not need, are refused.
- Only the routes that the page itself uses are open. Gradio's routes for files, uploads, proxies, its API and its
  documentation are not.
- A body is JSON, of `MOST_BYTES` at most, and arrives within `SECONDS`. It names no file: Gradio 6.31 copies whatever
  file of this machine a request describes as uploaded into its cache, even for a text box.
- The answer's Content-Security-Policy keeps the page from fetching anything elsewhere and from being framed, whatever
  a model may have written into it.
"""

import asyncio
import json
import re

MOST_BYTES = 1_000_000
SECONDS = 30.0  # in which a body has to arrive

GET = (
    r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/assets/[\w./-]+|/static/[\w./-]+"
    r"|/gradio_api/(queue/data|heartbeat/\w+)"
)
POST = r"/gradio_api/(queue/join|cancel|reset)"
ROUTES = {"GET": re.compile(GET), "HEAD": re.compile("/"), "POST": re.compile(POST)}

# Gradio's page has scripts in its HTML, and makes a function of each component's own script. Nothing that a model
# writes comes to the page as markup; these are the second wall.
POLICY = "; ".join([
    "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval'", "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data:", "font-src 'self' data:", "connect-src 'self'", "worker-src 'self'", "frame-src 'none'",
    "object-src 'none'", "base-uri 'self'", "form-action 'none'", "frame-ancestors 'none'",
])  # fmt: skip
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=(), clipboard-read=()"),
]


class Refused(Exception):
    """(status, what was found and what was expected)."""


def hosts(host: str, port: int, more: tuple[str, ...] = ()) -> frozenset[str]:
    """The values of a Host header that are ours: this machine's names, `host` itself, and `more`, with port or not."""
    names = ["127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host]
    with_port = [f"{name}:{port}" for name in (*names, *more)]
    bare = names if port == 80 else []
    return frozenset(name.lower() for name in (*with_port, *bare, *more))


class Guard:
    """An ASGI application that lets through to `app` what the board's own page would ask for."""

    def __init__(self, app, allowed: frozenset[str]):
        self.app, self.allowed = app, allowed

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await receive()  # the handshake
            await send({"type": "websocket.close", "code": 1008, "reason": "the board has no websockets"})
            return
        try:
            self.check(scope)
            if scope["method"] == "POST":
                body = await _body(scope, receive)
                _check_names_no_file(body)
                receive = _again(body, receive)
        except Refused as refused:
            await _answer(send, *refused.args)
            return
        await self.app(scope, receive, _with_headers(send))

    def check(self, scope) -> None:
        """Raises Refused for a request that is not our page's."""
        found = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        if len(found) != 1 or found[0] not in self.allowed:
            said = " ".join(found)[:200] or "none"
            raise Refused(421, f"Host: found {said}, expected one of {', '.join(sorted(self.allowed))}")
        headers = _headers(scope)
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] not in self.allowed:
            raise Refused(403, f"Origin: found {origin[:200]}, expected this board's own page")
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "")
        follows_link = scope["method"] == "GET" and scope["path"] == "/" and mode == "navigate"
        if site not in ("none", "same-origin") and not follows_link:
            raise Refused(403, f"Sec-Fetch-Site: found {site[:40]}, expected this board's own page")
        route = ROUTES.get(scope["method"])
        if route is None or not route.fullmatch(scope["path"]) or ".." in scope["path"]:
            raise Refused(404, "no such page: the board has one, at /")


def _headers(scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def _body(scope, receive) -> bytes:
    """All of the body. Raises Refused where it is too large, too slow, or not JSON."""
    headers = _headers(scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"Content-Type: found {kind[:100] or 'none'}, expected application/json")
    said = headers.get("content-length", "0")
    if not said.isdecimal() or int(said) > MOST_BYTES:
        raise Refused(413, f"the request has {said[:30]} bytes, expected {MOST_BYTES} at most: send a shorter text")
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the request ended before its body did")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MOST_BYTES:
                    raise Refused(413, f"the request has more than {MOST_BYTES} bytes: send a shorter text")
    except TimeoutError:
        raise Refused(408, f"the request's body did not arrive within {SECONDS:g} s") from None
    return bytes(body)


def _check_names_no_file(body: bytes) -> None:
    """Raises Refused for a body that is no JSON, or describes a file as Gradio does: {"path": ..., "meta": ...}."""
    try:
        left = [json.loads(body)]
    except (ValueError, RecursionError):
        raise Refused(400, "the request's body is no JSON") from None
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if "path" in value and "meta" in value:
                raise Refused(403, "the request names a file; the board takes none")
            left += value.values()
        elif isinstance(value, list):
            left += value


def _again(body: bytes, receive):
    """A `receive` that gives the whole body first; then it waits, as the server's does, for the client to leave."""
    given = False

    async def first_the_body():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first_the_body


def _with_headers(send):
    ours = {name for name, _ in HEADERS}

    async def sending(message) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in ours]
            message = {**message, "headers": [*kept, *HEADERS]}
        await send(message)

    return sending


async def _answer(send, status: int, said: str) -> None:
    """The reason as JSON, under the name that Gradio's page shows to its user."""
    body = json.dumps({"detail": said}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
