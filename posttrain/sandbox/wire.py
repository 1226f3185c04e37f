"""Messages between the processes of a sandbox: JSON behind its length, over a pipe or socket. Standard library only.

In and out: file descriptors and what JSON can hold. Who reads does not trust who writes: a message has a bounded size.
"""

import json
import os

MAX_BYTES = 32 * 2**20


class TooLong(ValueError):
    """A message over MAX_BYTES."""


def send(fd: int, message) -> None:
    """Raises TooLong, and what os.write raises where nobody reads any more."""
    body = json.dumps(message).encode()
    if len(body) > MAX_BYTES:
        raise TooLong(f"{len(body)} bytes, at most {MAX_BYTES}")
    data = memoryview(len(body).to_bytes(4, "big") + body)
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int):
    """The next message. EOFError where the other side is gone, ValueError for what is no message."""
    size = int.from_bytes(_exactly(fd, 4), "big")
    if size > MAX_BYTES:
        raise TooLong(f"{size} bytes, at most {MAX_BYTES}")
    return json.loads(_exactly(fd, size))


def _exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 2**20))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
