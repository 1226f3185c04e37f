"""Tools of a real MCP server (tests/mcp_shop.py): over stdin and stdout, over HTTP, slow, gone, or none at all.

Run: pytest tests/test_tools_mcp.py
"""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_tool_rollouts import CALL, Says, tool_tokenizer

from posttrain.chat import encode_chat
from posttrain.errors import UserError
from posttrain.rl.rollout import Sampling
from posttrain.rl.tools import ToolEngine
from posttrain.tools import check_tools, load_tools, schemas

pytest.importorskip("mcp", reason="pip install 'posttrain[mcp]'")
SHOP = str(Path(__file__).parent / "mcp_shop.py")
LOCAL = {"command": sys.executable, "args": [SHOP], "env": {"SHOP_KEY": "$OUR_SHOP_KEY"}, "timeout": 5.0}


@pytest.fixture(scope="module")
def shop():
    """name -> tool of a server that this process started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUR_SHOP_KEY", "sesame")
        patch.setenv("HF_TOKEN", "hf_secret")
        return {tool.name: tool for tool in load_tools(["mcp:shop"], {"mcp:shop": LOCAL})}


def test_each_tool_of_the_server_is_one(shop):
    assert list(shop) == ["price", "stock", "wait", "leave"]
    function = shop["price"].schema["function"]
    assert function["name"] == "price" and function["description"] == "The price of an item in cents."
    assert function["parameters"]["properties"]["item"]["type"] == "string"
    assert shop["price"].call({"item": "apple"}) == "30"
    assert shop["price"].call({"item": "plum"}).startswith("error: ")
    assert shop["price"].call({}) == "error: price: missing a required argument: 'item'"
    assert shop["stock"].call({"item": "a", "shelf": "2"}).startswith('error: stock: shelf is "2", expected a value')


def test_the_server_gets_the_variables_named_and_no_others(shop):
    found = json.loads(shop["stock"].call({"item": "pear", "shelf": 2}))
    assert found == {"item": "pear", "shelf": 2, "key": "sesame", "secret": None}
    with pytest.raises(UserError, match="mcp:x: env: A: the environment variable NO_SUCH_ONE is not set"):
        load_tools(["mcp:x"], {"mcp:x": {"command": "x", "env": {"A": "$NO_SUCH_ONE"}}})


def test_a_model_calls_it_like_any_tool(shop):
    tools, tokenizer = [shop["price"]], tool_tokenizer()
    call = (CALL % "x").replace("calculator", "price").replace("expression", "item").replace('"x"', '"pear"')
    start = encode_chat(
        tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=True, tools=schemas(tools)
    )
    engine = ToolEngine(Says(call, "45"), tools, tokenizer)
    [whole] = engine.generate([start.input_ids], Sampling(1, 500, (tokenizer.eos_token_id,)), 0)
    answer = tokenizer.decode([i for i, own in zip(whole.ids, whole.mask, strict=True) if not own])
    assert "<tool_response>\n45\n</tool_response>" in answer and (whole.calls, whole.failed_calls) == (1, 0)


def test_only_some_of_its_tools_and_one_session(shop):
    [tool] = load_tools(["mcp:shop"], {"mcp:shop": {**LOCAL, "only": ["wait"]}})
    assert tool.name == "wait"
    with pytest.raises(UserError, match="only: no tool 'prise'; the server has price, stock, wait, leave"):
        load_tools(["mcp:shop"], {"mcp:shop": {**LOCAL, "only": ["prise"]}})


def test_a_slow_server_and_one_that_dies(shop, monkeypatch):
    monkeypatch.setenv("OUR_SHOP_KEY", "sesame")
    tools = {tool.name: tool for tool in load_tools(["mcp:mortal"], {"mcp:mortal": {**LOCAL, "timeout": 0.5}})}
    assert tools["wait"].call({"seconds": 3.0}).startswith("error: mcp:mortal: ")
    assert shop["wait"].call({"seconds": 3.0}, timeout=0.2) == "error: wait gave no answer within 0.2 s"
    assert tools["leave"].call({}).startswith("error: mcp:mortal: ")
    assert tools["price"].call({"item": "pear"}).startswith("error: mcp:mortal: ")
    assert shop["price"].call({"item": "pear"}) == "45"


def test_a_server_over_http():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, SHOP, "streamable-http", str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        [tool] = load_tools(
            ["mcp:far"], {"mcp:far": {"url": f"http://127.0.0.1:{port}/mcp", "only": ["price"], "timeout": 2.0}}
        )
        assert tool.call({"item": "apple"}) == "30"
    finally:
        server.kill()
        server.wait()
    assert tool.call({"item": "apple"}).startswith("error: mcp:far: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"command": "no-such-command"},
            "tools: mcp:x: no-such-command is no MCP server that answers: FileNotFoundErr",
        ),
        ({"command": sys.executable, "args": ["-c", "pass"]}, "is no MCP server that answers: "),
        ({"url": "http://127.0.0.1:9/mcp"}, "http://127.0.0.1:9/mcp is no MCP server that answers: "),
    ],
)
def test_servers_that_cannot_be_reached_stop_the_run(options, message):
    with pytest.raises(UserError, match=message):
        load_tools(["mcp:x"], {"mcp:x": options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "command, url: found neither"),
        ({"command": "a", "url": "http://b"}, "command, url: found both"),
        ({"command": ["a"]}, r"command: found \['a'\], expected text"),
        ({"command": "a", "args": "b"}, "args: found 'b', expected a list of texts"),
        ({"command": "a", "env": {"K": 3}}, "env: found .*, expected a mapping of texts"),
        ({"command": "a", "only": [1]}, r"only: found \[1\], expected a list of texts"),
        ({"url": "http://a", "args": ["b"]}, "args, env: found some beside url"),
        ({"url": "a:80"}, "url: found 'a:80', expected http"),
        ({"command": "a", "timeout": 0}, "timeout: found 0"),
        ({"comand": "a"}, "unknown key 'comand'; did you mean 'command'"),
    ],
)
def test_wrong_options_stop_the_run(options, message):
    with pytest.raises(UserError, match=f"tool_options: mcp:x: {message}"):
        check_tools(["mcp:x"], {"mcp:x": options})
