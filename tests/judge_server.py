"""A real HTTP server that speaks /v1/chat/completions, with what goes wrong with such servers.

In: `answer(messages, number) -> str | Reply`. Out: a context manager with the address and the requests it got.
"""

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """What is sent in place of a completion."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict = field(default_factory=dict)
    delay: float = 0.0


@dataclass
class Seen:
    url: str = ""
    bodies: list = field(default_factory=list)
    keys: list = field(default_factory=list)
    times: list = field(default_factory=list)
    at_once: int = 0


@contextmanager
def judge_server(answer):
    seen, lock, now = Seen(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                now[0] += 1
                seen.at_once = max(seen.at_once, now[0])
                seen.bodies.append((self.path, body))
                seen.keys.append(self.headers.get("authorization"))
                seen.times.append(time.monotonic())
                number = len(seen.bodies)
            reply = answer(body["messages"], number)
            if isinstance(reply, str):
                message = {"role": "assistant", "content": reply}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
                reply = Reply(body=json.dumps(whole).encode(), headers={"content-type": "application/json"})
            time.sleep(reply.delay)
            with lock:
                now[0] -= 1
            self.send_response(reply.status)
            for key, value in {"content-length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            """A client that gave up is no error here."""

    server = Server(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
