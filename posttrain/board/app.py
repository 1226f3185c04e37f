"""`posttrain board RUN`: chat with every stage of a run, compare and rank them, look at their tokens, in the browser.

In: the folder of a run, and any number of other models. Out: one page on 127.0.0.1 until Ctrl-C.
Run: posttrain board runs/tiny
     posttrain board runs/tiny HuggingFaceTB/SmolLM2-135M-Instruct --port 7861
     posttrain board runs/tools --tools search calculator --tool_options '{search: {folder: docs}}'

The page needs no network. It has no password: who reaches the address can use the models, which is why other machines
are kept out unless `--host` and `--allow-host` let them in. guard.py says what else is refused.
"""

import os
import socket
import sys
import threading
from pathlib import Path

from posttrain.board import arena_flags, guard
from posttrain.board.stages import KEEP, Pool, find, in_run
from posttrain.errors import UserError
from posttrain.tools import flags as tool_flags

MOST_SESSIONS = 200  # browser tabs whose conversations are remembered; the oldest is forgotten
MOST_CONNECTIONS = 256
MOST_WAITING = 32  # requests in the queue of each kind


def add_verb(verbs, debug) -> None:
    """The verb `board` and its flags."""
    verb = verbs.add_parser("board", parents=[debug], help="chat, compare, rank, look at tokens, in the browser")
    verb.set_defaults(call=run)
    verb.add_argument("run", metavar="RUN", help="folder of a run, e.g. runs/tiny, or a model")
    verb.add_argument("models", metavar="MODEL", nargs="*", help="more runs, folders or names on the Hub")
    verb.add_argument("--port", type=int, default=7860, help="0 takes a free one; default: %(default)s")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine")
    verb.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[],
        help="with another --host: a name that browsers reach it by; can be given several times",
    )  # fmt: skip
    arena_flags.add_flags(verb)
    tool_flags.add_flags(verb.add_argument_group("tools, in Chat and Side by side"))
    verb.add_argument("--keep", type=int, default=KEEP, help="models in memory at once; default: %(default)s")


def run(options) -> int:
    """Serve until Ctrl-C or SIGTERM. Raises UserError where there is no model, no Gradio, or no such address."""
    warning = check_host(options.host, options.allow_host)
    paths = [options.run, *options.models]
    pool = Pool(find(paths), options.keep, *tool_flags.loaded(options))
    apart = [f"{Path(stage).name} ({why})" for path in paths for stage, why in in_run(path) if why]
    listener = listen(options.host, options.port)
    port = listener.getsockname()[1]
    votes, prompts = arena_flags.opened(options, pool.entries.values())
    blocks = build(pool, options.run, apart, votes, prompts)
    application = guard.Guard(mounted(blocks), guard.hosts(options.host, port, tuple(options.allow_host)))
    if warning:
        print(warning, file=sys.stderr, flush=True)
    name = f"[{options.host}]" if ":" in options.host else options.host
    print(f"{len(pool.names)} models: {', '.join(pool.names)}", flush=True)
    if apart:
        print(f"left out: {', '.join(apart)}", flush=True)
    for said in votes.notes:
        print(said, file=sys.stderr, flush=True)
    threading.Thread(target=warm, args=(pool,), daemon=True).start()
    server(application, f"http://{name}:{port}").run(sockets=[listener])
    return 0


def check_host(host: str, names: list[str]) -> str:
    """A warning where other machines can reach `host`, "" for this machine alone. UserError without `names` then."""
    from posttrain.serve_engine import is_loopback

    if is_loopback(host):
        return ""
    if not names:
        raise UserError(
            f"--host: found {host}, which other machines can reach; expected 127.0.0.1. The board has no password. "
            "If it has to be, add --allow-host NAME with the name or address that browsers will ask for"
        )
    return (
        f"WARNING: the board listens on {host}. Whoever reaches it can use these models; there is no password and no "
        "encryption. Better: leave --host out and use ssh -L 7860:127.0.0.1:7860"
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: {host}:{port} cannot be had ({error}); take another one, or 0") from error
    return listener


def build(pool: Pool, title: str, apart: list[str], votes=None, prompts=None):
    """The page: a tab a room, the arena's where there is a folder of `votes`; it draws from `prompts`.

    Raises UserError where Gradio is not installed.
    """
    # Before Gradio is imported: it would ask its makers' server for news.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("the board needs Gradio: pip install 'posttrain[board]'") from error
    from posttrain.board import arena_room, chat_room, side_room, view, xray_room

    name = Path(title).resolve().name if Path(title).is_dir() else title
    with gr.Blocks(title=f"{name} · posttrain board", analytics_enabled=False) as blocks:
        gr.HTML(view.heading(name, pool.entries.values(), apart), apply_default_css=False)
        with gr.Tab("Chat"):
            chat_room.room(pool)
        with gr.Tab("Side by side"):
            side_room.room(pool)
        if votes is not None:
            with gr.Tab("Arena"):
                arena_room.room(pool, votes, prompts)
        with gr.Tab("Token X-ray"):
            xray_room.room(pool)
    blocks.queue(max_size=MOST_WAITING, default_concurrency_limit=4, api_open=False)
    return blocks


def mounted(blocks):
    """The page as an ASGI application without files, uploads, documentation of an API, or links out."""
    import gradio as gr
    from fastapi import FastAPI

    from posttrain.board.look import CSS, theme

    blocks.state_session_capacity = MOST_SESSIONS
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        application, blocks, path="/", allowed_paths=[], blocked_paths=["/"], max_file_size=1, show_error=False,
        ssr_mode=False, pwa=False, mcp_server=False, footer_links=[], theme=theme(), css=CSS,
    )  # fmt: skip


def warm(pool: Pool) -> None:
    """Load the model that the chat begins with while the user still looks at the page."""
    from posttrain.board.controls import newest

    try:
        with pool.use(newest(pool)):
            pass
    except UserError as error:  # whoever asks for the stage is told again
        print(f"error: {error}", file=sys.stderr, flush=True)


def server(application, url: str):
    """A uvicorn server that says `url` once it answers, and runs until a signal or `should_exit`."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            print(f"posttrain board: {url}   (Ctrl-C stops it)", flush=True)

    config = uvicorn.Config(
        application, log_level="warning", ws="none", limit_concurrency=MOST_CONNECTIONS, server_header=False,
        timeout_graceful_shutdown=1, h11_max_incomplete_event_size=64 * 1024,
    )  # fmt: skip
    return Server(config)
