"""Engines without vLLM: their keys, the time-out of a call, the proof after a sync, and who may ask a server what."""

import argparse
import math
import socket
import subprocess
import sys
import time
from copy import deepcopy

import pytest
import torch
from rl_helpers import perturb, tiny_llama

from posttrain import serve_engine
from posttrain.errors import UserError
from posttrain.lora import LoraArgs, add_adapter
from posttrain.rl.engine import EngineConfig, EngineError, Watchdog, request_seeds
from posttrain.rl.hf_engine import HFEngine
from posttrain.rl.sync import prove_sync
from posttrain.rl.vllm_engine import lora_settings, memory, sleep_mode
from posttrain.rl.vllm_routes import Refused, check

PROMPTS = [[7], [20, 21, 22, 23], list(range(30, 60)), [5] * 12]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_vllm": "maybe"}, "use_vllm.*'maybe'.*server"),
        ({"vllm_mode": "apart"}, "vllm_mode.*'apart'.*colocate or server"),
        ({"vllm_lora": "both"}, "vllm_lora.*merge or adapter"),
        ({"vllm_timeout": 0}, "vllm_timeout.*more than 0"),
        ({"vllm_max_num_seqs": 0}, "vllm_max_num_seqs.*at least 1"),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization.*at most 1"),
        ({"use_vllm": "false", "vllm_mode": "server"}, "vllm_mode.*use_vllm: false"),
        ({"use_vllm": "server", "vllm_lora": "adapter"}, "vllm_lora.*server"),
        ({"vllm_sync": "disk"}, "vllm_sync.*'disk'.*auto, group or memory"),
        ({"vllm_group_port": 70000}, "vllm_group_port.*0 to 65535"),
        ({"vllm_server_base_url": "localhost:8000"}, "vllm_server_base_url.*http://"),
    ],
)
def test_keys_that_do_not_fit(keys, said):
    with pytest.raises(UserError, match=said):
        EngineConfig(**keys)


def test_the_servers_address():
    assert EngineConfig(use_vllm=True).use_vllm == "true"
    assert EngineConfig(use_vllm="server").vllm_mode == "server"
    assert EngineConfig(vllm_server_host="box", vllm_server_port=81).server_url == "http://box:81"
    assert EngineConfig(vllm_server_base_url="http://box:82/", vllm_server_port=81).server_url == "http://box:82"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has both")
def test_what_only_a_gpu_has_is_refused_and_not_dropped():
    with pytest.raises(UserError, match="vllm_enable_sleep_mode: true, but .*CUDA"):
        sleep_mode(EngineConfig(vllm_enable_sleep_mode=True))
    assert not sleep_mode(EngineConfig())
    with pytest.raises(UserError, match="vllm_gpu_memory_utilization: .*vllm_kv_cache_gb"):
        memory(EngineConfig(vllm_gpu_memory_utilization=0.5))
    assert memory(EngineConfig(vllm_kv_cache_gb=0.25)) == {"kv_cache_memory_bytes": 2**28}


def test_adapters_that_vllm_cannot_take_are_refused():
    model = tiny_llama()
    add_adapter(model, LoraArgs(use_peft=True, lora_r=4, lora_alpha=12), token_ids=[5, 6])
    with pytest.raises(UserError, match="vllm_lora: adapter.*trainable_tokens.*merge"):
        lora_settings(model)
    plain = tiny_llama()
    add_adapter(plain, LoraArgs(use_peft=True, lora_r=4, lora_alpha=12, lora_target_modules=["q_proj", "up_proj"]))
    assert lora_settings(plain) == {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"]}


def test_no_two_samples_share_a_seed():
    seeds = [s for step in range(30) for group in request_seeds(20, 8, step) for s in group]
    assert len(set(seeds)) == 30 * 20 * 8
    assert request_seeds(20, 8, 3)[:5] == request_seeds(5, 8, 3), "more prompts change nothing for the first"


# --- time-outs


def test_a_call_that_fails_says_whose_it_was():
    dog = Watchdog("engine 1.0", 60)
    assert dog.call("generate", lambda: 41 + 1) == 42
    with pytest.raises(EngineError, match="engine 1.0: generate failed: MemoryError: no room"):
        dog.call("generate", lambda: throw(MemoryError("no room\nand more")))
    with pytest.raises(UserError, match="^the user's own$"):
        dog.call("generate", lambda: throw(UserError("the user's own")))
    assert dog.call("generate", lambda: 1) == 1


def throw(error):
    raise error


HANG = """
import sys, time
from posttrain.rl.engine import EngineError, Watchdog
dog = Watchdog("engine", 0.3)
try:
    dog.call("generate", lambda: time.sleep(1e5))
except EngineError as error:
    print(error)
try:
    dog.call("sync_weights", lambda: None)
except EngineError as error:
    print("refused", error)
open(sys.argv[1], "w").write("checkpoint")
sys.exit(0)
"""


def test_a_hanging_engine_ends_the_process_after_its_checkpoint(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path / "saved")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, "even where the program itself means to end well"
    assert (tmp_path / "saved").read_text() == "checkpoint"
    first, second = done.stdout.splitlines()
    assert "engine: generate took longer than vllm_timeout, 0.3 s" in first and second == f"refused {first}"
    assert time.monotonic() - began < 60


# --- the proof


def test_the_proof_of_an_engine_with_the_same_weights_is_one():
    model = tiny_llama(seed=2)
    engine = HFEngine(deepcopy(model), 1)
    for temperature in (1.0, 0.7):
        gap = prove_sync(engine, model, PROMPTS, bound=1.001, seed=0, temperature=temperature)
        assert 1 <= gap < 1.0001


def test_the_proof_of_a_model_with_adapters_inside():
    model = tiny_llama(seed=2)
    add_adapter(model, LoraArgs(use_peft=True, lora_r=4))
    perturb(model, 0.05)
    assert prove_sync(HFEngine(deepcopy(model), 1), model, PROMPTS, bound=1.001, seed=0) < 1.0001


def stale_head(model):
    """The head keeps its old weights while the embeddings, tied to it, are new."""
    other = deepcopy(model)
    head = deepcopy(other.get_output_embeddings())
    perturb(other, 0.05)
    trained = deepcopy(other)
    other.set_output_embeddings(head)
    return HFEngine(other, 1), trained


def stale_weights(model):
    trained = deepcopy(model)
    perturb(trained, 0.05)
    return HFEngine(model, 1), trained


@pytest.mark.parametrize("broken", [stale_head, stale_weights])
def test_the_proof_names_the_first_token_that_differs(broken):
    engine, model = broken(tiny_llama(seed=2))
    with pytest.raises(UserError) as error:
        prove_sync(engine, model, PROMPTS, bound=1.01, seed=0)
    text = str(error.value)
    assert engine.name in text and "16 fresh tokens" in text and "the bound is 1.01" in text
    assert "first at prompt 0, token 0" in text and "did not reach the engine" in text


def test_a_proof_that_is_no_number_fails():
    model = tiny_llama(seed=2)

    def broken(*_):
        return [torch.full((4,), math.nan)] * 4

    with pytest.raises(UserError, match="is nan, the bound"):
        prove_sync(HFEngine(model, 1), model, PROMPTS, bound=1e9, seed=0, logps=broken)


# --- the server's guard, and what `posttrain serve` refuses


def scope(path="/posttrain/generate", client="127.0.0.1", **headers) -> dict:
    given = {"host": "127.0.0.1:8000", **headers}
    encoded = [(name.encode(), value.encode()) for name, value in given.items()]
    return {"path": path, "client": (client, 1), "headers": encoded}


@pytest.mark.parametrize(
    ("request_", "key", "status"),
    [
        (scope(), None, None),
        (scope(host="localhost:8000", client="::1"), None, None),
        (scope(client="::ffff:127.0.0.1"), None, None),
        (scope("/v1/completions"), None, None),
        (scope(origin="http://127.0.0.1:8000"), None, 403),
        (scope(host="evil.example:8000"), None, 403),
        (scope("/collective_rpc"), None, 404),
        (scope("/scale_elastic_ep"), None, 404),
        (scope(client="10.0.0.9", host="box:8000"), None, 403),
        (scope(client="10.0.0.9", host="box:8000"), "k", 401),
        (scope(client="10.0.0.9", host="box:8000", authorization="Bearer other"), "k", 401),
        (scope(client="10.0.0.9", host="box:8000", authorization="Bearer k"), "k", None),
        (scope("/posttrain/load", client="10.0.0.9", host="box:8000", authorization="Bearer k"), "k", 403),
        (scope("/posttrain/load", authorization="Bearer k"), "k", None),
        (scope("/posttrain/group", client="10.0.0.9", host="box:8000", authorization="Bearer k"), "k", None),
        (scope("/posttrain/group", client="10.0.0.9", host="box:8000"), None, 403),
        (scope("/posttrain/receive", client="10.0.0.9", host="box:8000", authorization="Bearer l"), "k", 401),
        (scope("/posttrain/group"), "k", 401),
        (scope("/posttrain/load"), "k", 401),
        (scope("/v1/completions", client="10.0.0.9", host="box:8000"), "k", 401),
        (scope("/health", client="10.0.0.9", host="box:8000"), "k", None),
    ],
)
def test_who_may_ask_what(request_, key, status, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("VLLM_API_KEY", key)
    if status is None:
        return check(request_)
    with pytest.raises(Refused) as refusal:
        check(request_)
    assert refusal.value.status == status


def options(*argv) -> argparse.Namespace:
    top = argparse.ArgumentParser()
    serve_engine.add_verb(top.add_subparsers(), argparse.ArgumentParser(add_help=False))
    return top.parse_args(["serve", *argv])


def test_serve_stays_on_this_machine_unless_told(monkeypatch, tmp_path):
    pytest.importorskip("vllm")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(UserError, match="--host: found 0.0.0.0.*--allow_remote"):
        serve_engine.command(options("hub/name", "--host", "0.0.0.0"))
    with pytest.raises(UserError, match="--allow_remote.*VLLM_API_KEY"):
        serve_engine.command(options("hub/name", "--host", "0.0.0.0", "--allow_remote"))
    monkeypatch.setenv("VLLM_API_KEY", "secret-key")
    words = serve_engine.command(options("hub/name", "--host", "0.0.0.0", "--allow_remote", "--port", "0"))
    assert "--host=0.0.0.0" in words and "secret-key" not in " ".join(words)
    with pytest.raises(UserError, match="MODEL: .*config.json"):
        serve_engine.command(options(str(tmp_path)))


def test_serve_on_a_port_that_is_taken():
    pytest.importorskip("vllm")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port: .*cannot be had"):
            serve_engine.command(options("hub/name", "--port", str(taken.getsockname()[1])))
