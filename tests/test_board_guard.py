"""What the board refuses: other sites, other routes, files, what is too large; and the verb `posttrain board`.

Run: pytest tests/test_board_guard.py
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from board_helpers import board, reciter

from posttrain.board import app
from posttrain.board.guard import MOST_BYTES
from posttrain.errors import UserError

JSON = {"Content-Type": "application/json"}
JOIN = "/gradio_api/queue/join"


@pytest.fixture(scope="module")
def running(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    with board(reciter(root / "one", tokenizer, "Hello", "I am one.")) as running:
        running.root = root
        yield running


def ask(running, method="GET", path="/", body=None, **headers):
    """(status, headers, text) of one request; `Host` is the board's unless given."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode("utf-8", "replace")
    connection.close()
    return found


def test_the_page_is_served_with_its_walls(running):
    status, headers, text = ask(running)
    assert status == 200 and "gradio" in text
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "default-src 'self'" in headers["content-security-policy"] and "server" not in headers
    assert ask(running, Host=f"localhost:{running.port}")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "127.0.0.1:1", ""])
def test_another_name_for_this_machine_is_refused(running, host):
    status, _, text = ask(running, Host=host)
    assert status == 421 and "Host: found" in json.loads(text)["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "cors"},
        {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "no-cors"},
    ],
)
def test_another_sites_page_can_neither_post_nor_read(running, headers):
    body = json.dumps({"data": [], "fn_index": 0, "session_hash": "abc"})
    assert ask(running, "POST", JOIN, body, **JSON, **headers)[0] == 403
    for path in ("/config", "/gradio_api/queue/data?session_hash=abc"):
        status, found, _ = ask(running, path=path, **headers)
        assert status == 403 and not any("allow-origin" in name.lower() for name in found)


def test_a_link_from_elsewhere_may_be_followed(running):
    assert ask(running, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200


def test_no_websocket(running):
    wanted = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}
    assert ask(running, path="/gradio_api/queue/join", **wanted)[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/static/../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/assets/..%2f..%2f..%2f..%2fetc/passwd",
        "/assets//etc/passwd", "/gradio_api/proxy=http://evil.example/", "/gradio_api/info", "/docs",
        "/gradio_api/openapi.json", "/openapi.json", "/monitoring", "/gradio_api/upload", "/gradio_api/vibe-code",
        "/gradio_api/runs",
        "/gradio_api/stream/a/b/c/playlist.m3u8", "/login", "/gradio_api/mcp/sse", "/gradio_api/deep_link",
    ],
)  # fmt: skip
def test_files_and_the_rest_of_gradio_are_closed(running, path):
    status, _, text = ask(running, path=path)
    assert status in (403, 404) and "root:" not in text


@pytest.mark.parametrize("path", ["run/predict", "call/predict", "upload", "component_server", "process_recording"])
def test_nothing_is_posted_but_to_the_queue(running, path):
    assert ask(running, "POST", f"/gradio_api/{path}", "{}", **JSON)[0] == 404


def test_a_body_is_json_and_bounded(running):
    assert ask(running, "POST", JOIN, "{}", Content_Type="text/plain")[0] == 415
    assert ask(running, "POST", JOIN, "{}")[0] == 415
    status, _, text = ask(running, "POST", JOIN, "x" * (MOST_BYTES + 1), **JSON)
    assert status == 413 and "send a shorter text" in text
    parts = (b"x" * 100_000 for _ in range(20))  # sent in chunks, its length not said beforehand
    assert ask(running, "POST", JOIN, parts, **JSON)[0] == 413


def called(running, label: str, session: str, **changes) -> str:
    """What the chat shows when its inputs are sent by hand, past the browser's own limits. `changes`: by label."""
    config = json.loads(ask(running, path="/config")[2])
    components = {each["id"]: each for each in config["components"]}
    buttons = [each["id"] for each in components.values() if each["props"].get("value") == label]
    call = next(each for each in config["dependencies"] if any(target[0] in buttons for target in each["targets"]))
    props = [components[number]["props"] for number in call["inputs"]]
    data = [changes.get((each.get("label") or "").replace(" ", "_"), each.get("value")) for each in props]
    body = json.dumps({"data": data, "fn_index": call["id"], "session_hash": session, "trigger_id": None})
    status, _, text = ask(running, "POST", JOIN, body, **JSON)
    assert status == 200, text
    return ask(running, path=f"/gradio_api/queue/data?session_hash={session}")[2]


def test_by_hand_as_in_the_page(running):
    assert "I am one." in called(running, "Send", "s0", Message="Hello")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"Message": "x" * 20_001}, "20,001 characters"),
        ({"Message": "Hello", "System_message": "x" * 20_001}, "20,001 characters"),
        ({"Message": "Hello", "Most_new_tokens": 10**9}, "4096"),
        ({"Message": "Hello", "Temperature": -1}, "rror"),
        ({"Message": "Hello", "Seed": "9" * 40}, "seed"),
        ({"Message": "Hello", "Stage": "../../../etc/passwd"}, "rror"),
    ],
)
def test_what_a_browser_would_not_send_is_refused(running, changes, says):
    shown = called(running, "Send", "s1", **changes)
    assert says in shown and "I am one." not in shown and "root:" not in shown
    assert "I am one." in called(running, "Send", "s2", Message="Hello"), "and the board goes on"


@pytest.mark.parametrize("deep", [False, True])
def test_a_request_that_names_a_file_is_refused(running, deep, tmp_path):
    """Gradio would copy it into its cache, where its file route serves it."""
    secret = tmp_path / "secret.txt"
    secret.write_text("s")
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [[{"x": file}] if deep else file], "fn_index": 0, "session_hash": "s4"})
    status, _, text = ask(running, "POST", JOIN, body.replace("gradio", "\\u0067radio"), **JSON)
    assert status == 403 and "names a file" in text
    assert ask(running, "POST", JOIN, "[" * 100_000, **JSON)[0] == 400


def test_conversations_are_not_written(running, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in running.root.rglob("*")}
    called(running, "Send", "s3", Message="Hello")
    assert {path: path.stat().st_mtime_ns for path in running.root.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []


def test_other_machines_are_kept_out_unless_named():
    assert app.check_host("127.0.0.1", []) == app.check_host("localhost", []) == ""
    with pytest.raises(UserError, match="no password"):
        app.check_host("0.0.0.0", [])
    assert "WARNING" in app.check_host("0.0.0.0", ["gpu-box"])
    listener = app.listen("127.0.0.1", 0)
    listener.listen()
    with pytest.raises(UserError, match="--port: .* cannot be had"):
        app.listen("127.0.0.1", listener.getsockname()[1])
    listener.close()


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(running, tmp_path):
    command = [sys.executable, "-m", "posttrain.cli", "board", str(running.root / "one"), "--port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        said = ""
        while "http" not in said:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            said += line
        running_there = type("There", (), {"port": int(re.search(r"127\.0\.0\.1:(\d+)", said)[1])})
        assert "1 models: one" in said and ask(running_there)[0] == 200
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
