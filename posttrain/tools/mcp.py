"""Tools of MCP servers (Model Context Protocol, modelcontextprotocol.io), through the official client.

In: a server to start or to reach. Out: a `Remote` for each of its tools: name, JSON schema, and a function that calls
it. One session for each server and process, which stays open until the process ends.

    tools: ["mcp:files"]
    tool_options: {"mcp:files": {command: npx, args: [-y, some-server, docs], only: [read_file], env: {KEY: $KEY}}}
    tool_options: {"mcp:files": {url: "http://127.0.0.1:8000/mcp"}}

`command` starts a server that speaks over stdin and stdout, with few environment variables beside those of `env`; a
value `$NAME` there is read from the environment, so that no key stands in a config or a manifest. `url` is an endpoint
of streamable HTTP. `only` leaves the server's other tools out: each takes room in the prompt. A server that cannot be
started or does not answer stops the run; one that fails later gives the model an error text.
"""

import asyncio
import atexit
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from posttrain.errors import UserError

START_SECONDS = 60.0  # until a server has told its tools; the first start of one may fetch it
CLOSE_SECONDS = 8.0  # the client gives a server 4 s to end by itself and then kills it
NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class McpOptions:
    """`command` or `url`; `timeout`: seconds for one call, beside tool_timeout."""

    command: str | None = None
    args: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    url: str | None = None
    only: list[str] | None = None
    timeout: float = 30.0

    def __post_init__(self):
        if (self.command is None) == (self.url is None):
            found = "neither" if self.command is None else "both"
            raise UserError(f"command, url: found {found}, expected one of them: a server to start or to reach")
        shapes = {"command": "text", "url": "text", "args": "a list of texts", "only": "a list of texts"}
        for key, shape in {**shapes, "env": "a mapping of texts"}.items():
            value = getattr(self, key)
            outside = isinstance(value, {"text": str, "a list of texts": list}.get(shape, dict))
            inside = [*value, *value.values()] if shape.startswith("a map") and outside else value
            if value is not None and not (outside and all(isinstance(part, str) for part in inside)):
                raise UserError(f"{key}: found {value!r}, expected {shape}")
        if self.url is not None and (self.args or self.env):
            raise UserError("args, env: found some beside url, which starts nothing; leave them out")
        if self.url is not None and not re.match(r"https?://[^/]", self.url):
            raise UserError(f"url: found {self.url!r}, expected http://... or https://...")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not self.timeout > 0:
            raise UserError(f"timeout: found {self.timeout!r}, expected seconds above 0")

    def variables(self) -> dict[str, str]:
        """`env` with $NAME replaced. UserError for a variable that is not set."""
        found = {}
        for name, value in self.env.items():
            if value.startswith("$") and value[1:] not in os.environ:
                raise UserError(f"env: {name}: the environment variable {value[1:]} is not set")
            found[name] = os.environ[value[1:]] if value.startswith("$") else value
        return found


class Remote(NamedTuple):
    """A tool of a server; `schema` as chat templates take it, `call(**arguments)` answers as text."""

    name: str
    schema: dict
    call: Callable[..., str]


def mcp_tools(name: str, options: McpOptions) -> list[Remote]:
    """The tools of a server, in its order. UserError where it cannot be started, does not answer or has none."""
    server = _server(name, options)
    known = [tool.name for tool in server.tools]
    for wanted in options.only or []:
        if wanted not in known:
            raise UserError(f"tool_options: {name}: only: no tool {wanted!r}; the server has {', '.join(known)}")
    chosen = [tool for tool in server.tools if options.only is None or tool.name in options.only]
    if not chosen:
        raise UserError(f"tools: {name}: the server has no tools")
    return [_remote(name, server, tool) for tool in chosen]


def _remote(name: str, server: "Server", tool) -> Remote:
    if not NAME.fullmatch(tool.name):
        raise UserError(
            f"tools: {name}: the server calls a tool {tool.name!r}; a call needs a name of letters, digits, '_', '.' "
            f"and '-': leave it out with only, or rename it"
        )
    parameters = {"type": "object", "properties": {}, **tool.input_schema}
    function = {"name": tool.name, "description": tool.description or tool.name, "parameters": parameters}
    return Remote(tool.name, {"type": "function", "function": function}, lambda **given: server.call(tool.name, given))


# ---- the sessions of this process -----------------------------------------------------------------------------------

_SERVERS: dict[str, "Server"] = {}
_LOCK = threading.Lock()


def _server(name: str, options: McpOptions) -> "Server":
    key = json.dumps([name, {**asdict(options), "only": None}], sort_keys=True)
    with _LOCK:
        if key not in _SERVERS:
            _SERVERS[key] = Server(name, options)
        return _SERVERS[key]


class Server:
    """A session with one server, in an event loop and a thread of its own."""

    def __init__(self, name: str, options: McpOptions):
        try:
            import mcp
        except ImportError as error:
            raise UserError(f"tools: {name}: pip install 'posttrain[mcp]' brings the client of MCP servers") from error
        self.name, self.options, self.client = name, options, None
        if options.url is not None:
            self._target = options.url
        else:
            try:
                variables = options.variables()
            except UserError as error:
                raise UserError(f"tool_options: {name}: {error}") from error
            started = mcp.StdioServerParameters(command=options.command, args=options.args, env=variables)
            self._target = mcp.stdio_client(started, errlog=sys.__stderr__)
        told: Future = Future()
        self._loop, self._closing = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(told,), name=f"{name} session", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        where = options.url or " ".join([options.command, *options.args])
        try:
            self.tools = told.result(START_SECONDS)
        except TimeoutError as error:
            self.close()
            raise UserError(f"tools: {name}: {where} did not tell its tools within {START_SECONDS:g} s") from error
        except Exception as error:
            raise UserError(f"tools: {name}: {where} is no MCP server that answers: {_reason(error)}") from error

    def _run(self, told: Future) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._session(told))
        except BaseException as error:  # it ends the thread, not the process: calls from now on say so
            if not told.done():
                told.set_exception(error if isinstance(error, Exception) else ConnectionError(str(error)))
        finally:
            self.client = None

    async def _session(self, told: Future) -> None:
        import mcp

        async with mcp.Client(self._target, read_timeout_seconds=START_SECONDS) as client:
            page = await client.list_tools()
            tools = list(page.tools)
            while page.next_cursor:
                page = await client.list_tools(cursor=page.next_cursor)
                tools += page.tools
            self.client = client
            told.set_result(tools)
            await self._closing.wait()

    def call(self, tool: str, arguments: dict) -> str:
        """What the tool answers; "error: ..." where it fails, the server is gone or takes longer than `timeout`."""
        client = self.client
        if client is None:
            return f"error: {self.name}: the server has ended"
        answer = client.call_tool(tool, arguments, read_timeout_seconds=self.options.timeout)
        asked = asyncio.run_coroutine_threadsafe(answer, self._loop)
        try:
            found = asked.result(self.options.timeout + 1)
        except TimeoutError:
            asked.cancel()
            return f"error: {self.name}: no answer within {self.options.timeout:g} s"
        except Exception as error:  # the client's own, the transport's, pydantic's for an answer that is none
            return f"error: {self.name}: {_reason(error)}"
        text = text_of(found)
        return f"error: {text}" if found.is_error else text

    def close(self) -> None:
        """End the session, and the server with it; safe to call twice."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(CLOSE_SECONDS)


def text_of(result) -> str:
    """A result's texts, a line each; where it has none, its structured content as JSON. What is no text is named."""
    parts = []
    for block in result.content:
        resource = getattr(block, "resource", None)
        text = getattr(block, "text", None) or getattr(resource, "text", None)
        parts.append(text if text is not None else f"({block.type}: no text)")
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _reason(error: BaseException) -> str:
    """One line on what went wrong; of a group of errors the first one."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
